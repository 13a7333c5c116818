"""Whether the tensors that plans make are those that a checkpoint holds, element by element, both sides mapped.

It stops at no difference: of each tensor it says how many elements differ, and which are the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from converters.errors import listing
from converters.files.extents import Extent, TensorFiles
from converters.files.gather import Gather, Part
from converters.files.mapped import Bits, Mapped, bits_of, strided
from converters.files.nonfinite import count_nonfinite
from converters.files.workers import Report, Worker, in_threads
from converters.tensors import FLOATS, ITEMSIZE, TensorInfo

Number = float | int
WINDOWS = 8
"""Places of a box that a sample looks at."""


@dataclass(frozen=True, kw_only=True)
class Element:
    """One element that differs.

    Attributes:
        index: In the tensor.
        made: What the plans make of the source; for a dtype that numpy lacks, its bits.
        found: What the other checkpoint holds.
        bits: Of both, as unsigned integers.
    """

    index: tuple[int, ...]
    made: Number
    found: Number
    bits: tuple[int, int] = (0, 0)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One tensor on both sides.

    Attributes:
        key: In the checkpoint that is compared with; of a constant that does not hold, in the source.
        elements: That were compared.
        differing: Of them, those whose bits differ.
        first: The first of those, by index.
        largest: Absolute difference of two of them; infinite where one of two is no finite number, 0 for a dtype that
            numpy lacks.
        nonfinite: NaN and infinite elements that the plans make, and that the other checkpoint holds.
        faults: What is wrong besides: a shape or dtype, a tensor that one side lacks, second copies that differ.
    """

    key: str
    elements: int = 0
    differing: int = 0
    first: tuple[Element, ...] = ()
    largest: float = 0.0
    nonfinite: tuple[int, int] = (0, 0)
    faults: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether nothing was found."""
        return not self.differing and not self.faults


def compare(
    parts: Sequence[Part],
    expected: TensorFiles,
    keys: Sequence[str] | None = None,
    *,
    sample: int | None = None,
    show: int = 8,
    workers: int = 2,
    report: Report | None = None,
) -> Iterator[Comparison]:
    """Compare what plans make with what a checkpoint holds, tensor by tensor.

    Args:
        parts: The plans, towards the column of `expected`, and what they read.
        expected: The other checkpoint.
        keys: Tensors of it; by default all, and those that it lacks.
        sample: Of each box, look at no more than about so many bytes, spread over it.
        show: Elements that are shown of each tensor.
        workers: Threads.
        report: Told of bytes of `expected` as they are compared.

    Yields:
        Each tensor once it is compared; where dtypes differ, what the plans make is rounded first. Constants that the
        source must hold and does not come first.

    Raises:
        CheckpointError: The source does not hold the tensors that a plan reads.
    """
    gather, mapped, held = Gather(parts, cast=True), Mapped(expected.identities), expected.tensors()
    made = {key: shape for plan, _ in parts for key, shape in plan.target_tensors.items()}
    if keys is None:
        yield from (Comparison(key=key, faults=(fault,)) for key, fault in gather.constant_faults())
    left: dict[str, int] = {}
    tasks: list[tuple[str, Extent]] = []
    so_far: dict[str, Comparison] = {}
    for key in sorted(made.keys() | held.keys()) if keys is None else keys:
        faults = _faults(key, made.get(key), held.get(key), gather)
        so_far[key] = Comparison(key=key, faults=tuple(fault for fault, _ in faults))
        if any(fatal for _, fatal in faults):
            yield so_far.pop(key)
            continue
        boxes = [box for extent in expected.extents(key) for box in _looked_at(extent, held[key], sample)]
        left[key] = len(boxes)
        tasks += [(key, box) for box in boxes]
        if not boxes:
            yield so_far.pop(key)

    def look(task: tuple[str, Extent], worker: Worker) -> Comparison:
        key, box = task
        return _compared(gather, mapped, key, held[key], box, worker, show)

    for found in in_threads(tasks, look, workers=workers, report=report):
        so_far[found.key] = _joined(so_far[found.key], found, show)
        left[found.key] -= 1
        if not left[found.key]:
            yield so_far.pop(found.key)
    assert not so_far, listing("tensors that were not compared to their end", so_far)


def _faults(key: str, shape: tuple[int, ...] | None, held: TensorInfo | None, gather: Gather) -> list[tuple[str, bool]]:
    """What keeps the two from being one tensor; with each whether their elements cannot be compared."""
    if held is None:
        return [("the other checkpoint lacks it", True)]
    if shape is None:
        return [("only the other checkpoint has it", True)]
    if shape != held.shape:
        return [(f"shape {list(shape)}, in the other checkpoint {list(held.shape)}", True)]
    return [
        (f"{dtype}, in the other checkpoint {held.dtype}", (dtype in FLOATS) != (held.dtype in FLOATS))
        for dtype in sorted(gather.dtypes(key) - {held.dtype})
    ]


def _looked_at(extent: Extent, info: TensorInfo, sample: int | None) -> list[Extent]:
    """The box, or boxes of it without gaps: at its beginning, at its end, and evenly between."""
    size, elements = ITEMSIZE[info.dtype], math.prod(extent.shape)
    if not elements:
        return []
    if sample is None or elements * size <= sample:
        return [extent]
    room = max(1, sample // (WINDOWS * size))
    row, dim = 1, len(extent.shape)
    while row * extent.shape[dim - 1] <= room:
        dim -= 1
        row *= extent.shape[dim]
    # Windows are some indices of this dim, all of those inside it, and one of each outside it.
    outer, across = extent.shape[: dim - 1], extent.shape[dim - 1]
    count, rows = min(room // row, across), elements // row
    begins = set()
    for window in range(WINDOWS):
        slab, at = divmod((rows - 1) * window // (WINDOWS - 1), across)
        begins.add((slab, min(at, across - count)))
    return [
        replace(
            extent,
            offset=extent.offset + (slab * across + at) * row * size,
            starts=tuple(map(int.__add__, extent.starts, (*_index(slab, outer), at, *[0] * (len(extent.shape) - dim)))),
            shape=(*[1] * len(outer), count, *extent.shape[dim:]),
        )
        for slab, at in sorted(begins)
    ]


def _index(position: int, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(at) for at in np.unravel_index(position, shape)) if shape else ()


def _compared(
    gather: Gather, mapped: Mapped, key: str, info: TensorInfo, box: Extent, worker: Worker, show: int
) -> Comparison:
    """One box of one tensor."""
    dtype = bits_of(info.dtype)
    first: list[Element] = []
    faults: list[str] = []
    at = differing = ours = theirs = 0
    largest = 0.0
    for block in gather.blocks(key, info, box, worker.stage, faults):
        made = block.view(dtype)
        found = strided(mapped[box.file], dtype, box.offset + at * dtype.itemsize, (1,), (made.size,))
        odd = made != found
        if odd.any():
            wrong = np.flatnonzero(odd)
            differing += wrong.size
            largest = max(largest, _largest(made[wrong], found[wrong], info.dtype))
            for where in wrong[: show - len(first)].tolist():
                place = tuple(map(int.__add__, box.starts, _index(at + where, box.shape)))
                values = (number(bits[where : where + 1], info.dtype) for bits in (made, found))
                both = int(made[where]), int(found[where])
                first.append(Element(index=place, made=next(values), found=next(values), bits=both))
        ours += count_nonfinite(block, info.dtype)
        theirs += count_nonfinite(found.view(np.uint8), info.dtype)
        at += made.size
        worker.go_on(block.nbytes)
    return Comparison(
        key=key,
        elements=at,
        differing=differing,
        first=tuple(first),
        largest=largest,
        nonfinite=(ours, theirs),
        faults=tuple(faults),
    )


def _joined(one: Comparison, other: Comparison, show: int) -> Comparison:
    return replace(
        one,
        elements=one.elements + other.elements,
        differing=one.differing + other.differing,
        first=tuple(sorted((*one.first, *other.first), key=lambda element: element.index)[:show]),
        largest=max(one.largest, other.largest),
        nonfinite=(one.nonfinite[0] + other.nonfinite[0], one.nonfinite[1] + other.nonfinite[1]),
        faults=(*one.faults, *(fault for fault in other.faults if fault not in one.faults)),
    )


def _largest(made: Bits, found: Bits, dtype: str) -> float:
    """The largest absolute difference between elements."""
    if dtype in FLOATS and ITEMSIZE[dtype] < 2:
        return 0.0
    ours, theirs = (
        (bits.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else bits.view(dtype)
        for bits in (made, found)
    )
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max()
    return float(apart) if np.isfinite(apart) else math.inf


def number(bits: Bits, dtype: str) -> Number:
    """The value of one element; of a float of eight bits or fewer, the bits."""
    if dtype == "bfloat16":
        return float((bits.astype(np.uint32) << 16).view(np.float32)[0])
    if dtype in ("float64", "float32", "float16"):
        return float(bits.view(dtype)[0])
    if dtype in FLOATS:
        return int(bits[0])
    return int(bits.view(dtype)[0])
