"""What any box of a target tensor is made of, as bytes, wherever the source's tensors lie.

The copies of the plans that touch the box are cut along the boxes in which the source's files hold their tensors.
Long runs are handed out as they lie in the mapped source; what lies scattered is brought together in a small block
first. Either way a box comes as blocks that stay in a core's cache, in the order of its bytes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from converters.errors import PlanError
from converters.files.extents import Extent, TensorFiles
from converters.files.identity import known
from converters.files.mapped import Bits, Mapped, bits_of, strided
from converters.files.rounding import check_cast, constant, place
from converters.plan import Copy, Fill, Plan
from converters.tensors import ITEMSIZE, TensorInfo, check_tensors
from converters.walks import Spans, filled_within, span_of, within

Part = tuple[Plan, TensorFiles]
"""A plan, and the tensors that it reads: all of them, or those of one rank of the source's mesh."""

BLOCK = 1 << 20
"""Bytes handed out at a time: they stay in a core's own cache while they are summed, looked at and written."""
LONG = 1 << 16
"""Bytes in a row from which a run is handed out as it lies; below, calls would cost more than the copy they save."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A copy from one extent of the source into the box: its positions count from where each of them begins."""

    copy: Copy
    file: Path
    offset: int
    dtype: str

    @property
    def run(self) -> int:
        """Elements that lie in a row on both sides."""
        copy = self.copy
        return copy.shape[-1] if copy.shape and copy.source.strides[-1] == copy.target.strides[-1] == 1 else 1

    def values(self, mapped: Mapped) -> Bits:
        """The elements, as a view of the file."""
        region, dtype = self.copy.source, bits_of(self.dtype)
        offset = self.offset + region.offset * dtype.itemsize
        return strided(mapped[self.file], dtype, offset, region.strides, self.copy.shape)


@dataclass(slots=True)
class _Made:
    """What one target tensor is made of, with each copy the number of the part that it reads."""

    written: Spans[tuple[int, Copy]]
    second: Spans[tuple[int, Copy]]
    filled: Spans[Fill]


