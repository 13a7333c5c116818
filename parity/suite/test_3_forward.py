"""The imported model computes what transformers computes, on every token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from parity.checks import forward

Run = Callable[[Any], None]


def test_logits_and_loss(run: Run) -> None:
    """Logits and loss of every token of every probe, within bounds measured in this run (see `parity.bounds`)."""
    run(forward.logits_and_loss)
