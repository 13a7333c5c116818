"""From metadata alone: the plan of the weights and the ledger of the config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from parity.checks import metadata

Run = Callable[[Any], None]


def test_plan(run_on_metadata: Run) -> None:
    """Every element of every rank is written once, every element of the checkpoint read once; and back."""
    run_on_metadata(metadata.plan)


def test_config(run_on_metadata: Run) -> None:
    """Every config field has a row, and what Megatron is told says the same when it is told back."""
    run_on_metadata(metadata.config)