class Gather:
    """The target tensors of some plans, box by box. Threads may share it.

    Args:
        parts: The plans, which together make every element of the target once.
        cast: Let dtypes change, rounding to nearest even.

    Raises:
        CheckpointError: The source does not hold the tensors that a plan reads.
    """

    def __init__(self, parts: Sequence[Part], *, cast: bool = False) -> None:
        self._parts, self._cast = parts, cast
        self._mapped = Mapped(known(files for _, files in parts))
        self._held = [files.tensors() for _, files in parts]
        for (plan, files), held in zip(parts, self._held, strict=True):
            check_tensors(plan.source_tensors, held, str(files.root))
        self._extents: dict[tuple[int, str], Spans[Extent]] = {}
        self._made = _made([plan for plan, _ in parts])

    def dtypes(self, key: str) -> set[str]:
        """What the elements are held in that make target tensor `key`."""
        copies = self._made[key].written.items
        return {self._held[number][copy.source.key].dtype for number, copy in copies}

    def constant_faults(self) -> list[tuple[str, str]]:
        """The constants that the source should hold and does not: for each the tensor, and what is wrong with it."""
        out = []
        for number, (plan, _) in enumerate(self._parts):
            for part in plan.constants:
                info, wrong = self._held[number][part.region.key], 0
                expected = constant(part.value, info.dtype)
                for extent in self._extents_of(number, part.region.key).touching(*span_of(part.region, part.shape)):
                    for inside in filled_within(part, info.shape, extent.starts, extent.shape):
                        offset = extent.offset + inside.region.offset * ITEMSIZE[info.dtype]
                        memory = self._mapped[extent.file]
                        found = strided(memory, expected.dtype, offset, inside.region.strides, inside.shape)
                        wrong += sum(int((slab != expected).sum()) for slab in _slabs(found))
                if wrong:
                    what = f"{wrong:,} of {part.elements:,} elements that must be {part.value:g} are not ({part.rule})"
                    out.append((part.region.key, f"{part.region.key}: {what}"))
        return out

    def blocks(
        self,
        key: str,
        info: TensorInfo,
        box: Extent,
        stage: Bits,
        faults: list[str],
        overflows: list[int] | None = None,
    ) -> Iterator[Bits]:
        """The bytes of a box of target tensor `key`, in order.

        Args:
            key: The target tensor.
            info: Its shape, and the dtype that it is to have.
            box: The box; where it is to lie is not looked at.
            stage: `BLOCK` bytes for what has to be brought together. A block that was handed out is good until the
                next one is asked for.
            faults: Gets what is wrong with second copies of these elements in the source.
            overflows: Gets how many finite elements became infinite by rounding.

        Raises:
            CheckpointError: A dtype would change, and must not.
            PlanError: The plans do not make every element of the box.
        """
        made, reach = self._made[key], reach_of(info.shape, box)
        pieces = [piece for found in made.written.touching(*reach) for piece in self._pieces(found, info, box)]
        second = [piece for found in made.second.touching(*reach) for piece in self._pieces(found, info, box)]
        fills = [
            part
            for found in made.filled.touching(*reach)
            for part in filled_within(found, info.shape, box.starts, box.shape)
        ]
        there = sum(part.elements for part in fills) + sum(piece.copy.elements for piece in pieces)
        if there != math.prod(box.shape):
            raise PlanError(f"{key}: the plans make {there:,} of {math.prod(box.shape):,} elements of {box}")
        for dtype in {piece.dtype for piece in (*pieces, *second)}:
            check_cast(key, dtype, info.dtype, cast=self._cast)
        size = ITEMSIZE[info.dtype]
        if not second and not fills and all(_moves(piece, info.dtype) and piece.run * size >= LONG for piece in pieces):
            yield from self._runs(pieces, size)
        else:
            yield from self._staged(key, info.dtype, box, pieces, second, fills, stage, faults, overflows)

    def _staged(
        self,
        key: str,
        dtype: str,
        box: Extent,
        pieces: list[_Piece],
        second: list[_Piece],
        fills: list[Fill],
        stage: Bits,
        faults: list[str],
        overflows: list[int] | None,
    ) -> Iterator[Bits]:
        stage = stage.view(bits_of(dtype))
        elements, width = math.prod(box.shape), _width(box.shape, stage.size)
        written, copied = _spans(pieces), _spans(second)
        wrong: dict[tuple[str, str], int] = {}
        for low in range(0, elements, width):
            count = min(width, elements - low)
            block = stage[:count]
            for fill in fills:
                for part in filled_within(fill, (elements,), (low,), (count,)):
                    into = _view(block, part.region.offset, part.region.strides, part.shape)
                    into[...] = constant(part.value, dtype)
            for piece, into in _inside(written, elements, low, block):
                infinite = place(into, dtype, piece.values(self._mapped), piece.dtype, piece.copy.shift)
                if infinite and overflows is not None:
                    overflows.append(infinite)
            for piece, into in _inside(copied, elements, low, block):
                again, at = np.empty_like(into), (piece.copy.source.key, piece.copy.rule)
                place(again, dtype, piece.values(self._mapped), piece.dtype, piece.copy.shift)
                wrong[at] = wrong.get(at, 0) + int((again != into).sum())
            yield block.view(np.uint8)
        faults += [
            f"{source} is a second copy of what makes {key}, and differs from it ({count:,} elements; {rule})"
            for (source, rule), count in wrong.items()
            if count
        ]

    def _runs(self, pieces: list[_Piece], size: int) -> Iterator[Bits]:
        runs: list[tuple[int, Path, int, int]] = []
        for piece in pieces:
            copy, run = piece.copy, piece.run
            for index in itertools.product(*map(range, copy.shape[:-1])):
                into = sum(map(int.__mul__, copy.target.strides, index), copy.target.offset)
                out_of = sum(map(int.__mul__, copy.source.strides, index), copy.source.offset)
                runs.append((into, piece.file, piece.offset + out_of * size, run * size))
        for _, file, offset, count in sorted(runs):
            memory = self._mapped[file]
            for start in range(offset, offset + count, BLOCK):
                yield np.frombuffer(memory, np.uint8, min(BLOCK, offset + count - start), start)

    def _pieces(self, found: tuple[int, Copy], info: TensorInfo, box: Extent) -> Iterator[_Piece]:
        number, copy = found
        held = self._held[number][copy.source.key]
        extents = self._extents_of(number, copy.source.key)
        for part in within(copy, "target", info.shape, box.starts, box.shape):
            for extent in extents.touching(*span_of(part.source, part.shape)):
                for inside in within(part, "source", held.shape, extent.starts, extent.shape):
                    yield _Piece(inside, extent.file, extent.offset, held.dtype)

    def _extents_of(self, number: int, key: str) -> Spans[Extent]:
        found = self._extents.get((number, key))
        if found is None:
            shape = self._held[number][key].shape
            extents = self._parts[number][1].extents(key)
            found = self._extents[number, key] = Spans((reach_of(shape, extent), extent) for extent in extents)
        return found


