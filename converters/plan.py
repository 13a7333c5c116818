"""A plan: two columns of a table for one model, compiled to strided box copies.

Nothing here knows a direction or a model. The cells of both sides are matched by name, their index ranges intersected,
and each intersection becomes a `Copy` from a region of a source tensor to a region of a target tensor. Swapping the
columns gives the inverse; putting a mesh on a side gives what one rank holds of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from converters.axes import Box
from converters.errors import PlanError, near
from converters.layout import Cell, Layout
from converters.topology import Mesh, Topology
from converters.values import Drop, Shift, Tie

if TYPE_CHECKING:
    from converters.proof import Proof
    from converters.table import Rule, Table

Kind = Literal["move", "tie", "verify"]
Side = Literal["source", "target"]


@dataclass(frozen=True, slots=True)
class Region:
    """A strided box inside one tensor; offset and strides count elements of the flat tensor."""

    key: str
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Copy:
    """One strided box copy.

    Attributes:
        source: Where the elements are read.
        target: Where they are written (or, for a `verify`, what they must equal).
        shape: Extent of each dim of the box, the slowest of the target first.
        axes: The axes that each dim walks, for people.
        rule: The rule that made it.
        kind: `move`: the one place where these elements go. `tie`: a second copy of elements that also move. `verify`:
            a second copy in the source, which must equal what the target already holds.
        shift: Added to every value; 0 keeps every bit.
        source_replica: The same elements are also held at an earlier place of the source mesh.
        target_replica: Likewise for the target mesh.
    """

    source: Region
    target: Region
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    rule: str
    kind: Kind = "move"
    shift: float = 0.0
    source_replica: bool = False
    target_replica: bool = False

    @property
    def elements(self) -> int:
        """Elements moved."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Fill:
    """A region that holds one constant: written in a target, verified in a source."""

    region: Region
    shape: tuple[int, ...]
    value: float
    rule: str
    replica: bool = False

    @property
    def elements(self) -> int:
        """Elements filled."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Piece:
    """A part of one target tensor and what it is made of: a `Copy` or a `Fill`."""

    part: Copy | Fill

    def __str__(self) -> str:
        if isinstance(self.part, Fill):
            where = _region_text(self.part.region, self.part.shape)
            return f"{where} = {self.part.value:g}  ({self.part.rule}: {self.part.elements:,} elements)"
        copy = self.part
        verb = {"move": "<-", "tie": "<- (tied)", "verify": "== (tied)"}[copy.kind]
        shift = f" {copy.shift:+g}" if copy.shift else ""
        walked = " x ".join(f"{name}={n}" for name, n in zip(copy.axes, copy.shape, strict=True)) or "1 element"
        return (
            f"{_region_text(copy.target, copy.shape)} {verb} {copy.source.key} "
            f"{_region_text(copy.source, copy.shape)}{shift}  ({copy.rule}: {walked})"
        )


def _region_text(region: Region, shape: tuple[int, ...]) -> str:
    """`[offset; strides]` in elements, for a dense run just its half-open range."""
    if region.strides in ((), (1,)):
        return f"[{region.offset}:{region.offset + math.prod(shape)}]"
    walk = ", ".join(f"{n}x+{stride}" for n, stride in zip(shape, region.strides, strict=True))
    return f"[{region.offset}: {walk}]"


@dataclass(frozen=True)
class Plan:
    """All copies that turn the tensors of one column into those of another, whole or between places of meshes.

    Attributes:
        table: The model family.
        source: Column that is read.
        target: Column that is written.
        sizes: Size of every axis.
        features: Features of the model.
        source_mesh: The place whose tensors are read; `None` reads whole tensors.
        target_mesh: The place whose tensors are written; `None` writes whole tensors.
        source_padding: Sizes of axes of padding that are not those of `sizes` in what is read. They are in constants
            alone, so the two sides need not agree.
        target_padding: Likewise in what is written.
    """

    table: Table
    source: str
    target: str
    sizes: Mapping[str, int]
    features: frozenset[str]
    source_mesh: Mesh | None = None
    target_mesh: Mesh | None = None
    source_padding: Mapping[str, int] = field(default_factory=dict)
    target_padding: Mapping[str, int] = field(default_factory=dict)

    def inverse(self) -> Plan:
        """The plan that undoes this one: columns and meshes exchanged."""
        return replace(
            self,
            source=self.target,
            target=self.source,
            source_mesh=self.target_mesh,
            target_mesh=self.source_mesh,
            source_padding=self.target_padding,
            target_padding=self.source_padding,
        )

    def restrict(self, *, source: Mesh | None = None, target: Mesh | None = None) -> Plan:
        """What is read at one place of a mesh, or written at one, or both; `None` leaves a side as it is."""
        return replace(self, source_mesh=source or self.source_mesh, target_mesh=target or self.target_mesh)

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that apply to this model."""
        return self.table.active(self.features)

    @cached_property
    def source_tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that is read, dropped ones included."""
        return self._tensors("source")

    @cached_property
    def target_tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that is written."""
        return self._tensors("target", dropped=False)

    @cached_property
    def drops(self) -> dict[str, str]:
        """For each source tensor that goes nowhere, the reason."""
        return {
            key: row.value.reason
            for row in self.rules
            if isinstance(row.value, Drop)
            for layout in self.table.layouts(row, self.source)
            for key in layout.keys(self.sizes, self.source_mesh)
        }

    @cached_property
    def tied(self) -> frozenset[str]:
        """The target tensors whose elements the source, or the target, holds a second time."""
        return frozenset(
            key
            for row in self.rules
            if isinstance(row.value, Tie)
            for layout in self.table.layouts(row, self.target)
            for key in layout.keys(self.sizes, self.target_mesh)
        )

    @cached_property
    def lost(self) -> dict[str, str]:
        """For each tensor that the target format may hold but this plan cannot make, the reason."""
        return self.inverse().drops

    @cached_property
    def copies(self) -> tuple[Copy, ...]:
        """Every copy; those of kind `verify` last, so that what they compare with is in place."""
        found = [copy for row in self.rules for copy in self._copies(row)]
        return tuple(sorted(found, key=lambda copy: copy.kind == "verify"))

    @cached_property
    def fills(self) -> tuple[Fill, ...]:
        """Constants to write into the target."""
        return tuple(self._constants("target"))

    @cached_property
    def constants(self) -> tuple[Fill, ...]:
        """Constants that the source must hold."""
        return tuple(self._constants("source"))

    @property
    def elements(self) -> int:
        """Elements written: moved, tied and filled."""
        written = sum(copy.elements for copy in self.copies if copy.kind != "verify")
        return written + sum(fill.elements for fill in self.fills)

    def prove(self, *, source: Topology | None = None, target: Topology | None = None) -> Proof:
        """Account for every element of both sides, on every rank of a mesh where one is given (see `proof.prove`)."""
        from converters.proof import prove

        return prove(self, source=source, target=target)

    def explain(self, key: str) -> list[Piece]:
        """What target tensor `key` is made of, in order of position.

        Raises:
            PlanError: The plan writes no such tensor.
        """
        if key not in self.target_tensors:
            raise PlanError(f"{self.target} has no tensor {key!r} here{near(key, self.target_tensors)}")
        parts: list[tuple[int, Piece]] = [(c.target.offset, Piece(c)) for c in self.copies if c.target.key == key]
        parts += [(fill.region.offset, Piece(fill)) for fill in self.fills if fill.region.key == key]
        return [piece for _, piece in sorted(parts, key=lambda part: part[0])]

    def origin(self, key: str, position: int) -> tuple[str, int] | float:
        """Where element `position` (of the flat tensor) of target tensor `key` comes from.

        Returns:
            The source tensor and the flat position in it, or the constant that the element is.

        Raises:
            PlanError: The plan writes no such element.
        """
        for piece in self.explain(key):
            part = piece.part
            region = part.region if isinstance(part, Fill) else part.target
            at = _index_in(region, part.shape, position)
            if at is not None and isinstance(part, Fill):
                return part.value
            if at is not None and isinstance(part, Copy):
                steps = zip(part.source.strides, at, strict=True)
                return part.source.key, part.source.offset + sum(stride * index for stride, index in steps)
        raise PlanError(f"{key} has no element {position}, its shape is {list(self.target_tensors[key])}")

    def by_target(self) -> Iterator[tuple[str, list[Copy], list[Fill]]]:
        """Each target tensor with its copies and fills: one destination at a time."""
        copies: dict[str, list[Copy]] = {key: [] for key in self.target_tensors}
        fills: dict[str, list[Fill]] = {key: [] for key in self.target_tensors}
        for copy in self.copies:
            copies[copy.target.key].append(copy)
        for fill in self.fills:
            fills[fill.region.key].append(fill)
        for key in self.target_tensors:
            yield key, copies[key], fills[key]

    def _of(self, side: Side) -> tuple[str, Mapping[str, int], Mesh | None]:
        """Column, sizes and place of a side."""
        if side == "source":
            return self.source, {**self.sizes, **self.source_padding}, self.source_mesh
        return self.target, {**self.sizes, **self.target_padding}, self.target_mesh

    def _tensors(self, side: Side, dropped: bool = True) -> dict[str, tuple[int, ...]]:
        column, sizes, mesh = self._of(side)
        return {
            key: layout.shape(sizes, mesh)
            for row in self.rules
            if dropped or not isinstance(row.value, Drop)
            for layout in self.table.layouts(row, column)
            for key in layout.keys(sizes, mesh)
        }

    def _cells(self, layouts: tuple[Layout, ...], side: Side, constant: bool) -> list[tuple[Layout, Cell]]:
        _, sizes, mesh = self._of(side)
        return [
            (layout, cell)
            for layout in layouts
            for cell in layout.cells(sizes, mesh)
            if bool(cell.name & set(self.table.constants)) == constant
        ]

    def _constants(self, side: Side) -> Iterator[Fill]:
        column, _, mesh = self._of(side)
        for row in self.rules:
            if isinstance(row.value, Tie) and not self._on(row.value.column, column):
                continue  # the other side of a tie is another rule's tensor, and that rule fills it
            for layout, cell in self._cells(self.table.layouts(row, column), side, constant=True):
                (marker,) = cell.name & set(self.table.constants)
                numbered = {axis for box in cell.fields for axis in box.strides}
                loose = [(axis, range(*cell.ranges[axis])) for axis in sorted(numbered)]
                body = _body(cell.ranges, numbered, cell.tensor.strides)
                strides, _, shape, _ = _merged(body, cell.tensor.strides, cell.tensor.strides, cell.ranges)
                for at in _each(loose):
                    region = Region(_key(layout, cell, at), _offset(cell.tensor, cell.ranges, at), strides)
                    constant = self.table.constants[marker].value
                    yield Fill(region, shape, constant, row.name, layout.replica(mesh))

    def _on(self, column: str, side: str) -> bool:
        """Whether the side `side` of this plan is `column`, or shares its layouts."""
        return column in self.table.resolve(side)

    def _copies(self, row: Rule) -> Iterator[Copy]:
        sources, targets = self.table.layouts(row, self.source), self.table.layouts(row, self.target)
        if isinstance(row.value, Tie):
            # The second copy is made from where the first is, and held against where the first goes.
            first = self.table.first_copy(row)
            if self._on(row.value.column, self.target):
                yield from self._pairs(row.name, self.table.layouts(first, self.source), targets, kind="tie")
            if self._on(row.value.column, self.source):
                yield from self._pairs(row.name, sources, self.table.layouts(first, self.target), kind="verify")
        elif isinstance(row.value, Shift):
            stored = [row.value.by * self._on(row.value.column, side) for side in (self.target, self.source)]
            yield from self._pairs(row.name, sources, targets, shift=stored[0] - stored[1])
        else:
            yield from self._pairs(row.name, sources, targets)

    def _pairs(
        self,
        rule: str,
        source_layouts: tuple[Layout, ...],
        target_layouts: tuple[Layout, ...],
        *,
        kind: Kind = "move",
        shift: float = 0.0,
    ) -> Iterator[Copy]:
        """The copies between all cells of equal names."""
        sources: dict[frozenset[str], list[tuple[Layout, Cell]]] = {}
        for layout, cell in self._cells(source_layouts, "source", constant=False):
            sources.setdefault(cell.name, []).append((layout, cell))
        for into, target in self._cells(target_layouts, "target", constant=False):
            for out_of, source in sources.get(target.name, ()):
                ranges = _intersection(source.ranges, target.ranges)
                if ranges is None:
                    continue
                numbered = {axis for box in (*source.fields, *target.fields) for axis in box.strides}
                loose = [(axis, range(*ranges[axis])) for axis in sorted(numbered)]
                body = _body(ranges, numbered, target.tensor.strides)
                read, written, shape, names = _merged(body, source.tensor.strides, target.tensor.strides, ranges)
                replicas = out_of.replica(self.source_mesh), into.replica(self.target_mesh)
                for at in _each(loose):
                    yield Copy(
                        Region(_key(out_of, source, at), _offset(source.tensor, ranges, at), read),
                        Region(_key(into, target, at), _offset(target.tensor, ranges, at), written),
                        shape,
                        names,
                        rule,
                        kind,
                        shift,
                        *replicas,
                    )


