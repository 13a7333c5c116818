"""Whether strided boxes tile a tensor: every element covered exactly once, decided without visiting elements.

Boxes that repeat with the same period are checked on one period for all repetitions at once, so that a row-parallel cut
of a matrix with a million rows costs as much as one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal


@dataclass(frozen=True, order=True)
class Fault:
    """Elements `[start, stop)` covered by no box (`hole`), or by more than one (`overlap`).

    `times` counts repetitions of the same fault at a fixed period; the first is given.
    """

    start: int
    stop: int
    kind: Literal["hole", "overlap"]
    times: int = 1

    def __str__(self) -> str:
        what = "covered by nothing" if self.kind == "hole" else "covered more than once"
        again = f", and {self.times - 1:,} more like it" if self.times > 1 else ""
        return f"elements [{self.start}:{self.stop}] {what}{again}"


@dataclass(frozen=True)
class Strided:
    """A box as a dense run that repeats along dims of `(stride, count)`, the widest stride first."""

    start: int
    run: int
    dims: tuple[tuple[int, int], ...]

    @property
    def span(self) -> int:
        """Elements from the first to the last, both included."""
        return self.run + sum(stride * (count - 1) for stride, count in self.dims)

    @property
    def repeats_in_place(self) -> bool:
        """Whether its narrowest stride is zero."""
        return bool(self.dims) and self.dims[-1][0] == 0

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.span

    def slab(self, index: int) -> Strided:
        """The box at `index` of its widest dim."""
        return Strided(self.start + index * self.dims[0][0], self.run, self.dims[1:])

    def slabs(self) -> list[Strided]:
        """The box taken apart along its widest dim."""
        return [self.slab(index) for index in range(self.dims[0][1])]


def strided(offset: int, strides: Sequence[int], shape: Sequence[int]) -> Strided:
    """The box of a region in canonical form: dims sorted, dense neighbours joined into the run."""
    run = 1
    dims: list[tuple[int, int]] = []
    for stride, count in sorted((pair for pair in zip(strides, shape, strict=True) if pair[1] > 1), key=lambda d: d[0]):
        if not dims and stride == run:
            run *= count
        elif dims and stride == dims[-1][0] * dims[-1][1]:
            dims[-1] = (dims[-1][0], dims[-1][1] * count)
        else:
            dims.append((stride, count))
    return Strided(offset, run, tuple(reversed(dims)))


def faults(boxes: Iterable[Strided], size: int) -> list[Fault]:
    """Where `boxes` fail to tile `[0, size)`; empty when every element is covered exactly once."""
    return sorted(_faults(list(boxes), 0, size))


def _faults(boxes: list[Strided], start: int, stop: int) -> list[Fault]:
    # A stride of zero writes the same elements again: so many boxes in the same place.
    boxes = [
        once
        for box in boxes
        for once in ([Strided(box.start, box.run, box.dims[:-1])] * box.dims[-1][1] if box.repeats_in_place else [box])
    ]
    out: list[Fault] = []
    reached = start
    for cluster in _clusters(boxes):
        low, high = min(box.start for box in cluster), max(box.stop for box in cluster)
        if low > reached:
            out.append(Fault(reached, low, "hole"))
        out += _within(cluster, low, high)
        reached = high
    if reached < stop:
        out.append(Fault(reached, stop, "hole"))
    if reached > stop:
        out.append(Fault(stop, reached, "overlap"))  # beyond the end: another tensor's elements
    return out


def _clusters(boxes: list[Strided]) -> list[list[Strided]]:
    """Boxes grouped by overlapping spans, in order."""
    groups: list[list[Strided]] = []
    reached = 0
    for box in sorted(boxes, key=lambda box: box.start):
        if groups and box.start < reached:
            groups[-1].append(box)
        else:
            groups.append([box])
        reached = max(reached, box.stop) if len(groups[-1]) > 1 else box.stop
    return groups


def _within(boxes: list[Strided], low: int, high: int) -> list[Fault]:
    """Faults of boxes whose spans overlap and together reach from `low` to `high`."""
    period = max((box.dims[0][0] for box in boxes if box.dims), default=0)
    if not period:
        return _runs(boxes)
    taken_apart: list[Strided] = []
    edges = {0, -(-(high - low) // period), (high - low) // period}
    for box in boxes:
        begin, end = (box.start - low) // period, -(-(box.stop - low) // period)
        repeats = bool(box.dims) and box.dims[0][0] == period
        within = box.slab(0) if repeats else box
        if repeats and (within.start - low) % period + within.span <= period:
            edges |= {begin, end}
        elif not repeats and (end - begin == 1 or not box.dims):
            edges |= {begin, begin + 1, end - 1, end}
        else:
            taken_apart.append(box)
    if taken_apart:
        rest = [box for box in boxes if box not in taken_apart]
        return _shifted(_faults(rest + [slab for box in taken_apart for slab in box.slabs()], low, high), 1)
    out: list[Fault] = []
    ordered = sorted(edges)
    for begin, end in pairwise(ordered):
        left, right = low + begin * period, min(low + (begin + 1) * period, high)
        active = [part for box in boxes for part in _in_period(box, period, left, right)]
        out += _shifted(_faults(active, left, right), end - begin)
    return out


def _in_period(box: Strided, period: int, left: int, right: int) -> list[Strided]:
    """The part of `box` inside `[left, right)`, which is at most one period long."""
    if box.stop <= left or box.start >= right:
        return []
    if box.dims and box.dims[0][0] == period:
        return [box.slab((left - box.start + period - 1) // period if left > box.start else 0)]
    if box.dims:
        return [box]
    begin, end = max(box.start, left), min(box.stop, right)
    return [Strided(begin, end - begin, ())]


def _runs(boxes: list[Strided]) -> list[Fault]:
    """Faults of overlapping dense runs without gaps between them."""
    out: list[Fault] = []
    reached = boxes[0].start
    for box in sorted(boxes, key=lambda box: box.start):
        if box.start < reached:
            out.append(Fault(box.start, min(reached, box.stop), "overlap"))
        reached = max(reached, box.stop)
    return out


def _shifted(found: list[Fault], times: int) -> list[Fault]:
    return [Fault(f.start, f.stop, f.kind, f.times * times) for f in found]
