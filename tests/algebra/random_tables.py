"""Random expressions, tables and meshes.

A table is drawn from its cells: each column renders the same cells in its own way, so that columns always convert into
each other, whatever the nesting of products and sums, the split into tensors and the axes that number keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from converters import axes
from converters.axes import Axis, Expr, Product, Sum
from converters.errors import LayoutError, TopologyError
from converters.layout import Layout
from converters.plan import Plan
from converters.table import Rule, Table
from converters.topology import Mesh, Topology
from converters.values import Constant, Shift

COLUMNS = ("a", "b", "c")
Names = frozenset[str]


@dataclass(frozen=True)
class Model:
    """A table with the size of every axis."""

    table: Table
    sizes: dict[str, int]

    def plan(self, source: str, target: str) -> Plan:
        return self.table.plan(source, target, sizes=self.sizes, features=frozenset())


@st.composite
def expressions(draw: st.DrawFn, cuts: Sequence[str] = ()) -> tuple[tuple[Expr, ...], dict[str, int]]:
    """Dims with distinct axes and their sizes (zero to four); where `cuts` are given, some factors are cut."""
    sizes: dict[str, int] = {}

    def tree(depth: int, free: tuple[str, ...]) -> Expr:
        cut = draw(st.sampled_from((None, *free)))
        inner = tuple(dim for dim in free if dim != cut)
        kind = draw(st.sampled_from(("axis", "product", "sum"))) if depth else "axis"
        if kind == "axis":
            name = f"x{len(sizes)}"
            sizes[name] = draw(st.integers(0 if len(sizes) > 1 else 1, 4))
            return Axis(name, cut)
        parts, count = [], draw(st.integers(1, 3))
        for _ in range(count):
            parts.append(tree(depth - 1, inner))
            if kind == "product":  # factors meet in every element, so a mesh dim cuts one of them at most
                inner = tuple(dim for dim in inner if dim not in axes.cuts(parts[-1]))
        return Product(tuple(parts), cut) if kind == "product" else Sum(tuple(parts), cut)

    dims: list[Expr] = []
    free = tuple(cuts)
    for _ in range(draw(st.integers(1, 2))):
        dims.append(tree(2, free))
        free = tuple(dim for dim in free if dim not in axes.cuts(dims[-1]))
    return tuple(dims), sizes


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Small meshes with every parallel dim."""
    tp, cp, dp = draw(st.sampled_from(((1, 1, 1), (2, 1, 1), (3, 1, 1), (4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2))))
    pp, vpp = draw(st.sampled_from(((1, 1), (2, 1), (2, 2), (3, 1))))
    options = [(e, x) for e in (1, 2, 4) for x in (1, 2, 3, 4) if (tp * cp * dp) % (e * x) == 0]
    ep, etp = draw(st.sampled_from(options))
    return Topology(tp=tp, pp=pp, vpp=vpp, cp=cp, dp=dp, ep=ep, etp=etp)


@st.composite
def models(draw: st.DrawFn, meshes: tuple[Topology, ...] = (), shifts: bool = False) -> Model:
    """A table with columns a, b and c of one to three rules; cut so that every mesh of `meshes` fits.

    With `shifts`, column a is shifted against the others.
    """
    sizes: dict[str, int] = {"zero": 1}
    branches: list[str] = []
    rules: list[Rule] = []
    for number in range(draw(st.integers(1, 3))):
        shared = [f"i{number}_{axis}" for axis in range(draw(st.integers(1, 3)))]
        sizes.update({name: draw(st.sampled_from((1, 2, 3, 4, 6))) for name in shared})
        cells = []
        for branch in range(draw(st.integers(1, 3))):
            own = [f"b{number}_{branch}"]
            branches += own
            sizes[own[0]] = 1
            if draw(st.booleans()):
                own.append(f"e{number}_{branch}")
                sizes[own[1]] = draw(st.integers(1, 3))
            cells.append(frozenset((*shared, *own)))
        columns = {name: _column(draw, f"{name}{number}", cells, sizes, meshes) for name in COLUMNS}
        value = Shift("a", draw(st.sampled_from((-1.0, 1.0)))) if shifts else None
        rules.append(Rule(f"rule {number}", columns, (), value))
    table = Table(
        family="random",
        columns=dict.fromkeys(COLUMNS),
        sizes={name: name for name in sizes if name not in branches and name != "zero"},
        branches=tuple(branches),
        constants={"zero": Constant(0.0)},
        rules=tuple(rules),
    )
    return Model(table, sizes)


