"""Training steps of the imported model, in ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from parity.converter import Converter, Settings
from parity.observation import gradients
from parity.observation.lessons import Lesson, Recipe


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a few training steps were like.

    Attributes:
        rows: Mean loss of each micro-batch of the first step, in nats, in the order of the batch.
        curve: Mean loss over all labelled tokens, before each step.
        norms: L2 norm of all gradients, as the optimizer's library computes it.
        gradients: The first step's, compared tensor by tensor, where that was asked for.
        frozen: Parameters that the Hugging Face model does not have, which are not trained.
        optimizer: What took the steps.
    """

    rows: list[float]
    curve: list[float]
    norms: list[float]
    gradients: gradients.Comparison | None
    frozen: list[str]
    optimizer: str


def train(
    converter: Converter,
    folder: Path,
    settings: Settings,
    batches: Sequence[Lesson],
    recipe: Recipe,
    expected: Path | None,
) -> Trained | None:
    """Import a model, compare its gradients on the first batch, and train one step on each batch. Collective.

    Args:
        converter: The converter under test.
        folder: The checkpoint.
        settings: Layout and precision.
        batches: One for each step.
        recipe: The optimizer's constants.
        expected: Safetensors file of the Hugging Face gradients of the first batch. Without it the optimizer is the
            distributed one, which leaves each rank the reduced gradients of its shard alone: there are none to compare.

    Returns:
        What was found, on rank 0; `None` on every other rank.
    """
    from parity.observation import backend

    side = backend.of(settings)
    models = side.built(converter, folder, settings)
    config = json.loads((folder / "config.json").read_text())
    return side.train(models, config, settings, batches, recipe, expected)
