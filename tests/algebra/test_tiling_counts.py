"""The tiling check against counting every element."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from index_arrays import positions

from converters.plan import Region
from converters.tiling import Fault, Strided, faults, strided

Box = tuple[int, tuple[int, ...], tuple[int, ...]]


@st.composite
def tilings(draw: st.DrawFn) -> tuple[list[Box], int]:
    """Boxes that tile a range: a row-major box cut again and again along one of its dims."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    strides = tuple(int(np.prod(shape[dim + 1 :])) for dim in range(len(shape)))
    boxes: list[Box] = [(0, strides, shape)]
    for _ in range(draw(st.integers(0, 4))):
        offset, steps, extents = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(extents) - 1))
        at = draw(st.integers(0, extents[dim]))
        sizes = (at, extents[dim] - at)
        for start, size in zip((0, at), sizes, strict=True):
            if size:
                boxes.append((offset + start * steps[dim], steps, (*extents[:dim], size, *extents[dim + 1 :])))
    return draw(st.permutations(boxes)), int(np.prod(shape))


@st.composite
def spoiled(draw: st.DrawFn) -> tuple[list[Box], int]:
    """A tiling with one or two boxes removed, doubled, shifted, stretched or with exchanged strides."""
    boxes, size = draw(tilings())
    for _ in range(draw(st.integers(1, 2))):
        if not boxes:
            break
        at = draw(st.integers(0, len(boxes) - 1))
        offset, strides, shape = boxes[at]
        boxes[at : at + 1] = draw(
            st.sampled_from(
                (
                    [],
                    [boxes[at], boxes[at]],
                    [(max(0, offset + draw(st.integers(-2, 2))), strides, shape)],
                    [(offset, tuple(reversed(strides)), shape)],
                    [(offset, strides, (shape[0] + 1, *shape[1:]))],
                )
            )
        )
    return boxes, size


def counted(boxes: Sequence[Box], size: int) -> np.ndarray:
    """How often each element is covered, those beyond `size` included."""
    found = [positions(Region("", offset, strides), shape).reshape(-1) for offset, strides, shape in boxes]
    return np.bincount(np.concatenate([*found, np.empty(0, int)]).astype(int), minlength=size)


def checked(boxes: Sequence[Box], size: int) -> list[Fault]:
    return faults([strided(*box) for box in boxes], size)


@given(tilings())
@settings(max_examples=150)
def test_a_tiling_has_no_faults(case: tuple[list[Box], int]) -> None:
    assert checked(*case) == []


@given(spoiled())
@settings(max_examples=300)
@example(([(0, (4, 1), (3, 2)), (2, (4, 1), (3, 1))], 12))
@example(([(0, (2,), (4,)), (1, (3,), (2,))], 8))
@example(([(0, (2, 1), (2, 3))], 5))
def test_the_verdict_and_every_named_range_agree_with_counting(case: tuple[list[Box], int]) -> None:
    boxes, size = case
    times = counted(boxes, size)
    found = checked(boxes, size)
    assert bool(found) == bool((times[:size] != 1).any() or len(times) > size)
    inside = [fault for fault in found if fault.stop <= size]
    for fault in inside:
        covered = times[fault.start : fault.stop]
        assert (covered == 0).all() if fault.kind == "hole" else (covered > 1).all()
    holes = sum((fault.stop - fault.start) * fault.times for fault in found if fault.kind == "hole")
    if len(times) == size:
        assert holes == (times == 0).sum()
    wrong = np.flatnonzero(times[:size] != 1)
    if len(wrong):
        assert min(fault.start for fault in found) == wrong[0]


@pytest.mark.parametrize(
    ("boxes", "size", "message"),
    [
        ([(0, (1,), (4,))], 6, "elements [4:6] covered by nothing"),
        ([(2, (1,), (4,))], 6, "elements [0:2] covered by nothing"),
        ([(0, (1,), (4,)), (3, (1,), (3,))], 6, "elements [3:4] covered more than once"),
        ([(0, (1,), (8,))], 6, "elements [6:8] covered more than once"),
        ([(0, (10, 1), (100, 9))], 1000, "elements [9:10] covered by nothing, and 98 more like it"),
    ],
)
def test_a_fault_reads_as_a_sentence(boxes: list[Box], size: int, message: str) -> None:
    assert str(checked(boxes, size)[0]) == message


def test_nothing_tiles_nothing_and_leaves_all_of_something() -> None:
    assert checked([], 0) == []
    assert checked([], 3) == [Fault(0, 3, "hole")]


def test_the_canonical_form_joins_dense_neighbours_whatever_their_order() -> None:
    assert strided(5, (12, 4, 1), (2, 3, 4)) == Strided(5, 24, ())
    assert strided(5, (1, 30, 4), (4, 2, 3)) == Strided(5, 12, ((30, 2),))
    assert strided(0, (2, 8, 100), (4, 5, 1)) == Strided(0, 1, ((2, 20),))


def test_a_column_cut_of_a_million_rows_costs_as_much_as_one_row() -> None:
    rows, width, ranks = 1_000_000, 4096, 8
    boxes = [(rank * width // ranks, (width, 1), (rows, width // ranks)) for rank in range(ranks)]
    assert checked(boxes, rows * width) == []
    (fault, *_) = checked(boxes[:3] + boxes[4:], rows * width)
    assert (fault.start, fault.stop, fault.kind, fault.times) == (1536, 2048, "hole", rows)
