"""One checkpoint held against another, without Megatron: a release and its source, or what two converters made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from converters.errors import ConversionError
from converters.models import family_of
from parity.checks.bench import Bench
from parity.findings import Finding, Measurement
from parity.subjects import Subject, subject


def _other(bench: Bench) -> Subject:
    """The checkpoint that is held against the bench's own."""
    assert bench.case.against is not None
    name, trusted = bench.case.against, bench.case.trust_remote_code
    found: Subject = bench.shared.once(("against", name), lambda: subject(name, trust_remote_code=trusted))
    return found


def config(bench: Bench) -> Iterator[Finding]:
    """Every config field means the same: defaults filled in, either spelling of rope."""
    family = family_of(bench.subject.config)
    mine, _ = family.fields.read(bench.subject.config)
    try:
        theirs, _ = family.fields.read(_other(bench).config)
    except ConversionError as error:
        yield Measurement.equal("config", count=len(mine), unit="fields", differing=str(error).splitlines())
        return
    differing = [
        f"{name} is {mine.get(name)!r} in one and {theirs.get(name)!r} in the other"
        for name in sorted(mine.keys() | theirs.keys())
        # What dtype the weights are in, the tensors say.
        if mine.get(name) != theirs.get(name) and name != "dtype"
    ]
    yield Measurement.equal("config", count=len(mine), unit="fields", differing=differing)


def files(bench: Bench) -> Iterator[Finding]:
    """Every file that is neither config nor weights is the same bytes."""
    from converters.artefacts import carried

    mine, theirs = bench.subject.folder, _other(bench).folder
    names = sorted({path.as_posix() for folder in (mine, theirs) for path in carried(folder, code=True)})
    differing = [text for name in names if (text := _file_difference(name, mine, theirs))]
    if names:
        yield Measurement.equal("files", count=len(names), unit="files", differing=differing)
    else:
        yield Measurement.proved("files", count=1, unit="pairs of folders without other files")


def _file_difference(name: str, mine: Path, theirs: Path) -> str:
    for folder, which in ((mine, "the first"), (theirs, "the second")):
        if not (folder / name).is_file():
            return f"{name}: not in {which}"
    return "" if (mine / name).read_bytes() == (theirs / name).read_bytes() else f"{name}: not the same bytes"


def tensors(bench: Bench) -> Iterator[Finding]:
    """Every tensor: equal bits, or the bits of the same numbers rounded once to another dtype."""
    yield from bench.alone("compared:tensors", bench.subject.folder, _other(bench).folder)


def logits(bench: Bench) -> Iterator[Finding]:
    """Every logit that transformers computes is the same with both, within the floors of the first.

    In float32, a second that holds the first's numbers rounded is held against the first with weights rounded alike.
    """
    from parity.checks.forward import asked, held

    case, rounded = bench.case, None
    if case.precision == "fp32":
        rounded = bench.alone("compared:narrower", bench.subject.folder, _other(bench).folder)
    questions = asked(bench, rounded)
    answers = bench.alone("observation.forward:transformers", _other(bench).folder, questions[0], case.precision)
    for probe, reference, answer in zip(*questions, answers, strict=True):
        mine, theirs = reference.expected.logits, answer.logits
        if mine.shape != theirs.shape:
            said = f"logits have the shape {list(mine.shape)} with one and {list(theirs.shape)} with the other"
            yield Measurement.equal(f"logits, {probe.name}", count=mine.size, unit="logits", differing=[said])
        else:
            yield from held(
                f"logits, {probe.name}",
                theirs,
                mine,
                reference.logits,
                at=np.argwhere(probe.compared),
                case=case,
                detail=f"probe: {probe.name}; {probe.about}",
            )
