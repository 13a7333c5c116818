"""Topologies: ranks, coordinates, windows, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from random_tables import topologies

from converters.errors import LayoutError, TopologyError
from converters.topology import Coord, Mesh, Topology


@given(topologies())
def test_every_rank_has_its_own_place_in_both_views(topology: Topology) -> None:
    coords = topology.coords()
    assert len(coords) == topology.world_size == topology.tp * topology.pp * topology.cp * topology.dp
    assert len({(c.tp, c.cp, c.dp, c.pp) for c in coords}) == len(coords)
    assert len({(c.etp, c.ep, c.edp, c.pp) for c in coords}) == len(coords)
    shards = list(topology.shards())
    assert len(set(shards)) == len(coords) * topology.vpp
    assert {shard.chunk for shard in topology.chunks_of(coords[-1])} == set(range(topology.vpp))


def test_ranks_are_ordered_tp_cp_dp_pp_and_experts_fold_into_the_same_ranks() -> None:
    topology = Topology(tp=2, cp=2, dp=2, pp=2, ep=2, etp=1)
    assert topology.coord(0) == Coord()
    assert topology.coord(1) == Coord(tp=1, ep=1)
    assert topology.coord(2) == Coord(cp=1, edp=1)
    assert topology.coord(5) == Coord(tp=1, dp=1, ep=1, edp=2)
    assert topology.coord(15) == Coord(tp=1, cp=1, dp=1, pp=1, ep=1, edp=3)
    assert (topology.size("etp"), topology.size("ep"), Topology(tp=4).size("etp")) == (1, 2, 4)


def test_a_place_and_a_topology_print_briefly() -> None:
    assert str(Coord(tp=1, pp=2)) == "tp=1 pp=2"
    assert str(Coord(chunk=1, cp=2, ep=3)) == "tp=0 pp=0 chunk=1 cp=2 ep=3"
    assert str(Topology()) == "tp1-pp1"
    assert str(Topology(tp=4, pp=2, vpp=2, ep=2, etp=2, sp=True)) == "tp4-pp2-vpp2-ep2-etp2-sp"
    assert str(Topology(tp=2, cp=2, etp=2)) == "tp2-pp1-cp2"


def test_stages_are_the_ends_of_the_pipeline() -> None:
    topology = Topology(pp=2, vpp=2)
    held = {
        stage: [(c.pp, c.chunk) for c in topology.shards() if Mesh(topology, c).holds(stage)]
        for stage in ("first", "last", "last-not-first")
    }
    assert held == {"first": [(0, 0)], "last": [(1, 1)], "last-not-first": [(1, 1)]}
    single = Mesh(Topology(), Coord())
    assert [single.holds(stage) for stage in ("first", "last", "last-not-first")] == [True, True, False]


def test_windows_are_even_ranges_and_layers_follow_the_placement() -> None:
    assert [Mesh(Topology(tp=3), Coord(tp=t)).window("tp", 12) for t in range(3)] == [(0, 4), (4, 8), (8, 12)]
    uneven = Topology(pp=3, first_stage_layers=1)
    assert [Mesh(uneven, Coord(pp=p)).window("pp", 7) for p in range(3)] == [(0, 1), (1, 4), (4, 7)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *[({name: 0}, f"{name} must be at least 1, found 0") for name in ("tp", "pp", "vpp", "cp", "ep", "dp")],
        ({"etp": 0}, "expert_tp must be at least 1, found 0"),
        ({"vpp": 2}, "vpp=2 needs pp of at least 2: with one stage there is nothing to interleave"),
        ({"sp": True}, "sequence parallelism needs tp of at least 2"),
        (
            {"pp": 2, "first_stage_layers": 1, "count_loss": True},
            "layers per first or last stage cannot be combined with counting",
        ),
        ({"last_stage_layers": 1}, "layers per first or last stage need pp of at least 2"),
        ({"tp": 2, "ep": 3, "etp": 1}, "ep=3 x etp=1 must divide tp x cp x dp = 2"),
    ],
)
def test_a_topology_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TopologyError) as caught:
        Topology(**fields)
    assert message in str(caught.value)


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    with pytest.raises(TopologyError, match=f"rank {rank} is outside a world of 4"):
        Topology(tp=4).coord(rank)


def test_an_unknown_mesh_dim_and_a_place_off_the_pipeline_are_refused() -> None:
    with pytest.raises(LayoutError, match="unknown mesh dim '/xp', expected one of /tp, /pp, /cp, /ep, /etp, /dp"):
        Topology().size("xp")
    with pytest.raises(TopologyError, match="no pipeline stage at tp=0 pp=3 in tp1-pp2"):
        Mesh(Topology(pp=2), Coord(pp=3)).window("pp", 4)
    with pytest.raises(LayoutError, match="an extent of 5 does not divide over tp=2"):
        Mesh(Topology(tp=2), Coord()).window("tp", 5)


@pytest.mark.parametrize(
    ("topology", "layers", "message"),
    [
        (Topology(pp=4), 6, "6 layers do not fit pp=4 vpp=1: 6 layers do not divide over 4 stages"),
        (
            Topology(pp=4, count_embedding=True, count_loss=True),
            4,
            "4 layers (with the embedding and the loss counted as a layer) do not fit pp=4 vpp=1: 6 layers",
        ),
        (Topology(pp=2, vpp=2), 6, "3 layers of a stage do not divide over vpp=2 chunks"),
        (Topology(pp=3, first_stage_layers=9), 4, "-5 layers do not divide over 2 stages"),
        (Topology(pp=2, first_stage_layers=1, last_stage_layers=1), 3, "1 layers do not divide over 0 stages"),
    ],
)
def test_layers_that_do_not_fit_say_how_they_could(topology: Topology, layers: int, message: str) -> None:
    with pytest.raises(TopologyError) as caught:
        topology.placement(layers)
    assert message in str(caught.value)
    assert "Set the layers of the first or last stage, or count the embedding and the loss" in str(caught.value)


def test_the_even_placement_counts_embedding_and_loss_where_that_helps() -> None:
    assert Topology(pp=2).evenly(4) == Topology(pp=2)
    assert Topology(pp=4).evenly(126) == Topology(pp=4, count_embedding=True, count_loss=True)
    assert Topology(pp=4).evenly(7) in (Topology(pp=4, count_loss=True), Topology(pp=4, count_embedding=True))
    explicit = Topology(pp=3, first_stage_layers=1)
    assert explicit.evenly(5) == explicit
    for hopeless, layers in ((explicit, 4), (Topology(pp=5), 6), (Topology(pp=2, count_loss=True), 4)):
        with pytest.raises(TopologyError, match=f"{layers} layers"):
            hopeless.evenly(layers)


@pytest.mark.parametrize(
    ("tp", "groups", "heads", "expected"),
    [(1, 3, 3, 3), (2, 3, 3, 4), (4, 2, 4, 2), (4, 2, 3, 4), (8, 8, 4, 8), (6, 4, 1, 6), (16, 8, 16, 8)],
)
def test_groups_are_added_until_tp_cuts_them(tp: int, groups: int, heads: int, expected: int) -> None:
    assert Topology(tp=tp).query_groups(groups, heads) == expected
