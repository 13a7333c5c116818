"""Whether two checkpoints, of whatever formats, hold the same model: every element, through the plan between them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from converters.checkpoint import Checkpoint
from converters.errors import ConversionError
from converters.files import checksums, identity
from converters.files.compare import Comparison, compare
from converters.files.digests import Digests
from converters.megatron_checkpoint import UnknownModel
from converters.progress import Progress
from converters.sources import Source

SAMPLE = 1 << 16
"""Bytes of each box that a quick look takes in."""
CENTRED = "layernorm_zero_centered_gamma"


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Two checkpoints held against each other.

    Attributes:
        first: One of them; what differs is told of tensors in the names of the other, as a rule (`names`).
        second: The other, or the file of its digests.
        columns: Of the two.
        tensors: Of the second, that were compared.
        elements: Of them, that were looked at.
        bytes: Those elements', in the second.
        seconds: Wall time.
        sampled: Only a part of each tensor was looked at.
        different: The tensors that differ, in the order of their names.
        config: Fields of the models that differ, with both values.
        constants: Elements that one side lacks, all of them zero unless `different` says otherwise.
        ignored: Tensors of the second that are no part of the model, with the reason.
        nonfinite: For each tensor of the second with NaN or infinite elements, how many there are on both sides.
        left_alone: What each of them holds besides weights.
        remarks: What is odd about them and changes nothing.
        damaged: Records of either whose bytes are not those that their checksums were made of; a sample reads none.
        checksums: Records that were held against theirs, of both.
        names: Whose names tensors are told in: B's, or A's where they were compared from B to A.
    """

    first: Path
    second: Path
    columns: tuple[str, str]
    tensors: int
    elements: int
    bytes: int
    seconds: float
    sampled: bool
    different: tuple[Comparison, ...]
    config: Mapping[str, tuple[Any, Any]]
    constants: int
    ignored: Mapping[str, str]
    nonfinite: Mapping[str, tuple[int, int]]
    left_alone: tuple[Mapping[str, str], Mapping[str, str]]
    remarks: tuple[str, ...]
    damaged: tuple[str, ...] = ()
    checksums: int = 0
    names: str = "B"

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.different and not self.config and not self.damaged


