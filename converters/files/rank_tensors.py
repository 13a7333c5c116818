"""The tensors of a model whose parts lie in the files of ranks, seen whole.

Where each part belongs is what a plan from the model on its ranks to the same model on one says: its copies are boxes
of the whole tensors. Parts that several ranks hold are read at the first, and the others must be equal to them.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

from converters.errors import CheckpointError, listing
from converters.files.extents import Extent, Record, Recorded
from converters.files.identity import Identity
from converters.plan import Copy, Plan
from converters.tensors import ITEMSIZE, TensorInfo, check_tensors
from converters.topology import Mesh

BLOCK = 1 << 22
"""Bytes that are compared at once."""


class Rank(Protocol):
    """The tensors of one place of the mesh, each in one piece of a file."""

    @property
    def root(self) -> Path: ...
    @property
    def mesh(self) -> Mesh: ...
    @property
    def identities(self) -> Mapping[Path, Identity]: ...
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    def extents(self, key: str) -> Sequence[Extent]: ...


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive elements of a tensor that are consecutive in a file: first element there, first byte here."""

    start: int
    file: Path
    offset: int
    elements: int
    width: int


class RankTensors:
    """Whole tensors over the files of ranks.

    Args:
        root: The checkpoint's folder.
        plan: From the model to itself, whole on both sides, without constants.
        ranks: The parts.
        left_alone: What is there besides weights.

    Attributes:
        identities: Which files the ranks' are.

    Raises:
        CheckpointError: Tensors that are not the plan's, on whichever rank; dtypes that differ between ranks.
    """

    def __init__(self, root: Path, plan: Plan, ranks: Sequence[Rank], left_alone: Mapping[str, str]) -> None:
        self._root, self._left = root, left_alone
        self.identities = {path: found for rank in ranks for path, found in rank.identities.items()}
        self._extents: dict[str, list[Extent]] = defaultdict(list)
        self._records = tuple(record for rank in ranks if isinstance(rank, Recorded) for record in rank.records())
        self._copies: list[tuple[Extent, Copy]] = []
        dtypes: dict[str, set[str]] = defaultdict(set)
        problems: list[str] = []
        for rank in ranks:
            part, held = plan.restrict(source=rank.mesh), rank.tensors()
            try:
                check_tensors(part.source_tensors, held, f"{rank.root} ({rank.mesh.coord})")
            except CheckpointError as error:
                problems.append(str(error))
                continue
            runs: dict[str, list[_Run]] = defaultdict(list)
            for copy in part.copies:
                (place,) = rank.extents(copy.source.key)
                dtypes[copy.target.key].add(held[copy.source.key].dtype)
                if copy.kind == "verify" or copy.source_replica:
                    self._copies.append((place, copy))
                elif not problems:
                    shape = plan.target_tensors[copy.target.key]
                    box = _columns(copy, place, shape, ITEMSIZE[held[copy.source.key].dtype])
                    if box is not None:
                        self._extents[copy.target.key].append(box)
                    else:
                        runs[copy.target.key] += _runs(copy, place, ITEMSIZE[held[copy.source.key].dtype])
            for key, found in runs.items():
                self._extents[key] += [_box(run, plan.target_tensors[key]) for run in _joined(found)]
        problems += [f"{key}: of {' and '.join(sorted(found))}" for key, found in dtypes.items() if len(found) > 1]
        if problems:
            raise CheckpointError(listing(f"{root}: ranks that do not hold one model", problems))
        self._infos = {key: TensorInfo(shape, next(iter(dtypes[key]))) for key, shape in plan.target_tensors.items()}
        holes = [
            f"{key}: {sum(prod(box.shape) for box in self._extents[key]):,} of {info.elements:,} elements"
            for key, info in self._infos.items()
            if sum(prod(box.shape) for box in self._extents[key]) != info.elements
        ]
        assert not holes, listing("the plan of a layout does not cover it", holes)

    @property
    def root(self) -> Path:
        """The checkpoint's folder."""
        return self._root

    @property
    def left_alone(self) -> Mapping[str, str]:
        """What is there besides weights."""
        return self._left

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every weight, whole."""
        return self._infos

    def extents(self, key: str) -> Sequence[Extent]:
        """Its parts."""
        return self._extents[key]

    def records(self) -> Sequence[Record]:
        """The records of all ranks' archives."""
        return self._records

    def check_copies(self) -> None:
        """Hold what several ranks have (norms, a tied head) against the first of them.

        Raises:
            CheckpointError: Copies that differ; all of them.
        """
        problems = []
        for place, copy in self._copies:
            width = ITEMSIZE[self._infos[copy.target.key].dtype]
            whole = self._extents[copy.target.key]
            for run in _joined(_runs(copy, place, width)):
                if any(not _same(run, box, self._infos[copy.target.key].shape, width) for box in whole):
                    problems.append(f"{copy.source.key} in {place.file} is not equal to {copy.target.key}")
                    break
        if problems:
            raise CheckpointError(listing(f"{self._root}: copies that must be equal are not", set(problems)))


