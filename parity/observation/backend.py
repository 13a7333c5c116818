"""What the harness asks of a backend in ranks: the one seam behind which everything of Megatron-Core's and TE's is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from converters.topology import Coord, Topology
from parity.converter import Converter, Settings
from parity.observation import megatron, te
from parity.observation.activations import Floats
from parity.observation.decoding import Decoded, Prompt
from parity.observation.lessons import Lesson, Recipe
from parity.observation.observe import Observation
from parity.observation.taps import Wanted
from parity.observation.training import Trained
from parity.probes import Probe
from parity.statement.config import Facts
from parity.statement.live import Chunk

Models = Sequence[Any]


class Backend(Protocol):
    """Models of one kind, as a rank has them. Every function is called on all ranks, and may be collective."""

    def built(self, converter: Converter, folder: Path, settings: Settings) -> list[Any]:
        """This rank's models of the checkpoint in `folder`, by the converter under test; groups of ranks are set up.

        Raises:
            ConversionError: The converter returned something else.
        """

    def saved(self, converter: Converter, models: Models, source: Path, target: Path) -> None:
        """Have the converter under test write them as a Hugging Face folder."""

    def bare(self, models: Models) -> list[Any]:
        """The models in their wrappers."""

    def beside(
        self,
        models: Models,
        source: Mapping[str, torch.Tensor],
        config: Mapping[str, Any],
        topology: Topology,
    ) -> Iterator[Chunk]:
        """Bare models beside the independent statement of what they must hold."""

    def misplaced(self, model: Any, topology: Topology, place: Coord) -> list[str]:
        """Where a bare model holds other layers than the placement says."""

    def answered(self, model: Any) -> Facts:
        """What a bare model computes with (`parity.statement.config`)."""

    def set_fields(self, model: Any) -> Mapping[str, str]:
        """Fields of a bare model's config that are not at their default, as text."""

    def tapped(
        self, models: Models, probe: Probe, *, settings: Settings, vocab_size: int, wanted: Wanted | None
    ) -> tuple[dict[str, Floats], Observation | None]:
        """What the models say to a probe, on the rank that has it, and the activations that this rank has whole.

        Args:
            models: As `built`.
            probe: What is asked.
            settings: As for `built`.
            vocab_size: Rows of the vocabulary without padding.
            wanted: Which taps; `None` for none, and hooks nowhere.
        """

    def train(
        self,
        models: Models,
        config: Mapping[str, Any],
        settings: Settings,
        batches: Sequence[Lesson],
        recipe: Recipe,
        expected: Path | None,
    ) -> Trained | None:
        """Compare gradients of the first batch, then step on each; see `parity.observation.training`."""

    def decoded(
        self,
        models: Models,
        settings: Settings,
        probe: Probe,
        prefill: int,
        prompts: Sequence[Prompt],
        vocab_size: int,
    ) -> Decoded | None:
        """Ask with a cache, on the rank that has the answer; see `parity.observation.decoding`."""


BACKENDS: Mapping[str, Backend] = {"megatron": megatron, "te": te}


def of(settings: Settings) -> Backend:
    """The backend that models of `settings` are of."""
    return BACKENDS[settings.backend]