def verify(
    first: str | Path,
    second: str | Path,
    *,
    like: str | Path | Source | None = None,
    sample: int | None = None,
    show: int = 3,
    workers: int = 2,
    quiet: bool = True,
) -> Verification:
    """Compare two checkpoints; all that differs is found, not the first difference alone.

    Args:
        first: A folder of any format, or a hub id.
        second: Likewise.
        like: The Hugging Face model of a Megatron checkpoint that does not say which it holds; by default the other's.
        sample: Look at about so many bytes of each box of a tensor (a layer of a stacked one), spread over it.
        show: Elements that are shown of each tensor.
        workers: Threads.
        quiet: No progress bar.

    Raises:
        ConversionError: One of them is no checkpoint, cannot be trusted, or does not hold the tensors of its model.
    """
    began = time.monotonic()
    one, other = _opened(first, second, like)
    if one.family.name != other.family.name:
        raise ConversionError(f"{first} is a {one.family.name} model, {second} a {other.family.name} model")
    for checkpoint in (one, other):
        checkpoint.check()
    # Norms less one were rounded when they were made of whole ones: adding one to them is what has a right answer.
    back = CENTRED in other.stored and CENTRED not in one.stored
    here, there = (other, one) if back else (one, other)
    features = there.stored if here.column != there.column else frozenset()
    parts = here.parts(there.column, there.padding, features)
    lost = {key: why for plan, _ in parts for key, why in plan.lost.items() if key in there.tensors}
    boxes = [(info.nbytes, len(there.held.extents(key))) for key, info in there.tensors.items()]
    total = sum(nbytes if sample is None else min(nbytes, sample * count) for nbytes, count in boxes)
    with Progress("comparing", total, quiet=quiet) as progress:
        each_of = compare(parts, there.held, sample=sample, show=show, workers=workers, report=progress.advance)
        found = [_turned(each) if back else each for each in each_of if each.key not in lost]
    damaged, held = _damaged({"A": one, "B": other} if sample is None else {}, workers, quiet)
    identity.check(identity.known((one.files, other.files)))
    found.sort(key=lambda each: each.key)
    sizes = {key: info.nbytes // max(1, info.elements) for key, info in there.tensors.items()}
    return Verification(
        first=one.folder,
        second=other.folder,
        columns=(one.kind, other.kind),
        tensors=sum(1 for each in found if each.elements),
        elements=sum(each.elements for each in found),
        bytes=sum(each.elements * sizes.get(each.key, 0) for each in found),
        seconds=time.monotonic() - began,
        sampled=sample is not None,
        different=tuple(each for each in found if not each.equal),
        config=_config(one, other),
        constants=sum(part.elements for plan, _ in parts for part in (*plan.fills, *plan.constants)),
        ignored=lost,
        nonfinite={each.key: each.nonfinite for each in found if any(each.nonfinite)},
        left_alone=(one.files.left_alone, other.files.left_alone),
        remarks=(*one.remarks, *other.remarks),
        damaged=damaged,
        checksums=held,
        names="A" if back else "B",
    )


def verify_digests(
    folder: str | Path,
    digests: str | Path,
    *,
    like: str | Path | Source | None = None,
    workers: int = 2,
    quiet: bool = True,
) -> Verification:
    """Hold a checkpoint against the digests that a conversion wrote of it.

    Args:
        folder: The checkpoint, in whatever files; its column must be that of the digests.
        digests: What `convert_folder(digests=...)` wrote.
        like: As in `verify`.
        workers: Threads.
        quiet: No progress bar.

    Raises:
        ConversionError: No checkpoint, no digests, or those of another column.
    """
    began, one, asked = time.monotonic(), _open(folder, like), Digests.read(Path(digests))
    if asked.column != one.kind:
        raise ConversionError(
            f"{digests} is of a checkpoint in the {asked.column!r} column, {folder} is in {one.kind!r}: "
            "compare the two checkpoints themselves, python -m converters verify A B"
        )
    one.check()
    parts = one.parts(one.column, one.padding)
    total = sum(info.nbytes for info in one.tensors.values())
    with Progress("comparing", total, quiet=quiet) as progress:
        found = sorted(
            asked.compare(parts, one.held, workers=workers, report=progress.advance), key=lambda each: each.key
        )
    damaged, held = _damaged({"A": one}, workers, quiet)
    identity.check(identity.known([one.files]))
    sizes = {key: info.nbytes // max(1, info.elements) for key, info in one.tensors.items()}
    return Verification(
        first=one.folder,
        second=Path(digests),
        columns=(one.kind, asked.column),
        tensors=sum(1 for each in found if each.elements),
        elements=sum(each.elements for each in found),
        bytes=sum(each.elements * sizes.get(each.key, 0) for each in found),
        seconds=time.monotonic() - began,
        sampled=False,
        different=tuple(each for each in found if not each.equal),
        config={},
        constants=0,
        ignored={},
        nonfinite={},
        left_alone=(one.files.left_alone, {}),
        remarks=one.remarks,
        damaged=damaged,
        checksums=held,
    )


def _damaged(sides: Mapping[str, Checkpoint], workers: int, quiet: bool) -> tuple[tuple[str, ...], int]:
    """What does not hold the checksums that were noted of it, by side, and how many were looked at."""
    records = {side: checksums.noted(checkpoint.files) for side, checkpoint in sides.items()}
    faults: list[str] = []
    total = sum(record.nbytes for held in records.values() for record in held)
    with Progress("checking", total, quiet=quiet) as progress:
        for side, held in records.items():
            which = sides[side].files.identities
            broken = checksums.broken(held, which, workers=workers, report=progress.advance)
            faults += [f"{side}: {fault}" for fault in broken]
    return tuple(sorted(faults)), sum(map(len, records.values()))


def _turned(found: Comparison) -> Comparison:
    """What was found going from B to A, with A on the left again."""
    first = (replace(at, made=at.found, found=at.made, bits=at.bits[::-1]) for at in found.first)
    faults = tuple(fault.replace("the other checkpoint", "A") for fault in found.faults)
    return replace(found, first=tuple(first), nonfinite=found.nonfinite[::-1], faults=faults)


def _opened(first: str | Path, second: str | Path, like: str | Path | Source | None) -> tuple[Checkpoint, Checkpoint]:
    """Both; one that does not say which model it holds is taken for that of `like`, or for the other's."""
    try:
        one = Checkpoint.open(first)
    except UnknownModel:
        other = _open(second, like)
        return Checkpoint.open(first, like=like or _model(other)), other
    return one, _open(second, like or _model(one))


def _open(path: str | Path, like: str | Path | Source | None) -> Checkpoint:
    try:
        return Checkpoint.open(path)
    except UnknownModel:
        if like is None:
            raise
        return Checkpoint.open(path, like=like)


def _model(checkpoint: Checkpoint) -> Source:
    """The Hugging Face model of a checkpoint, as a config alone."""
    return Source(name=str(checkpoint.folder), folder=None, config=checkpoint.config, origin="folder")


def _config(one: Checkpoint, other: Checkpoint) -> dict[str, tuple[Any, Any]]:
    """Fields of the model that differ."""
    both = {name: (one.hf.get(name), other.hf.get(name)) for name in sorted({*one.hf, *other.hf})}
    if one.megatron is not None and other.megatron is not None:
        both[CENTRED] = (CENTRED in one.stored, CENTRED in other.stored)
    return {name: values for name, values in both.items() if values[0] != values[1]}
