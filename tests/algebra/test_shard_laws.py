"""Laws of plans between ranks of meshes, on random tables and integer arrays."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from index_arrays import Tensors, coded, convert, positions, run, same
from random_tables import COLUMNS, Model, models, topologies
from test_whole_plan_laws import PAIR, unpadded

from converters.plan import Copy
from converters.topology import Coord, Mesh, Topology

TWO = st.tuples(topologies(), topologies())
CASES = topologies().flatmap(lambda mesh: st.tuples(st.just(mesh), models((mesh,))))
RESHARDED = TWO.flatmap(lambda pair: st.tuples(st.just(pair), models(pair).map(unpadded)))


@given(CASES, PAIR)
@settings(max_examples=20)
def test_every_random_restriction_is_proved_on_either_side(case: tuple[Topology, Model], pair: list[str]) -> None:
    topology, model = case
    plan = model.plan(*pair)
    for sides in ({"source": topology}, {"target": topology}, {"source": topology, "target": topology}):
        proof = plan.prove(**sides)
        assert proof.holds, (sides, proof.faults)
        assert proof.elements == plan.prove().elements


@given(CASES, PAIR)
def test_restrictions_to_all_ranks_partition_the_plan(case: tuple[Topology, Model], pair: list[str]) -> None:
    topology, model = case
    plan = model.plan(*pair)
    reads = {key: np.zeros(math.prod(shape), int) for key, shape in plan.source_tensors.items()}
    held = convert(plan, {None: run(model.plan(pair[0], pair[0]), zeros_and_codes(model, pair[0]))}, target=topology)
    for coord in topology.shards():
        part = plan.restrict(target=Mesh(topology, coord))
        for copy in part.copies:
            np.add.at(reads[copy.source.key], positions(copy.source, copy.shape), not copy.target_replica)
        assert part.target_tensors == {key: array.shape for key, array in held[coord].items()}
    for constant in plan.constants:
        np.add.at(reads[constant.region.key], positions(constant.region, constant.shape), 1)
    assert all((count == 1).all() for count in reads.values())


def zeros_and_codes(model: Model, column: str) -> Tensors:
    """Coded tensors of `column`, zero where constants lie."""
    plan = model.plan(column, column)
    tensors = coded(plan.source_tensors)
    for constant in plan.constants:
        tensors[constant.region.key].reshape(-1)[positions(constant.region, constant.shape)] = int(constant.value)
    return tensors


@given(CASES, PAIR)
def test_scattered_over_ranks_and_gathered_again_is_the_whole(case: tuple[Topology, Model], pair: list[str]) -> None:
    topology, model = case
    plan = model.plan(*pair)
    tensors = zeros_and_codes(model, pair[0])
    scattered = convert(plan, {None: tensors}, target=topology)
    gathered = convert(plan.inverse(), scattered, source=topology)
    assert same(gathered[None], tensors)


@given(RESHARDED, PAIR)
@settings(max_examples=20)
def test_resharding_there_and_back_is_the_identity(
    case: tuple[tuple[Topology, Topology], Model], pair: list[str]
) -> None:
    (here, there), model = case
    plan = model.plan(*pair)
    tensors = coded(plan.source_tensors)
    start = convert(model.plan(pair[0], pair[0]), {None: tensors}, target=here)
    moved = convert(plan, start, source=here, target=there)
    straight = convert(plan, {None: tensors}, target=there)
    assert all(same(moved[coord], straight[coord]) for coord in there.shards())
    back = convert(plan.inverse(), moved, source=there, target=here)
    assert all(same(back[coord], start[coord]) for coord in here.shards())


@given(CASES, PAIR, st.data())
def test_a_restriction_ignores_the_mesh_dims_that_nothing_is_cut_over(
    case: tuple[Topology, Model], pair: list[str], data: st.DataObject
) -> None:
    topology, model = case
    coord = data.draw(st.sampled_from(list(topology.shards())))
    other = data.draw(st.sampled_from(list(topology.shards())))
    for rule in model.table.rules:
        cuts = {dim for layout in rule.columns[pair[1]] for dim in layout.cuts}
        kept = cuts | ({"chunk"} if "pp" in cuts else set())
        moved = replace(other, **{dim: getattr(coord, dim) for dim in kept})
        plan = Model(replace(model.table, rules=(rule,)), model.sizes).plan(*pair)
        here, there = (plan.restrict(target=Mesh(topology, at)) for at in (coord, moved))
        assert here.target_tensors == there.target_tensors
        assert [plain(copy) for copy in here.copies] == [plain(copy) for copy in there.copies]


def plain(copy: Copy) -> Copy:
    """The copy without its replica marks."""
    return replace(copy, source_replica=False, target_replica=False)


@given(CASES)
def test_exactly_one_rank_of_equals_is_no_replica(case: tuple[Topology, Model]) -> None:
    topology, model = case
    for rule in model.table.rules:
        for column in COLUMNS:
            for layout in rule.columns[column]:
                firsts: dict[tuple[int, ...], int] = {}
                for coord in topology.shards():
                    mesh = Mesh(topology, coord)
                    if layout.held(mesh):
                        held = cut_coordinates(layout.cuts, coord)
                        firsts[held] = firsts.get(held, 0) + (not layout.replica(mesh))
                assert set(firsts.values()) == {1}


def cut_coordinates(cuts: frozenset[str], coord: Coord) -> tuple[int, ...]:
    """The part of a place that decides what a layout with `cuts` holds there."""
    return tuple(getattr(coord, dim) for dim in sorted(cuts)) + ((coord.chunk,) if "pp" in cuts else ())


def test_random_models_are_cut_over_every_mesh_dim() -> None:
    """The laws above would be empty if cuts never fitted."""
    seen: set[str] = set()

    @given(CASES)
    @settings(max_examples=60)
    def collect(case: tuple[Topology, Model]) -> None:
        topology, model = case
        for layout in (layout for rule in model.table.rules for column in rule.columns.values() for layout in column):
            sizes = {"tp": topology.tp, "cp": topology.cp, "dp": topology.dp, "ep": topology.ep, "pp": topology.pp}
            seen.update(dim for dim in layout.cuts if {**sizes, "etp": topology.expert_tp}[dim] > 1)

    collect()
    assert seen == {"tp", "cp", "dp", "pp", "ep", "etp"}
