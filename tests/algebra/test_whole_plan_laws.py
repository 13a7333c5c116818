"""Laws of plans between whole tensors, on random tables and integer arrays."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from index_arrays import Tensors, coded, positions, run, same
from random_tables import COLUMNS, Model, models

PAIR = st.permutations(COLUMNS).map(lambda names: names[:2])


@given(models(), PAIR)
def test_every_random_plan_is_proved(model: Model, pair: list[str]) -> None:
    proof = model.plan(*pair).prove()
    assert proof.holds, proof.faults
    assert proof.elements == model.plan(*reversed(pair)).prove().elements


@given(models(), PAIR)
def test_the_inverse_of_the_inverse_is_the_plan(model: Model, pair: list[str]) -> None:
    plan = model.plan(*pair)
    assert plan.inverse().inverse() == plan
    assert plan.inverse().inverse().copies == plan.copies
    swapped = {(copy.target, copy.source, copy.shape) for copy in plan.copies if len(copy.shape) < 2}
    assert swapped <= {(copy.source, copy.target, copy.shape) for copy in plan.inverse().copies}


def unpadded(model: Model) -> Model:
    """The same model where no format holds constants that another lacks."""
    return replace(model, sizes={name: 0 if name.startswith("p") else size for name, size in model.sizes.items()})


@given(models(shifts=True).map(unpadded), st.sampled_from((["a", "b"], ["c", "a"])))
def test_run_then_run_the_inverse_is_the_identity(model: Model, pair: list[str]) -> None:
    plan = model.plan(*pair)
    tensors = coded(plan.source_tensors)
    assert same(run(plan.inverse(), run(plan, tensors)), tensors)


@given(models(), PAIR)
def test_constants_are_written_forward_and_verified_backward(model: Model, pair: list[str]) -> None:
    plan = model.plan(*pair)
    start = run(replace(plan, source=pair[1], target=pair[0]), run(plan, zero_padded(model, pair[0])))
    assert same(start, zero_padded(model, pair[0]))
    written = [run(plan, zero_padded(model, pair[0]))[fill.region.key].reshape(-1) for fill in plan.fills]
    for fill, array in zip(plan.fills, written, strict=True):
        assert not array[positions(fill.region, fill.shape)].any()


def zero_padded(model: Model, column: str) -> Tensors:
    """Coded tensors of `column` with zeros where its layouts hold constants."""
    other = next(name for name in COLUMNS if name != column)
    plain = unpadded(model).plan(other, other)
    whole = run(unpadded(model).plan(other, other), coded(plain.source_tensors))
    return run(replace(model, sizes={**model.sizes, **only(model, column)}).plan(other, column), whole)


def only(model: Model, column: str) -> dict[str, int]:
    """No padding in any column but `column`."""
    return {name: 0 for name in model.sizes if name.startswith("p") and not name.startswith(f"p{column}")}


@given(models().map(unpadded), st.permutations(COLUMNS))
def test_a_third_format_on_the_way_changes_nothing(model: Model, columns: list[str]) -> None:
    first, between, last = columns
    tensors = coded(model.plan(first, last).source_tensors)
    detour = run(model.plan(between, last), run(model.plan(first, between), tensors))
    assert same(detour, run(model.plan(first, last), tensors))


@given(models(), PAIR)
def test_origin_and_explain_say_where_every_element_came_from(model: Model, pair: list[str]) -> None:
    plan = model.plan(*pair)
    tensors = zero_padded(model, pair[0])
    for key, array in run(plan, tensors).items():
        explained = 0
        for position, value in enumerate(array.reshape(-1)):
            found = plan.origin(key, position)
            expected = found if isinstance(found, float) else tensors[found[0]].reshape(-1)[found[1]]
            assert expected == value
        for piece in plan.explain(key):
            explained += piece.part.elements
        assert explained == array.size


@given(models(), PAIR)
def test_destinations_come_one_at_a_time_with_all_that_fills_them(model: Model, pair: list[str]) -> None:
    plan = model.plan(*pair)
    grouped = list(plan.by_target())
    assert [key for key, _, _ in grouped] == list(plan.target_tensors)
    assert sorted(c.target.key for _, copies, _ in grouped for c in copies) == sorted(c.target.key for c in plan.copies)
    assert all(part.target.key == key for key, copies, _ in grouped for part in copies)
    assert all(part.region.key == key for key, _, fills in grouped for part in fills)
    written = [part.elements for _, copies, _ in grouped for part in copies]
    filled = [part.elements for _, _, fills in grouped for part in fills]
    assert sum(written) + sum(filled) == plan.elements
