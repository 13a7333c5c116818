"""The grammar of layouts: named axes, products, sums and cuts.

    dims  := expr*                      one expression a tensor dim, outermost first
    expr  := atom ( "/" mesh-dim )?     `/tp`: the part of it that a rank of that mesh dim holds
    atom  := name                       an axis
           | "(" expr+ ")"              a product: row-major, the last factor fastest
           | "[" expr+ "]"              a sum: the parts one after the other

`(group [(rep q) k v] dim)/tp hidden` is Megatron's merged query, key and value: for each group its `rep` query heads,
then one key head, then one value head, cut over tensor parallelism; rows of `hidden` elements.

An expression expands into *boxes*: for each way through its sums one box of global axis indices, together with the
affine map from those indices to a position. Positions are what is stored; indices are what two formats have in common.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from converters.errors import LayoutError, near
from converters.topology import MESH_DIMS, Mesh

TOKEN = re.compile(r"[A-Za-z_]\w*|\S")
CLOSING = {"(": ")", "[": "]"}


@dataclass(frozen=True)
class Axis:
    """A named axis, whole or cut over a mesh dim."""

    name: str
    cut: str | None = None

    def __str__(self) -> str:
        return self.name + _cut_text(self.cut)


@dataclass(frozen=True)
class Product:
    """Factors in row-major order; the size is their product."""

    parts: tuple[Expr, ...]
    cut: str | None = None

    def __str__(self) -> str:
        return f"({' '.join(map(str, self.parts))})" + _cut_text(self.cut)


@dataclass(frozen=True)
class Sum:
    """Parts one after the other; the size is their sum."""

    parts: tuple[Expr, ...]
    cut: str | None = None

    def __str__(self) -> str:
        return f"[{' '.join(map(str, self.parts))}]" + _cut_text(self.cut)


Expr = Axis | Product | Sum


def _cut_text(cut: str | None) -> str:
    return f"/{cut}" if cut else ""


def parse(text: str) -> tuple[Expr, ...]:
    """Read the dims that `text` describes. Joined by spaces, they print as its canonical spelling.

    Raises:
        LayoutError: A bracket that does not match, an empty product or sum, an unknown mesh dim, an axis that one
            element would carry twice, or a mesh dim that would cut one element twice.
    """
    tokens = [(match.group(), match.start()) for match in TOKEN.finditer(text)]
    dims, rest = _parse_sequence(text, tokens, 0, None)
    assert rest == len(tokens)
    for names, cuts in _terms(Product(dims)):
        for what, found in (("axis", names), ("mesh dim", cuts)):
            twice = sorted({name for name in found if found.count(name) > 1})
            if twice:
                raise LayoutError(f"{what} {twice[0]!r} occurs twice in one element of layout {text!r}")
    return dims


def _parse_sequence(
    text: str, tokens: list[tuple[str, int]], position: int, opening: tuple[str, int] | None
) -> tuple[tuple[Expr, ...], int]:
    out: list[Expr] = []
    while position < len(tokens):
        token, at = tokens[position]
        if token in ")]":
            if opening is None or CLOSING[opening[0]] != token:
                raise _syntax(text, at, f"{token!r} closes nothing")
            if not out:
                raise _syntax(text, at, "an empty product or sum")
            return tuple(out), position + 1
        if token == "/":
            if not out or out[-1].cut or position + 1 == len(tokens):
                raise _syntax(text, at, "'/' must stand between one expression and one mesh dim")
            dim, dim_at = tokens[position + 1]
            if dim not in MESH_DIMS:
                raise _syntax(text, dim_at, f"unknown mesh dim {dim!r}, expected one of {', '.join(MESH_DIMS)}")
            out[-1] = replace(out[-1], cut=dim)
            position += 2
        elif token in CLOSING:
            parts, position = _parse_sequence(text, tokens, position + 1, (token, at))
            out.append(Product(parts) if token == "(" else Sum(parts))
        elif token.isidentifier():
            out.append(Axis(token))
            position += 1
        else:
            raise _syntax(text, at, f"unexpected {token!r}")
    if opening is not None:
        raise _syntax(text, opening[1], f"{opening[0]!r} is never closed")
    return tuple(out), position


def _syntax(text: str, at: int, why: str) -> LayoutError:
    return LayoutError(f"{why} in a layout:\n  {text}\n  {' ' * at}^")


def _terms(expr: Expr) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """For each way through the sums of `expr`: the axes met, and the mesh dims that cut on that way."""
    cut = (expr.cut,) if expr.cut else ()
    if isinstance(expr, Axis):
        yield (expr.name,), cut
    elif isinstance(expr, Sum):
        for part in expr.parts:
            for names, cuts in _terms(part):
                yield names, cuts + cut
    else:
        for combination in itertools.product(*(list(_terms(part)) for part in expr.parts)):
            yield sum((names for names, _ in combination), ()), sum((cuts for _, cuts in combination), cut)


def ways(expr: Expr) -> list[tuple[frozenset[str], frozenset[str]]]:
    """For each cell of `expr`, in order of position: the axes that name it, and the mesh dims that cut it."""
    return [(frozenset(names), frozenset(cuts)) for names, cuts in _terms(expr)]


def cells(expr: Expr) -> list[frozenset[str]]:
    """The sets of axes that name the cells of `expr`, in order of position; no sizes needed."""
    return [names for names, _ in ways(expr)]


def cuts(expr: Expr) -> frozenset[str]:
    """The mesh dims that cut `expr` anywhere."""
    return frozenset(cut for _, found in ways(expr) for cut in found)


def size(expr: Expr, sizes: Mapping[str, int], mesh: Mesh | None = None) -> int:
    """Elements of `expr`: as a whole, or as held at one place of a mesh.

    Args:
        expr: The expression.
        sizes: Global size of each axis.
        mesh: The place; `None` is the whole, with every cut ignored.

    Raises:
        LayoutError: An axis without a size, or a size that a cut does not divide.
    """
    if isinstance(expr, Axis):
        if expr.name not in sizes:
            raise LayoutError(f"no size for axis {expr.name!r}{near(expr.name, sizes)}")
        whole = sizes[expr.name]
    elif isinstance(expr, Product):
        whole = math.prod(size(part, sizes, mesh) for part in expr.parts)
    else:
        whole = sum(size(part, sizes, mesh) for part in expr.parts)
    if mesh is None or expr.cut is None:
        return whole
    start, stop = _window(expr, mesh, whole)
    return stop - start


def _window(expr: Expr, mesh: Mesh, whole: int) -> tuple[int, int]:
    assert expr.cut is not None
    try:
        return mesh.window(expr.cut, whole)
    except LayoutError as error:
        raise LayoutError(f"'{expr}': {error}") from None


@dataclass(frozen=True)
class Box:
    """A box of axis indices and where it lies: index `i` is at `offset + sum(strides[a] * i[a])`.

    Attributes:
        offset: Position of the (possibly outlying) element whose indices are all 0.
        strides: Positions between neighbours along each axis of the box.
        ranges: Half-open range of global indices held along each axis.
    """

    offset: int
    strides: Mapping[str, int] = field(default_factory=dict)
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __hash__(self) -> int:
        raise TypeError("a Box holds mappings and is not hashable")

    @property
    def first(self) -> int:
        """Lowest position of the box."""
        return self.offset + sum(self.strides[axis] * start for axis, (start, _) in self.ranges.items())

    @property
    def last(self) -> int:
        """Highest position of the box."""
        return self.offset + sum(self.strides[axis] * (stop - 1) for axis, (_, stop) in self.ranges.items())

    def narrowed(self, axis: str, start: int, stop: int) -> Box:
        """The part of the box with `axis` in `[start, stop)`."""
        return Box(self.offset, self.strides, {**self.ranges, axis: (start, stop)})


def boxes(expr: Expr, sizes: Mapping[str, int], mesh: Mesh | None = None) -> list[Box]:
    """The boxes of `expr` as held at one place of a mesh, in no particular order; empty ones are left out.

    Positions count elements of `expr` from 0 at that place.

    Raises:
        LayoutError: As `size`.
    """
    return [box for box in _boxes(expr, sizes, mesh) if all(stop > start for start, stop in box.ranges.values())]


def _boxes(expr: Expr, sizes: Mapping[str, int], mesh: Mesh | None) -> list[Box]:
    if isinstance(expr, Axis):
        whole = [Box(0, {expr.name: 1}, {expr.name: (0, size(Axis(expr.name), sizes))})]
    elif isinstance(expr, Sum):
        whole, start = [], 0
        for part in expr.parts:
            whole += [Box(box.offset + start, box.strides, box.ranges) for box in boxes(part, sizes, mesh)]
            start += size(part, sizes, mesh)
    else:
        scaled: list[list[Box]] = []
        stride = 1
        for part in reversed(expr.parts):
            scaled.insert(0, _scaled(boxes(part, sizes, mesh), stride))
            stride *= size(part, sizes, mesh)
        whole = [_joined(combination) for combination in itertools.product(*scaled)]
    if mesh is None or expr.cut is None:
        return whole
    start, stop = _window(expr, mesh, size(replace(expr, cut=None), sizes, mesh))
    clipped = [part for box in whole for part in clip(box, start, stop)]
    return [Box(box.offset - start, box.strides, box.ranges) for box in clipped]


def _scaled(found: list[Box], by: int) -> list[Box]:
    return [Box(b.offset * by, {axis: s * by for axis, s in b.strides.items()}, b.ranges) for b in found]


def _joined(factors: tuple[Box, ...]) -> Box:
    strides: dict[str, int] = {}
    ranges: dict[str, tuple[int, int]] = {}
    for box in factors:
        strides |= box.strides
        ranges |= box.ranges
    return Box(sum(box.offset for box in factors), strides, ranges)


def clip(box: Box, start: int, stop: int) -> Iterator[Box]:
    """The parts of `box` whose positions lie in `[start, stop)`, as boxes.

    A window may cut through an axis that is not the outermost (a query group under more tensor-parallel ranks than
    groups): what lies whole in the window stays one box, and each end is taken apart one axis further in.
    """
    if any(high <= low for low, high in box.ranges.values()):
        return
    first, last = box.first, box.last
    if last < start or first >= stop:
        return
    if first >= start and last < stop:
        yield box
        return
    outer = max((a for a, (low, high) in box.ranges.items() if high - low > 1), key=lambda a: box.strides[a])
    stride, (low, high) = box.strides[outer], box.ranges[outer]
    span = last - first - stride * (high - 1 - low)
    # Slab i covers [first + stride * (i - low), + span]: it touches the window, or lies whole in it, between these.
    touch_low = max(low, low - (first + span - start) // stride)
    touch_high = min(high, low + (stop - 1 - first) // stride + 1)
    whole_low = max(low, low - (first - start) // stride)
    whole_high = min(high, low + (stop - 1 - span - first) // stride + 1)
    if whole_low < whole_high:
        yield box.narrowed(outer, whole_low, whole_high)
        partial = (range(touch_low, whole_low), range(whole_high, touch_high))
    else:
        partial = (range(touch_low, touch_high), range(0))
    for index in itertools.chain(*partial):
        yield from clip(box.narrowed(outer, index, index + 1), start, stop)