def _columns(copy: Copy, place: Extent, shape: tuple[int, ...], width: int) -> Extent | None:
    """The box of a copy that is some columns of a matrix, all rows of them in one piece of the file."""
    if len(copy.shape) != 2 or len(shape) != 2:
        return None
    rows, inner = copy.shape
    if copy.source.strides != (inner, 1) or copy.target.strides != (shape[1], 1):
        return None
    starts = divmod(copy.target.offset, shape[1])
    return Extent(place.file, place.offset + width * copy.source.offset, starts, (rows, inner))


def _runs(copy: Copy, place: Extent, width: int) -> Iterator[_Run]:
    """The pieces of a copy that are dense on both sides."""
    inner, outer = 1, len(copy.shape)
    while outer and copy.source.strides[outer - 1] == inner == copy.target.strides[outer - 1]:
        outer -= 1
        inner *= copy.shape[outer]
    for at in itertools.product(*map(range, copy.shape[:outer])):
        read = copy.source.offset + sum(i * stride for i, stride in zip(at, copy.source.strides, strict=False))
        start = copy.target.offset + sum(i * stride for i, stride in zip(at, copy.target.strides, strict=False))
        yield _Run(start, place.file, place.offset + width * read, inner, width)


def _joined(runs: Iterable[_Run]) -> list[_Run]:
    """Runs that follow each other on both sides as one."""
    out: list[_Run] = []
    for run in sorted(runs, key=lambda run: run.start):
        last = out[-1] if out else None
        if last and last.start + last.elements == run.start and last.offset + last.elements * run.width == run.offset:
            out[-1] = _Run(last.start, last.file, last.offset, last.elements + run.elements, run.width)
        else:
            out.append(run)
    return out


def _box(run: _Run, shape: tuple[int, ...]) -> Extent:
    """A run of whole rows as a box."""
    row = prod(shape[1:])
    assert run.start % row == 0 == run.elements % row, "ranks cut a tensor in the middle of a row"
    starts = (run.start // row, *(0 for _ in shape[1:]))
    return Extent(run.file, run.offset, starts, (run.elements // row, *shape[1:]))


def _same(run: _Run, box: Extent, shape: tuple[int, ...], width: int) -> bool:
    """Whether a run of whole rows has the bytes of a box, where they meet."""
    row = prod(shape[1:])
    start, stop = box.starts[0] * row, (box.starts[0] + box.shape[0]) * row
    first, last = max(start, run.start), min(stop, run.start + run.elements)
    if first >= last:
        return True
    here, there = run.offset + width * (first - run.start), box.offset + width * (first - start)
    left = width * (last - first)
    with run.file.open("rb") as one, box.file.open("rb") as other:
        one.seek(here)
        other.seek(there)
        while left > 0:
            count = min(left, BLOCK)
            if one.read(count) != other.read(count):
                return False
            left -= count
    return True