Ranges = Mapping[str, tuple[int, int]]


def _index_in(region: Region, shape: tuple[int, ...], position: int) -> tuple[int, ...] | None:
    """The index of a flat position inside a strided box, or `None` where it lies outside or between its elements."""
    rest, index = position - region.offset, []
    for stride, extent in zip(region.strides, shape, strict=True):
        at = min(rest // stride, extent - 1)
        if at < 0:
            return None
        index.append(at)
        rest -= at * stride
    return tuple(index) if rest == 0 else None


def _intersection(left: Ranges, right: Ranges) -> dict[str, tuple[int, int]] | None:
    """The index ranges that both boxes hold, or `None`."""
    both = {axis: (max(left[axis][0], right[axis][0]), min(left[axis][1], right[axis][1])) for axis in left}
    return both if all(start < stop for start, stop in both.values()) else None


def _each(loose: list[tuple[str, range]]) -> Iterator[dict[str, int]]:
    """Every choice of an index for each axis that numbers a key."""
    names = [axis for axis, _ in loose]
    for at in itertools.product(*(span for _, span in loose)):
        yield dict(zip(names, at, strict=True))


def _body(ranges: Ranges, numbered: set[str], strides: Mapping[str, int]) -> list[str]:
    """The axes that a copy walks inside its tensors, the slowest first."""
    walked = [axis for axis, (start, stop) in ranges.items() if axis not in numbered and stop - start > 1]
    return sorted(walked, key=lambda axis: -strides[axis])


def _merged(
    body: list[str], source: Mapping[str, int], target: Mapping[str, int], ranges: Ranges
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[str, ...]]:
    """Strides, extents and names of the dims of a copy, neighbours joined where both sides are dense across them."""
    dims: list[tuple[int, int, int, str]] = []
    for axis in reversed(body):
        extent = ranges[axis][1] - ranges[axis][0]
        read, written = source[axis], target[axis]
        if dims:
            inner_read, inner_written, inner_extent, inner_name = dims[-1]
            if read == inner_read * inner_extent and written == inner_written * inner_extent:
                dims[-1] = (inner_read, inner_written, inner_extent * extent, f"{axis}*{inner_name}")
                continue
        dims.append((read, written, extent, axis))
    dims.reverse()
    columns = list(zip(*dims, strict=True)) or [(), (), (), ()]
    return columns[0], columns[1], columns[2], columns[3]


def _key(layout: Layout, cell: Cell, at: Mapping[str, int]) -> str:
    return layout.name(tuple(_position(box, at) for box in cell.fields))


def _position(box: Box, at: Mapping[str, int]) -> int:
    return box.offset + sum(stride * at[axis] for axis, stride in box.strides.items())


def _offset(box: Box, ranges: Ranges, at: Mapping[str, int]) -> int:
    """Flat position of the first element: each axis at its chosen index, or at the start of its range."""
    return box.offset + sum(stride * at.get(axis, ranges[axis][0]) for axis, stride in box.strides.items())