def _column(
    draw: st.DrawFn, key: str, cells: list[Names], sizes: dict[str, int], meshes: tuple[Topology, ...]
) -> tuple[Layout, ...]:
    out = []
    for number, group in enumerate(_groups(draw, cells, least=1)):
        factors = _factors(draw, group)
        if draw(st.booleans()):
            factors = _padded(draw, factors, f"p{key}_{number}", sizes)
        split = draw(st.integers(0, len(factors) - 1))
        name = f"{key}.{number}" + "".join(f".{{{factor}}}" for factor in factors[:split])
        layout = Layout.parse(f"{name}: " + " ".join(map(str, _grouped(draw, factors[split:]))))
        out.append(_cut(draw, layout, sizes, meshes) if meshes else layout)
    return tuple(out)


def _groups(draw: st.DrawFn, cells: list[Names], least: int) -> list[list[Names]]:
    """The cells in any order, in `least` groups or more."""
    order = draw(st.permutations(cells))
    count = draw(st.integers(least, len(order)))
    edges = [0, *sorted(draw(st.permutations(range(1, len(order))))[: count - 1]), len(order)]
    return [order[start:stop] for start, stop in itertools.pairwise(edges)]


def _factors(draw: st.DrawFn, cells: list[Names]) -> list[Expr]:
    """Factors whose product has exactly these cells."""
    shared = sorted(frozenset.intersection(*cells))
    if len(cells) > 1:
        shared = draw(st.permutations(shared))[: draw(st.integers(0, len(shared)))]
    factors: list[Expr] = [Axis(name) for name in shared]
    if len(cells) > 1:
        rests = [cell - set(shared) for cell in cells]
        factors.append(Sum(tuple(_one(_factors(draw, group)) for group in _groups(draw, rests, least=2))))
    return _grouped(draw, draw(st.permutations(factors)))


def _grouped(draw: st.DrawFn, factors: Sequence[Expr]) -> list[Expr]:
    """The same factors in order, some neighbours in a product of their own."""
    out: list[Expr] = []
    for factor in factors:
        if out and draw(st.integers(0, 2)) == 0:
            out[-1] = Product((out[-1], factor))
        else:
            out.append(factor)
    return out


def _one(factors: list[Expr]) -> Expr:
    return factors[0] if len(factors) == 1 else Product(tuple(factors))


def _padded(draw: st.DrawFn, factors: list[Expr], pad: str, sizes: dict[str, int]) -> list[Expr]:
    """The factors with one of them followed or preceded by zeros."""
    sizes[pad] = draw(st.integers(0, 2))
    at = draw(st.integers(0, len(factors) - 1))
    padding = Product((Axis("zero"), Axis(pad)))
    parts = (factors[at], padding) if draw(st.booleans()) else (padding, factors[at])
    return [*factors[:at], Sum(parts), *factors[at + 1 :]]


def _cut(draw: st.DrawFn, layout: Layout, sizes: dict[str, int], meshes: tuple[Topology, ...]) -> Layout:
    """The layout with cuts that fit every mesh and that every element of it meets."""
    dense = draw(st.booleans())
    for dim in draw(st.permutations(("tp", "cp", "dp", "pp") if dense else ("etp", "ep", "pp")))[:2]:
        spots = [(part, at) for part in ("fields", "dims") for at in range(len(getattr(layout, part)))]
        part, at = draw(st.sampled_from(spots))
        candidate = _with_cut(draw, layout, part, at, dim)
        if candidate is not None and all(_fits(candidate, sizes, mesh) for mesh in meshes):
            layout = candidate
    stage = draw(st.sampled_from((None, None, "first", "last")))
    return layout if "pp" in layout.cuts else replace(layout, stage=stage)


def _with_cut(draw: st.DrawFn, layout: Layout, part: str, at: int, dim: str) -> Layout | None:
    def inside(expr: Any) -> Any:
        if isinstance(expr, Product) and (expr.cut or draw(st.booleans())):
            index = draw(st.integers(0, len(expr.parts) - 1))
            parts = list(expr.parts)
            parts[index] = inside(parts[index])
            return replace(expr, parts=tuple(parts))
        return expr if expr.cut else replace(expr, cut=dim)

    exprs = list(getattr(layout, part))
    exprs[at] = inside(exprs[at])
    fields, dims = (exprs, layout.dims) if part == "fields" else (layout.fields, exprs)
    key = layout.key.split(".{")[0] + "".join(f".{{{field}}}" for field in fields)
    try:
        return Layout.parse(f"{key}: " + " ".join(map(str, dims)))
    except LayoutError:
        return None


def _fits(layout: Layout, sizes: dict[str, int], topology: Topology) -> bool:
    try:
        for coord in topology.shards():
            layout.cells(sizes, Mesh(topology, coord))
    except (LayoutError, TopologyError):
        return False
    return True
