"""Laws of the part of a copy that touches a box: the parts of a tiling are the copy, and either side comes first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_arrays import Array, positions
from random_tables import COLUMNS, Model, models

from converters.plan import Copy, Fill, Region, Side
from converters.walks import Spans, filled_within, span_of, within

Box = tuple[tuple[int, ...], tuple[int, ...]]
PAIR = st.permutations(COLUMNS).map(lambda names: names[:2])


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Boxes that hold every element of a tensor once: a few cuts along any dims, some boxes cut again."""
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 4)) if shape else 0):
        starts, box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, box[dim]))
        boxes.append((starts, (*box[:dim], at, *box[dim + 1 :])))
        low = (*starts[:dim], starts[dim] + at, *starts[dim + 1 :])
        boxes.append((low, (*box[:dim], box[dim] - at, *box[dim + 1 :])))
    return [(starts, box) for starts, box in boxes if math.prod(box)]


@st.composite
def shapes_of(draw: st.DrawFn, elements: int) -> tuple[int, ...]:
    """Any shape with so many elements."""
    dims: list[int] = []
    while elements > 1 and len(dims) < 3 and draw(st.integers(0, 3)):
        factor = draw(st.sampled_from([n for n in range(1, elements + 1) if elements % n == 0]))
        dims.append(factor)
        elements //= factor
    return (*dims, elements)


def moved(copy: Copy) -> dict[int, int]:
    """For each flat position of the target, the one of the source."""
    source, target = (positions(region, copy.shape).reshape(-1) for region in (copy.source, copy.target))
    found = dict(zip(target.tolist(), source.tolist(), strict=True))
    assert len(found) == copy.elements
    return found


def whole_positions(shape: tuple[int, ...], box: Box) -> Array:
    """The flat position in the whole tensor of each element of a box."""
    starts, extents = box
    ranges = tuple(slice(low, low + extent) for low, extent in zip(starts, extents, strict=True))
    return np.arange(math.prod(shape)).reshape(shape)[ranges].reshape(-1)


def parts(copy: Copy, side: Side, shape: tuple[int, ...], tiling: list[Box]) -> Iterator[dict[int, int]]:
    """What each part of `copy` in each box moves, in positions of the whole tensors."""
    for box in tiling:
        at = whole_positions(shape, box)
        for part in within(copy, side, shape, *box):
            region = part.source if side == "source" else part.target
            low, high = span_of(region, part.shape)
            assert 0 <= low <= high < at.size, f"{part} leaves the box"
            if side == "source":
                yield {into: int(at[out_of]) for into, out_of in moved(part).items()}
            else:
                yield {int(at[into]): out_of for into, out_of in moved(part).items()}


def together(found: Iterator[dict[int, int]]) -> dict[int, int]:
    """All of it; no element twice."""
    out: dict[int, int] = {}
    for part in found:
        assert not out.keys() & part.keys(), "an element is moved twice"
        out |= part
    return out


@given(models(), PAIR, st.data())
def test_the_parts_in_a_tiling_are_the_copy(model: Model, pair: list[str], data: st.DataObject) -> None:
    plan = model.plan(*pair)
    for side, shapes in (("source", plan.source_tensors), ("target", plan.target_tensors)):
        tiling = {key: data.draw(tilings(shape)) for key, shape in shapes.items()}
        for copy in plan.copies:
            key = getattr(copy, side).key
            assert together(parts(copy, side, shapes[key], tiling[key])) == moved(copy)  # type: ignore[arg-type]


@given(models(), PAIR, st.data())
def test_it_does_not_matter_which_side_is_cut_first(model: Model, pair: list[str], data: st.DataObject) -> None:
    plan = model.plan(*pair)
    for copy in plan.copies:
        sides: list[tuple[Side, tuple[int, ...], Box]] = []
        for side, shape in (
            ("source", plan.source_tensors[copy.source.key]),
            ("target", plan.target_tensors[copy.target.key]),
        ):
            sides.append((side, shape, data.draw(st.sampled_from(data.draw(tilings(shape))))))  # type: ignore[arg-type]
        one, other = (
            together(
                moved(last)
                for first in within(copy, order[0][0], order[0][1], *order[0][2])
                for last in within(first, order[1][0], order[1][1], *order[1][2])
            )
            for order in (sides, sides[::-1])
        )
        assert one == other


