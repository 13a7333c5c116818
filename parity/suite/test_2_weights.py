"""Weights, in real ranks, bit for bit: each direction by itself, then there and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from parity.checks import weights

Run = Callable[[Any], None]


def test_import(run: Run) -> None:
    """Each rank holds what an independent statement of Megatron's layout says, element by element."""
    run(weights.imported)


def test_config_in_the_model(run: Run) -> None:
    """The built model computes with what its config demands, by transformers' own reading of it: eps, rope, sizes."""
    run(weights.config_in_the_model)


def test_coverage(run: Run) -> None:
    """Every tensor name and every config field of both sides is accounted for: moved, derived, constant or dropped."""
    run(weights.coverage)


def test_export(run: Run) -> None:
    """A model set up by the independent statement exports the checkpoint that the statement was made from."""
    run(weights.exported)


def test_round_trip(run: Run) -> None:
    """The model's own weights, imported and saved: the same keys, shapes, dtypes, bits, config and tokenizer files."""
    run(weights.round_trip)
