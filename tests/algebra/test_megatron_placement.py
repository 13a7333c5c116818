"""Layer placement against Megatron-Core's rule: written anew from its description, and the functions themselves."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from converters.errors import TopologyError
from converters.topology import Topology

STAGES = ((1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (2, 3), (4, 2))
UNEVEN = ((None, None), (2, None), (None, 2), (2, 4), (1, 1))
COUNTED = ((False, False), (True, False), (False, True), (True, True))
GRID = [
    Topology(pp=pp, vpp=vpp, first_stage_layers=first, last_stage_layers=last, count_embedding=emb, count_loss=loss)
    for (pp, vpp), (first, last), (emb, loss) in itertools.product(STAGES, UNEVEN, COUNTED)
    if not (pp == 2 and vpp > 1 and None not in (first, last))  # refused: Megatron-Core divides by zero there
    if (first is None and last is None) or (pp > 1 and not emb and not loss)
]
LAYERS = range(1, 25)


def expected(topology: Topology, layers: int) -> dict[tuple[int, int], list[int]] | None:
    """The layers of each (stage, chunk), or `None` where they do not divide.

    The model is a row of slots: the embedding where it is counted, the layers, the loss where it is counted. The slots
    are dealt in equal runs to the stages, chunk after chunk; a stage whose layers are set takes its own run.
    """
    slots = ["embedding"] * topology.count_embedding + list(range(layers)) + ["loss"] * topology.count_loss
    runs: list[int | None] = [None] * topology.pp
    if topology.first_stage_layers is not None:
        runs[0] = topology.first_stage_layers
    if topology.last_stage_layers is not None:
        runs[-1] = topology.last_stage_layers
    free = runs.count(None)
    left = len(slots) - sum(run for run in runs if run is not None)
    if left < 0 or (left % free if free else left):
        return None
    filled = [left // free if run is None else run for run in runs]
    if any(run % topology.vpp for run in filled):
        return None
    out, at = {}, 0
    for chunk, stage in itertools.product(range(topology.vpp), range(topology.pp)):
        count = filled[stage] // topology.vpp
        out[stage, chunk] = [slot for slot in slots[at : at + count] if isinstance(slot, int)]
        at += count
    return out


def placed(topology: Topology, layers: int) -> dict[tuple[int, int], list[int]] | None:
    try:
        chunks = topology.placement(layers)
    except TopologyError:
        return None
    return {(chunk.pp, chunk.chunk): list(range(chunk.start, chunk.stop)) for chunk in chunks}


@pytest.mark.parametrize("topology", GRID, ids=lambda t: f"{t}-{t.first_stage_layers}-{t.last_stage_layers}")
def test_the_placement_follows_the_rule(topology: Topology) -> None:
    for layers in LAYERS:
        assert placed(topology, layers) == expected(topology, layers), layers


def test_the_grid_has_many_placements() -> None:
    assert sum(placed(topology, layers) is not None for topology, layers in itertools.product(GRID, LAYERS)) > 150


def test_the_placement_is_what_megatron_core_computes() -> None:
    block = pytest.importorskip("megatron.core.transformer.transformer_block", reason="megatron-core is not installed")
    layer = pytest.importorskip("megatron.core.transformer.transformer_layer")
    compared = 0
    for topology, layers in itertools.product(GRID, LAYERS):
        found = placed(topology, layers)
        if found is None:
            continue
        config = SimpleNamespace(
            num_layers=layers,
            pipeline_model_parallel_size=topology.pp,
            virtual_pipeline_model_parallel_size=topology.vpp if topology.vpp > 1 else None,
            pipeline_model_parallel_layout=None,
            num_layers_in_first_pipeline_stage=topology.first_stage_layers,
            num_layers_in_last_pipeline_stage=topology.last_stage_layers,
            account_for_embedding_in_pipeline_split=topology.count_embedding,
            account_for_loss_in_pipeline_split=topology.count_loss,
        )
        for (pp, chunk), held in found.items():
            stage = chunk if topology.vpp > 1 else None
            count = block.get_num_layers_to_build(config, vp_stage=stage, pp_rank=pp)
            offset = layer.get_transformer_layer_offset(config, vp_stage=stage, pp_rank=pp)
            assert (count, offset if count else None) == (len(held), held[0] if held else None), (topology, layers)
            compared += 1
    assert compared > 300
