"""What leaves each block of the imported model is what leaves it in transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from parity.checks import activations

Run = Callable[[Any], None]


def test_activations(run: Run) -> None:
    """The embedding, each block and the final norm, within bounds measured in this run."""
    run(activations.every_block)
