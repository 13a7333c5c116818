"""Weights, in real ranks, bit for bit: each direction by itself, then there and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from parity.case import Case
from parity.record import Record
from parity.subjects import Subject

Coded = Callable[[Case, Subject], Path]
Run = Callable[..., list[Any]]


def test_import(case: Case, subject: Subject, coded_checkpoints: Coded, in_ranks: Run, record: Record) -> None:
    """Each rank holds what an independent statement of Megatron's layout says, element by element."""
    found = in_ranks("imported", coded_checkpoints(case, subject), case.topology, case.precision)
    differing = [line for _, lines in found for line in lines]
    record.equal("import, coded", count=sum(n for n, _ in found), unit="parameters", differing=differing)


def test_export(case: Case, subject: Subject, coded_checkpoints: Coded, in_ranks: Run, record: Record) -> None:
    """A model set up by the independent statement exports the checkpoint that the statement was made from."""
    count, differing = in_ranks("exported", coded_checkpoints(case, subject), case.topology, case.precision)[0]
    record.equal("export, coded", count=count, unit="tensors", differing=differing)


def test_round_trip(case: Case, subject: Subject, in_ranks: Run, record: Record, scratch: Path) -> None:
    """The model's own weights, imported and saved: the same keys, shapes, dtypes, bits, config and tokenizer files."""
    target = scratch / "exported"
    count, differing = in_ranks("round_trip", subject.folder, case.topology, case.precision, target)[0]
    record.equal("round trip", count=count, unit="tensors and files", differing=differing)
