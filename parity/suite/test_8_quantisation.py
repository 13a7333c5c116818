"""Below bfloat16: matrix products as the recipe says, the state of its scales, and checkpoints in FP8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from parity.checks import quantisation

Run = Callable[[Any], None]


def test_products(run: Run) -> None:
    """Quantised products, forward and backward, beside a second statement of the recipe, but for one rounding."""
    run(quantisation.products)


def test_fp8_state(run: Run) -> None:
    """Scales and histories of delayed scaling, saved and loaded: the same logits; another state is refused."""
    run(quantisation.state)


def test_fp8_checkpoints(run: Run) -> None:
    """The first layers written in each FP8 format: what codes and scales stand for, by the format's definition."""
    run(quantisation.checkpoints)