def reach_of(shape: Sequence[int], box: Extent) -> tuple[int, int]:
    """The first flat position of a box in its tensor and the last."""
    first = last = 0
    for size, low, extent in zip(shape, box.starts, box.shape, strict=True):
        first, last = first * size + low, last * size + low + extent - 1
    return first, last


def _made(plans: Sequence[Plan]) -> dict[str, _Made]:
    keys = {key for plan in plans for key in plan.target_tensors}
    written: dict[str, list[tuple[tuple[int, int], tuple[int, Copy]]]] = {key: [] for key in keys}
    second: dict[str, list[tuple[tuple[int, int], tuple[int, Copy]]]] = {key: [] for key in keys}
    filled: dict[str, list[tuple[tuple[int, int], Fill]]] = {key: [] for key in keys}
    for number, plan in enumerate(plans):
        for copy in plan.copies:
            # What an earlier rank holds too is written from there, and must be the same here.
            into = second if copy.kind == "verify" or copy.source_replica else written
            into[copy.target.key].append((span_of(copy.target, copy.shape), (number, copy)))
        for part in plan.fills if number == 0 else ():
            filled[part.region.key].append((span_of(part.region, part.shape), part))
    return {key: _Made(Spans(written[key]), Spans(second[key]), Spans(filled[key])) for key in keys}


def _moves(piece: _Piece, dtype: str) -> bool:
    return piece.dtype == dtype and not piece.copy.shift


def _spans(pieces: list[_Piece]) -> Spans[_Piece]:
    return Spans((span_of(piece.copy.target, piece.copy.shape), piece) for piece in pieces)


def _inside(pieces: Spans[_Piece], elements: int, low: int, block: Bits) -> Iterator[tuple[_Piece, Bits]]:
    """The pieces of a box that touch a block of it, as far as they do, each with where it goes."""
    for piece in pieces.touching(low, low + block.size - 1):
        for copy in within(piece.copy, "target", (elements,), (low,), (block.size,)):
            part = _Piece(copy, piece.file, piece.offset, piece.dtype)
            yield part, _view(block, copy.target.offset, copy.target.strides, copy.shape)


def _view(block: Bits, offset: int, strides: Sequence[int], shape: Sequence[int]) -> Bits:
    return strided(block, block.dtype, offset * block.itemsize, strides, shape)


def _width(shape: Sequence[int], most: int) -> int:
    """Elements of a block: as many whole rows of the box as there is room for, of the outermost dim that fits."""
    row = 1
    for extent in reversed(shape):
        if row * extent > most:
            break
        row *= extent
    return row * max(1, most // row)


def _slabs(values: Bits) -> Iterator[Bits]:
    """The elements, not too many at a time."""
    if values.ndim < 2 or values.nbytes <= BLOCK:
        flat = values.reshape(-1) if values.ndim == 0 else values
        yield from (flat[at : at + BLOCK] for at in range(0, len(flat), BLOCK))
    else:
        for row in values:
            yield from _slabs(row)
