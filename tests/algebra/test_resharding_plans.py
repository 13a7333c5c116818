"""Who sends what to whom, on metadata and on arrays of integers: every element once, from a rank that holds it."""

from __future__ import annotations

import itertools
import math
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from index_arrays import EMPTY, Shards, coded, convert, positions, same
from random_tables import Model, models, topologies
from test_shard_laws import zeros_and_codes
from test_whole_plan_laws import PAIR

from converters.errors import LayoutError, PlanError, TopologyError
from converters.models import FAMILIES
from converters.plan import Plan
from converters.sync.columns import between, by_rows
from converters.sync.resharding import Exchange, Held
from converters.topology import Coord, Topology
from parity.tiny import odd_config, with_layers

TWO = st.tuples(topologies(), topologies())
RESHARDED = TWO.flatmap(lambda pair: st.tuples(st.just(pair), models(pair), st.integers(0, 99)))
ODD = with_layers(odd_config(), 4) | {"intermediate_size": 432}
TIED = ODD | {"tie_word_embeddings": True}
Case = tuple[tuple[Topology, Topology], Model, int]


def placed(here: Topology, there: Topology, seed: int) -> tuple[Held, Held]:
    """Two meshes over ranks that are partly the same, in any order."""
    random, world = Random(seed), range(max(here.world_size, there.world_size) + 2)
    return Held(here, tuple(random.sample(world, here.world_size))), Held(
        there, tuple(random.sample(world, there.world_size))
    )


def carried_out(exchange: Exchange, held: Shards) -> Shards:
    """What every place of the target holds after the moves: each element written once, from where the sender has it."""
    out: Shards = {}
    for place in exchange.target.places():
        part = exchange.writes(place)
        arrays = {key: np.full(math.prod(shape), EMPTY) for key, shape in part.target_tensors.items()}
        for fill in part.fills:
            arrays[fill.region.key][positions(fill.region, fill.shape)] = int(fill.value)
        out[place[1]] = arrays
    for move in exchange.moves:
        into = out[move.receiver[1]][move.copy.target.key]
        at = positions(move.copy.target, move.copy.shape)
        assert (into[at] == EMPTY).all(), f"{move} writes again"
        source = held[move.sender[1]][move.copy.source.key].reshape(-1)
        into[at] = source[positions(move.copy.source, move.copy.shape)] + int(move.copy.shift)
    for place in exchange.target.places():
        shapes = exchange.writes(place).target_tensors
        out[place[1]] = {key: array.reshape(shapes[key]) for key, array in out[place[1]].items()}
    return out


def lacking(exchange: Exchange) -> int:
    """Elements that ranks of the target need and do not hold on the source side: what no exchange could avoid."""
    plan, count = exchange.plan, 0
    for place in exchange.target.places():
        own = [plan.restrict(source=exchange.source.mesh(p)) for p in exchange.source.of(place[0])]
        needed = plan.restrict(target=exchange.target.mesh(place))
        have = {key: np.zeros(math.prod(shape), bool) for key, shape in needed.target_tensors.items()}
        for part in own:
            for copy in part.restrict(target=exchange.target.mesh(place)).copies:
                if copy.kind != "verify":
                    have[copy.target.key][positions(copy.target, copy.shape)] = True
        for fill in needed.fills:
            have[fill.region.key][positions(fill.region, fill.shape)] = True
        count += sum(int((~array).sum()) for array in have.values())
    return count


@given(RESHARDED, PAIR)
@settings(max_examples=25, phases=[Phase.generate])
def test_any_mesh_to_any_mesh_and_back(case: Case, pair: list[str]) -> None:
    """Moved as the plan says, and moved back the same as before; proved, and no element travels that need not."""
    (here, there), model, seed = case
    plan, (source, target) = model.plan(*pair), placed(here, there, seed)
    tensors = zeros_and_codes(model, pair[0])
    start = convert(model.plan(pair[0], pair[0]), {None: tensors}, target=here)
    out, back = Exchange(plan, source, target), Exchange(plan.inverse(), target, source)
    moved = carried_out(out, start)
    straight = convert(plan, {None: tensors}, target=there)
    assert all(same(moved[coord], straight[coord]) for coord in there.shards())
    returned = carried_out(back, moved)
    assert all(same(returned[coord], start[coord]) for coord in here.shards())
    for exchange in (out, back):
        assert exchange.prove().check().holds
        schedule = exchange.schedule(lambda move: 1, 100)
        assert schedule.bytes == lacking(exchange)


