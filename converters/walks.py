"""The part of a strided copy that touches a box of a tensor, so that tensors that lie in pieces can be copied.

A copy walks flat positions of a whole tensor. A file holds boxes of it, each row-major, and only part of the walk lies
in each. `within` finds that part, on either side; applied to one side and then the other it gives copies from a piece
of one file to a piece of another. It looks at extents and strides only, so its cost does not depend on elements.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Generic, NamedTuple, TypeVar

from converters.plan import Copy, Fill, Region, Side

T = TypeVar("T")


class _Dim(NamedTuple):
    """One dim of a walk: the distance of neighbours on the side at hand and on the other, how many, and its name."""

    here: int
    there: int
    extent: int
    name: str


class _Walk(NamedTuple):
    """A copy seen from one side: its first position on both, and its dims, the largest stride of this side first."""

    here: int
    there: int
    dims: tuple[_Dim, ...]

    @property
    def span(self) -> int:
        """Distance from the first position to the last."""
        return sum(dim.here * (dim.extent - 1) for dim in self.dims)

    def part(self, at: int, start: int, stop: int) -> _Walk:
        """What is walked with the index of dim `at` in `[start, stop)`; a dim of one index goes."""
        dim = self.dims[at]
        kept = (dim._replace(extent=stop - start),) if stop - start > 1 else ()
        dims = (*self.dims[:at], *kept, *self.dims[at + 1 :])
        return _Walk(self.here + dim.here * start, self.there + dim.there * start, dims)

    def folded(self, at: int, inner: int) -> _Walk:
        """The same walk with dim `at` as two, the inner one of extent `inner`, which divides it."""
        dim = self.dims[at]
        outer = _Dim(dim.here * inner, dim.there * inner, dim.extent // inner, dim.name)
        parts = tuple(part for part in (outer, dim._replace(extent=inner)) if part.extent > 1)
        dims = (*self.dims[:at], *parts, *self.dims[at + 1 :])
        return self._replace(dims=tuple(sorted(dims, key=lambda part: -part.here)))


def within(copy: Copy, side: Side, shape: Sequence[int], starts: Sequence[int], box: Sequence[int]) -> Iterator[Copy]:
    """The part of `copy` that touches a box of its tensor on one side.

    Args:
        copy: A copy of a plan, or a part of one that this function gave.
        side: The side that the box is of.
        shape: Of the tensor on that side.
        starts: The first index of the box along each dim.
        box: Its shape.

    Yields:
        Copies that together move those elements of `copy` that lie in the box, each once. On `side` their positions
        are relative to the box, row-major within it; on the other side they are what they were.
    """
    here, there = (copy.source, copy.target) if side == "source" else (copy.target, copy.source)
    sizes, lows, extents = _cut_dims(shape, starts, box)
    if len(sizes) == 1:  # an interval: most walks lie in it or outside
        low, high = lows[0], lows[0] + extents[0]
        first, last = span_of(here, copy.shape)
        if last < low or first >= high:
            return
        if first >= low and last < high:
            moved = replace(here, offset=first - low)
            yield replace(copy, source=moved) if side == "source" else replace(copy, target=moved)
            return
    for walk in _inside(_walk(here, there, copy.shape, copy.axes), sizes, lows, extents):
        dims = _merged(sorted(walk.dims, key=lambda dim: -(dim.there if side == "source" else dim.here)))
        near = Region(here.key, walk.here, tuple(dim.here for dim in dims))
        far = Region(there.key, walk.there, tuple(dim.there for dim in dims))
        source, target = (near, far) if side == "source" else (far, near)
        walked, names = tuple(dim.extent for dim in dims), tuple(dim.name for dim in dims)
        yield replace(copy, source=source, target=target, shape=walked, axes=names)


def filled_within(part: Fill, shape: Sequence[int], starts: Sequence[int], box: Sequence[int]) -> Iterator[Fill]:
    """The part of a constant that touches a box of its tensor, with positions relative to it, as `within` does."""
    names = ("",) * len(part.shape)
    for walk in _inside(_walk(part.region, part.region, part.shape, names), *_cut_dims(shape, starts, box)):
        dims = _merged(list(walk.dims))
        region = Region(part.region.key, walk.here, tuple(dim.here for dim in dims))
        yield replace(part, region=region, shape=tuple(dim.extent for dim in dims))


def span_of(region: Region, shape: Sequence[int]) -> tuple[int, int]:
    """The first flat position of a region and the last."""
    steps = zip(region.strides, shape, strict=True)
    return region.offset, region.offset + sum(stride * (extent - 1) for stride, extent in steps)


class Spans(Generic[T]):
    """Things that each reach over an interval of positions, found by what they overlap.

    Finding costs the logarithm of their number and what is found, as long as their intervals are mostly in a row.

    Attributes:
        items: All of them, in order of their first positions.
    """

    def __init__(self, items: Iterable[tuple[tuple[int, int], T]]) -> None:
        ordered = sorted(items, key=lambda item: item[0])
        self.items = [item for _, item in ordered]
        self._firsts = [span[0] for span, _ in ordered]
        self._lasts = [span[1] for span, _ in ordered]
        self._reach = list(itertools.accumulate(self._lasts, max))

    def touching(self, first: int, last: int) -> Iterator[T]:
        """What overlaps the closed interval from `first` to `last`, in order of its own first position."""
        start, stop = bisect_left(self._reach, first), bisect_right(self._firsts, last)
        for at in range(start, stop):
            if self._lasts[at] >= first:
                yield self.items[at]


def _walk(here: Region, there: Region, shape: tuple[int, ...], names: tuple[str, ...]) -> _Walk:
    dims = map(_Dim, here.strides, there.strides, shape, names)
    kept = sorted((dim for dim in dims if dim.extent > 1), key=lambda dim: -dim.here)
    return _Walk(here.offset, there.offset, tuple(kept))


def _cut_dims(
    shape: Sequence[int], starts: Sequence[int], box: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Sizes, starts and extents of the box, dims made one with the dim outside them as long as the box has no gaps."""
    sizes, lows, extents = [1], [0], [1]
    for size, low, extent in zip(shape, starts, box, strict=True):
        if extent == size or extents[-1] == 1:
            sizes[-1], lows[-1], extents[-1] = sizes[-1] * size, lows[-1] * size + low, extents[-1] * extent
        else:
            sizes.append(size)
            lows.append(low)
            extents.append(extent)
    return sizes, lows, extents


