"""The grammar: what it reads, prints, refuses, and where it puts elements."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from index_arrays import positions
from random_tables import expressions, topologies

from converters import axes
from converters.axes import Axis, Box, Expr, Product, Sum
from converters.errors import LayoutError, TopologyError
from converters.plan import Region
from converters.topology import MESH_DIMS, Coord, Mesh, Topology

DIMS = st.one_of(expressions(), expressions(cuts=MESH_DIMS))


def printed(dims: tuple[Expr, ...]) -> str:
    return " ".join(map(str, dims))


@given(DIMS)
def test_parsing_what_is_printed_gives_the_same_expression(case: tuple[tuple[Expr, ...], dict[str, int]]) -> None:
    dims, _ = case
    assert axes.parse(printed(dims)) == dims
    assert printed(axes.parse(printed(dims))) == printed(dims)


@given(DIMS)
def test_spaces_do_not_matter(case: tuple[tuple[Expr, ...], dict[str, int]]) -> None:
    text = printed(case[0])
    loose = text.replace("(", " ( ").replace("]", " ] ").replace("/", " / ").replace(" ", "\t  ")
    assert axes.parse(loose) == case[0]


def test_an_expression_is_read_as_it_is_meant() -> None:
    group, dim = Axis("group"), Axis("dim")
    merged = Sum((Product((Axis("rep"), Axis("q"))), Axis("k"), Axis("v")))
    assert axes.parse("(group [(rep q) k v] dim)/tp hidden") == (Product((group, merged, dim), "tp"), Axis("hidden"))
    assert axes.parse("") == ()


@given(expressions())
def test_boxes_hold_every_position_exactly_once(case: tuple[tuple[Expr, ...], dict[str, int]]) -> None:
    dims, sizes = case
    expr = Product(dims)
    covered = np.concatenate([box_positions(box) for box in axes.boxes(expr, sizes)] + [np.empty(0, int)])
    assert sorted(covered) == list(range(axes.size(expr, sizes)))
    assert {frozenset(box.ranges) for box in axes.boxes(expr, sizes)} <= set(axes.cells(expr))


def box_positions(box: Box) -> np.ndarray:
    """The positions of a box; its lowest and highest are what `first` and `last` say."""
    shape = tuple(stop - start for start, stop in box.ranges.values())
    first = box.offset + sum(box.strides[axis] * start for axis, (start, _) in box.ranges.items())
    found = positions(Region("", first, tuple(box.strides[axis] for axis in box.ranges)), shape).reshape(-1)
    assert (found.min(), found.max()) == (box.first, box.last)
    return found


def elements(boxes: list[Box]) -> dict[int, tuple[tuple[str, int], ...]]:
    """For each position, the axis indices of the element that lies there."""
    out: dict[int, tuple[tuple[str, int], ...]] = {}
    for box in boxes:
        spans = [range(*box.ranges[axis]) for axis in box.ranges]
        for at in np.ndindex(*(len(span) for span in spans)):
            index = {axis: span[i] for axis, span, i in zip(box.ranges, spans, at, strict=True)}
            place = box.offset + sum(box.strides[axis] * i for axis, i in index.items())
            assert place not in out, f"position {place} twice"
            out[place] = tuple(sorted(index.items()))
    return out


@given(expressions(), st.sampled_from((1, 2, 3, 4, 5, 6)))
def test_windows_that_cut_through_any_axis_concatenate_to_the_whole(
    case: tuple[tuple[Expr, ...], dict[str, int]], tp: int
) -> None:
    dims, sizes = case
    whole = elements(axes.boxes(Product(dims), sizes))
    length = len(whole)
    if length % tp:
        return
    cut = Product(dims, "tp")
    for rank in range(tp):
        part = elements(axes.boxes(cut, sizes, Mesh(Topology(tp=tp), Coord(tp=rank))))
        start = rank * length // tp
        assert part == {place: whole[start + place] for place in range(length // tp)}


@given(st.one_of(expressions(cuts=("tp", "cp", "pp", "dp")), expressions(cuts=("ep", "etp", "pp"))), topologies())
def test_boxes_hold_every_position_of_every_shard_exactly_once(
    case: tuple[tuple[Expr, ...], dict[str, int]], topology: Topology
) -> None:
    dims, sizes = case
    expr = Product(dims)
    union: set[tuple[tuple[str, int], ...]] = set()
    try:
        for coord in topology.shards():
            mesh = Mesh(topology, coord)
            part = elements(axes.boxes(expr, sizes, mesh))
            assert sorted(part) == list(range(axes.size(expr, sizes, mesh)))
            union |= set(part.values())
    except (LayoutError, TopologyError):
        return  # sizes that this mesh does not divide
    assert union == set(elements(axes.boxes(expr, sizes)).values())


def test_a_window_through_inner_axes_is_taken_apart_at_both_ends() -> None:
    (expr,) = axes.parse("(a b c)/tp")
    found = axes.boxes(expr, {"a": 3, "b": 3, "c": 4}, Mesh(Topology(tp=2), Coord(tp=0)))
    assert [dict(box.ranges) for box in found] == [
        {"a": (0, 1), "b": (0, 3), "c": (0, 4)},
        {"a": (1, 2), "b": (0, 1), "c": (0, 4)},
        {"a": (1, 2), "b": (1, 2), "c": (0, 2)},
    ]


def test_cells_and_cuts_need_no_sizes() -> None:
    expr = Product(axes.parse("([a (b c)/cp] d)/tp {}".replace("{}", "e")))
    assert axes.cells(expr) == [frozenset("ade"), frozenset("bcde")]
    assert axes.cuts(expr) == {"tp", "cp"}


def test_a_cut_of_an_empty_axis_is_empty() -> None:
    (expr,) = axes.parse("pad/tp")
    assert axes.boxes(expr, {"pad": 0}, Mesh(Topology(tp=2), Coord(tp=1))) == []


def test_a_box_has_no_hash() -> None:
    with pytest.raises(TypeError, match="holds mappings and is not hashable"):
        hash(Box(0))


@pytest.mark.parametrize(
    ("text", "why", "caret"),
    [
        ("(a b", "'(' is never closed", 0),
        ("a [b (c d)", "'[' is never closed", 2),
        ("a b)", "')' closes nothing", 3),
        ("(a b]", "']' closes nothing", 4),
        ("a ()", "an empty product or sum", 3),
        ("a []/tp", "an empty product or sum", 3),
        ("/tp a", "'/' must stand between one expression and one mesh dim", 0),
        ("a/tp/cp", "'/' must stand between one expression and one mesh dim", 4),
        ("a/", "'/' must stand between one expression and one mesh dim", 1),
        ("(a)/tq b", "unknown mesh dim 'tq', expected one of tp, pp, cp, ep, etp, dp", 4),
        ("a * b", "unexpected '*'", 2),
        ("a 2b", "unexpected '2'", 2),
    ],
)
def test_a_syntax_error_points_at_the_character(text: str, why: str, caret: int) -> None:
    with pytest.raises(LayoutError) as caught:
        axes.parse(text)
    assert str(caught.value) == f"{why} in a layout:\n  {text}\n  {' ' * caret}^"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b a", "axis 'a' occurs twice in one element of layout 'a b a'"),
        ("([x y] b) [c y]", "axis 'y' occurs twice in one element"),
        ("(a b/tp)/tp", "mesh dim 'tp' occurs twice in one element"),
    ],
)
def test_one_element_carries_an_axis_and_a_mesh_dim_once(text: str, message: str) -> None:
    with pytest.raises(LayoutError, match="occurs twice") as caught:
        axes.parse(text)
    assert message in str(caught.value)


def test_branches_of_a_sum_may_share_axes_and_mesh_dims() -> None:
    assert axes.parse("[(x a)/tp (y a)/tp]")


def test_an_axis_without_a_size_is_named_with_its_nearest_kin() -> None:
    with pytest.raises(LayoutError, match=r"no size for axis 'hiden' \(did you mean 'hidden'\?\)"):
        axes.size(Axis("hiden"), {"hidden": 4})


def test_a_size_that_a_cut_does_not_divide_names_expression_and_mesh() -> None:
    (expr,) = axes.parse("(a b)/tp")
    message = r"'\(a b\)/tp': an extent of 15 does not divide over tp=2"
    for ask in (axes.size, axes.boxes):
        with pytest.raises(LayoutError, match=message):
            ask(expr, {"a": 3, "b": 5}, Mesh(Topology(tp=2), Coord()))