def llama(column: str, config: dict[str, Any] = ODD, **padding: int) -> Plan:
    return FAMILIES[0].plan("hf", column, config, **padding)


CASES = {
    "tp2pp2 to tp4": (llama("megatron"), Topology(tp=2, pp=2), llama("megatron"), Topology(tp=4)),
    "vpp to none": (llama("megatron"), Topology(pp=2, vpp=2), llama("megatron"), Topology(tp=2, dp=2)),
    "to te": (llama("megatron"), Topology(tp=2, pp=2), llama("te"), Topology(tp=2)),
    "tied, to later stages": (llama("megatron", TIED), Topology(tp=2), llama("megatron", TIED), Topology(tp=2, pp=2)),
    "tied, from later stages": (llama("megatron", TIED), Topology(pp=2), llama("te", TIED), Topology(tp=2)),
    "local names": (llama("megatron_local"), Topology(pp=4), llama("megatron"), Topology(dp=3)),
}


def padded(plan: Plan, topology: Topology) -> Plan:
    """The plan with the padding that a mesh wants."""
    config = TIED if "tie_word_embeddings" in plan.features else ODD
    groups = (
        topology.query_groups(config["num_key_value_heads"], 3)
        if plan.target != "te"
        else (topology.whole_query_groups(config["num_key_value_heads"]))
    )
    rows = -(-config["vocab_size"] // topology.tp) * topology.tp
    return llama(plan.target, config, padded_vocab_size=rows, padded_query_groups=groups)


@pytest.mark.parametrize("name", CASES)
def test_llama_between_layouts_of_different_padding(name: str) -> None:
    first, here, second, there = CASES[name]
    plan = between(padded(first, here), padded(second, there))
    source, target = Held(here, tuple(range(here.world_size))), Held(there, tuple(range(1, 1 + there.world_size)))
    exchange = Exchange(plan, source, target)
    assert exchange.prove().check().holds
    whole = coded(llama("megatron").source_tensors if "tied" not in name else llama("megatron", TIED).source_tensors)
    start = convert(padded(first, here), {None: whole}, target=here)
    wanted = convert(padded(second, there), {None: whole}, target=there)
    found = carried_out(exchange, start)
    assert all(same(found[coord], wanted[coord]) for coord in there.shards())
    assert exchange.schedule(lambda move: 2, 1 << 20).bytes == 2 * lacking(exchange)


def moved_elements(exchange: Exchange) -> dict[tuple[int, int], int]:
    return dict(exchange.schedule(lambda move: 1, 100).pairs)


def test_replicas_share_the_work() -> None:
    """Each of two copies of the source sends half, and what a rank holds already it takes from itself."""
    plan = between(llama("megatron"), llama("megatron"))
    apart = Exchange(plan, Held(Topology(dp=2), (0, 1)), Held(Topology(dp=2), (2, 3)))
    sent = [sum(n for (sender, _), n in moved_elements(apart).items() if sender == rank) for rank in (0, 1)]
    assert max(sent) < 1.01 * min(sent)
    assert moved_elements(Exchange(plan, Held(Topology(dp=2), (0, 1)), Held(Topology(dp=2), (1, 0)))) == {}


def test_a_holder_of_the_same_machine_is_preferred() -> None:
    plan = between(llama("megatron"), llama("megatron"))
    near = Exchange(plan, Held(Topology(dp=2), (0, 2)), Held(Topology(dp=2), (1, 3)), node=2)
    assert set(moved_elements(near)) == {(0, 1), (2, 3)}


def test_rows_of_hugging_face_tensors() -> None:
    config = ODD | {"vocab_size": 508}
    plan = by_rows(llama("megatron", config).inverse())
    exchange = Exchange(plan, Held(Topology(pp=2), (0, 1)), Held(Topology(tp=2), (0, 1)))
    assert exchange.prove().check().holds
    whole = coded(plan.target_tensors)
    start = convert(llama("megatron", config), {None: whole}, target=Topology(pp=2))
    found = carried_out(exchange, start)
    for key, tensor in whole.items():
        parts = [found[Topology(tp=2).coord(rank)][key] for rank in range(2)]
        assert [len(part) * 2 for part in parts] == [len(tensor)] * 2
        assert np.array_equal(np.concatenate(parts), tensor)
    with pytest.raises(LayoutError, match="does not divide over tp=2"):
        Exchange(by_rows(llama("megatron").inverse()), Held(Topology(), (0,)), Held(Topology(tp=2), (0, 1))).check()
    with pytest.raises(PlanError, match="cut already"):
        by_rows(llama("megatron"))


def test_an_explanation_names_ranks() -> None:
    plan = between(llama("megatron", padded_vocab_size=510), llama("megatron", padded_vocab_size=512))
    exchange = Exchange(plan, Held(Topology(tp=2), (0, 1)), Held(Topology(), (1,)))
    first, second, rows = exchange.explain(1, "embedding.word_embeddings.weight")
    assert first.endswith("from rank 0 (tp=0 pp=0)")
    assert second.endswith("held here")
    assert "= 0" in rows
    with pytest.raises(PlanError, match=r"did you mean 'embedding\.word_embeddings\.weight'"):
        exchange.explain(1, "embedding.word_embedding.weight")
    with pytest.raises(PlanError, match="rank 0 has no chunk 0 of the target"):
        exchange.explain(0, "embedding.word_embeddings.weight")


def test_a_proof_sees_moves_that_are_wrong() -> None:
    plan = between(llama("megatron"), llama("megatron"))
    exchange = Exchange(plan, Held(Topology(pp=2), (0, 1)), Held(Topology(tp=1), (0,)))
    lost, *kept = exchange.moves
    exchange.__dict__["moves"] = tuple(kept)
    assert f"rank 0 (tp=0 pp=0), {lost.copy.target.key}: elements" in "\n".join(exchange.prove().faults)
    exchange.__dict__["moves"] = (lost, lost, *kept)
    assert "covered more than once" in "\n".join(exchange.prove().faults)


def test_steps_fill_whole_tensors() -> None:
    plan = llama("megatron").inverse()
    exchange = Exchange(plan, Held(Topology(tp=1, pp=2), (0, 1)), Held(Topology(dp=2), (1, 2)))
    sizes = {key: math.prod(shape) for key, shape in plan.target_tensors.items()}
    steps = exchange.steps(lambda place, key: sizes[key], 40_000)
    for place in exchange.target.places():
        assert list(itertools.chain.from_iterable(step.keys[place] for step in steps)) == list(sizes)
        for step in steps:
            assert len(step.keys[place]) == 1 or sum(sizes[key] for key in step.keys[place]) <= 40_000
    for step in steps:
        assert all(move.copy.target.key in step.keys[move.receiver] for move in step.moves)
    assert sum(len(step.moves) for step in steps) == len(exchange.moves)


def test_what_does_not_fit_is_refused() -> None:
    plan = between(llama("megatron"), llama("megatron"))
    with pytest.raises(TopologyError, match="tp2-pp1 has 2 places, expected as many different ranks"):
        Held(Topology(tp=2), (0, 0))
    with pytest.raises(TopologyError, match="4 layers do not fit pp=3"):
        Exchange(plan, Held(Topology(pp=3), (0, 1, 2)), Held(Topology(), (0,))).check()
    alone = Held(Topology(), (0,))
    part = plan.restrict(source=alone.mesh((0, Coord())))
    with pytest.raises(PlanError, match="is whole"):
        Exchange(part, alone, alone)
    with pytest.raises(PlanError, match="layer=4 and layer=2"):
        between(llama("megatron"), llama("te", with_layers(ODD, 2)))
    centred = FAMILIES[0].plan("hf", "megatron", ODD, features=frozenset({"layernorm_zero_centered_gamma"}))
    with pytest.raises(PlanError, match="without layernorm_zero_centered_gamma"):
        between(centred, llama("megatron"))
    assert {copy.shift for copy in between(centred, llama("te")).copies} == {0.0, 1.0}
