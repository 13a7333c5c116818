"""Weights, in real ranks, bit for bit: each direction by itself, then there and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from parity.checks.bench import Bench
from parity.findings import Finding, Measurement


def imported(bench: Bench) -> Iterator[Finding]:
    """Each rank holds what an independent statement of Megatron's layout says, element by element."""
    found = bench.ranks("measure:imported", bench.converter, bench.coded, bench.settings)
    differing = [line for _, lines in found for line in lines]
    yield Measurement.equal("import, coded", count=sum(n for n, _ in found), unit="parameters", differing=differing)


def exported(bench: Bench) -> Iterator[Finding]:
    """A model set up by the independent statement exports the checkpoint that the statement was made from."""
    with bench.scratch() as scratch:
        target = Path(scratch) / "exported"
        count, differing = bench.ranks("measure:exported", bench.converter, bench.coded, bench.settings, target)[0]
    yield Measurement.equal("export, coded", count=count, unit="tensors and files", differing=differing)


def round_trip(bench: Bench) -> Iterator[Finding]:
    """The model's own weights, imported and saved: the same keys, shapes, dtypes, bits, config and tokenizer files."""
    with bench.scratch() as scratch:
        target = Path(scratch) / "exported"
        folder = bench.subject.folder
        count, differing = bench.ranks("measure:round_trip", bench.converter, folder, bench.settings, target)[0]
    yield Measurement.equal("round trip", count=count, unit="tensors and files", differing=differing)
