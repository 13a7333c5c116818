"""One checkpoint held against another: config, files, tensors, and what the two models compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from parity.checks import comparison

Run = Callable[[Any], None]


def test_config(run: Run) -> None:
    """Every config field means the same, whichever way it is spelled."""
    run(comparison.config)


def test_files(run: Run) -> None:
    """Tokenizer, templates, generation config and every other file are the same bytes."""
    run(comparison.files)


def test_tensors(run: Run) -> None:
    """Every tensor has the same bits, or those of the same numbers rounded once to another dtype."""
    run(comparison.tensors)


def test_logits(run: Run) -> None:
    """Transformers computes the same with both."""
    run(comparison.logits)