@given(models(), PAIR, st.data())
def test_a_box_is_cut_again_as_a_tensor_of_its_own(model: Model, pair: list[str], data: st.DataObject) -> None:
    plan = model.plan(*pair)
    copy = data.draw(st.sampled_from([*plan.copies]))
    shape = plan.target_tensors[copy.target.key]
    box = data.draw(st.sampled_from(data.draw(tilings(shape))))
    again = (math.prod(box[1]),) if data.draw(st.booleans()) else data.draw(shapes_of(math.prod(box[1])))
    for part in within(copy, "target", shape, *box):
        assert together(parts(part, "target", again, data.draw(tilings(again)))) == moved(part)


@st.composite
def nested_walks(draw: st.DrawFn) -> tuple[Region, tuple[int, ...], int]:
    """A walk whose steps nest with gaps, so that it crosses rows of any shape at any place, and what it fits into."""
    strides: list[int] = []
    extents: list[int] = []
    reach = 1
    for _ in range(draw(st.integers(0, 3))):
        strides.append(reach + draw(st.integers(0, 2)))
        extents.append(draw(st.integers(1, 5)))
        reach = strides[-1] * extents[-1]
    offset = draw(st.integers(0, 5))
    elements = offset + reach + draw(st.integers(0, 5))
    elements += -elements % draw(st.sampled_from((1, 4, 6)))
    return Region("t", offset, tuple(strides[::-1])), tuple(extents[::-1]), elements


@settings(max_examples=200)
@given(nested_walks(), st.data())
def test_a_walk_across_rows_of_any_shape_is_taken_apart(
    walk: tuple[Region, tuple[int, ...], int], data: st.DataObject
) -> None:
    region, extents, elements = walk
    shape = data.draw(shapes_of(elements))
    names = tuple("xyz"[: len(extents)])
    dense = tuple(math.prod(extents[at + 1 :]) for at in range(len(extents)))
    copy = Copy(region, Region("u", 0, dense), extents, names, "random")
    assert together(parts(copy, "source", shape, data.draw(tilings(shape)))) == moved(copy)
    filled: list[int] = []
    for box in data.draw(tilings(shape)):
        at = whole_positions(shape, box)
        for part in filled_within(Fill(region, extents, 0.0, "random"), shape, *box):
            filled += at[positions(part.region, part.shape).reshape(-1)].tolist()
    assert sorted(filled) == sorted(positions(region, extents).reshape(-1).tolist())


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9))), st.integers(0, 40), st.integers(0, 9))
def test_spans_finds_all_that_overlap(spans: list[tuple[int, int]], first: int, length: int) -> None:
    items = [((low, low + more), number) for number, (low, more) in enumerate(spans)]
    found = list(Spans(items).touching(first, first + length))
    assert sorted(found) == [number for (low, high), number in items if low <= first + length and high >= first]


def copy_of(source: tuple[int, tuple[int, ...]], target: tuple[int, tuple[int, ...]], *shape: int) -> Copy:
    return Copy(Region("s", *source), Region("t", *target), shape, tuple("abc"[: len(shape)]), "a rule")


@pytest.mark.parametrize(
    ("copy", "box", "expected"),
    [
        # All rows of one layer: one run.
        (copy_of((0, (1,)), (0, (1,)), 60), ((1, 0, 0), (1, 4, 5)), [(20, (1,), 0, (1,), (20,))]),
        # Two columns of each row of one layer: a walk over four rows.
        (copy_of((0, (1,)), (0, (1,)), 60), ((1, 0, 2), (1, 4, 2)), [(22, (5, 1), 0, (2, 1), (4, 2))]),
        # An interval that begins and ends within a row of the walk: first, middle, last.
        (
            copy_of((100, (10, 1)), (0, (5, 1)), 12, 5),
            ((0, 0, 0), (1, 4, 5)),
            [(100, (10, 1), 0, (5, 1), (4, 5))],
        ),
    ],
)
def test_the_parts_are_as_few_as_can_be(copy: Copy, box: Box, expected: list[Any]) -> None:
    found = [
        (part.source.offset, part.source.strides, part.target.offset, part.target.strides, part.shape)
        for part in within(copy, "target", (3, 4, 5), *box)
    ]
    assert found == expected