def _inside(walk: _Walk, sizes: list[int], lows: list[int], extents: list[int]) -> Iterator[_Walk]:
    """The parts of `walk` in a box, with positions relative to it."""
    step, inner = math.prod(sizes[1:]), math.prod(extents[1:])
    low, high = lows[0] * step, (lows[0] + extents[0]) * step
    for part in _clipped(walk, low, high):
        if len(sizes) == 1:
            yield part._replace(here=part.here - low)
            continue
        for row in _aligned(part._replace(here=part.here - low), step):
            above = [dim._replace(here=dim.here // step * inner) for dim in row.dims if dim.here >= step]
            below = _Walk(row.here % step, row.there, tuple(dim for dim in row.dims if dim.here < step))
            for rest in _inside(below, sizes[1:], lows[1:], extents[1:]):
                yield _Walk(row.here // step * inner + rest.here, rest.there, (*above, *rest.dims))


def _clipped(walk: _Walk, low: int, high: int) -> Iterator[_Walk]:
    """The parts of `walk` with positions in `[low, high)`.

    Whole steps of the outermost dim stay one part; at either end, a step that only touches the interval is taken apart
    one dim further in.
    """
    first, span = walk.here, walk.span
    last = first + span
    if last < low or first >= high:
        return
    if first >= low and last < high:
        yield walk
        return
    stride, _, extent, _ = walk.dims[0]
    rest = span - stride * (extent - 1)
    # Step i covers [first + stride * i, + rest]: it touches the interval, or lies in it, for i between these.
    touch_low, touch_high = max(0, -((first + rest - low) // stride)), min(extent, (high - 1 - first) // stride + 1)
    whole_low, whole_high = max(0, -((first - low) // stride)), min(extent, (high - 1 - rest - first) // stride + 1)
    if whole_low >= whole_high:
        whole_low = whole_high = touch_high
    for at in range(touch_low, whole_low):
        yield from _clipped(walk.part(0, at, at + 1), low, high)
    if whole_low < whole_high:
        yield walk.part(0, whole_low, whole_high)
    for at in range(whole_high, touch_high):
        yield from _clipped(walk.part(0, at, at + 1), low, high)


def _aligned(walk: _Walk, step: int) -> Iterator[_Walk]:
    """Parts of `walk` whose dims either stay within one row of `step` positions or go from row to row."""
    rest = walk.here % step
    odd = [at for at, dim in enumerate(walk.dims) if dim.here > step and dim.here % step]
    if odd:
        for index in range(walk.dims[odd[0]].extent):
            yield from _aligned(walk.part(odd[0], index, index + 1), step)
        return
    below = [at for at, dim in enumerate(walk.dims) if dim.here < step]
    span = sum(walk.dims[at].here * (walk.dims[at].extent - 1) for at in below)
    if rest + span < step:
        yield walk
        return
    at = below[0]
    stride, _, extent, _ = walk.dims[at]
    ahead = -((rest - step) // stride)  # indices that begin in this row
    inner, left = divmod(step, stride)
    head = ahead if rest >= stride else 0
    if not left and extent > inner and extent - head >= inner:
        tail = head + (extent - head) // inner * inner
        if head:
            yield from _aligned(walk.part(at, 0, head), step)
        yield from _aligned(walk.part(at, head, tail).folded(at, inner), step)
        if tail < extent:
            yield from _aligned(walk.part(at, tail, extent), step)
        return
    # Those that begin and end in this row, those that begin in it, and the others.
    clear = max(0, (step - 1 - rest - span + stride * (extent - 1)) // stride + 1)
    ahead = min(ahead, extent)
    if clear:
        yield from _aligned(walk.part(at, 0, clear), step)
    for index in range(clear, ahead):
        yield from _aligned(walk.part(at, index, index + 1), step)
    if ahead < extent:
        yield from _aligned(walk.part(at, ahead, extent), step)


def _merged(dims: list[_Dim]) -> list[_Dim]:
    """The dims, neighbours made one where both sides are dense across them."""
    out: list[_Dim] = []
    for dim in reversed(dims):
        inner = out[-1] if out else None
        if inner and dim.here == inner.here * inner.extent and dim.there == inner.there * inner.extent:
            name = dim.name if dim.name == inner.name else f"{dim.name}*{inner.name}"
            out[-1] = _Dim(inner.here, inner.there, inner.extent * dim.extent, name)
        else:
            out.append(dim)
    return out[::-1]
