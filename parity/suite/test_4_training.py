"""The imported model trains as transformers trains it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from parity.checks import training

Run = Callable[[Any], None]


def test_training(run: Run) -> None:
    """Gradients of every tensor through the real schedule, then five optimizer steps."""
    run(training.steps)
