"""The plain statement: small enough to check by hand, and accepted by the live model wherever layers may be."""

from __future__ import annotations

import pytest
import tiny_llama
import torch
from tiny_llama import Tiny

from converters.errors import CheckpointError, TopologyError
from converters.topology import Coord, Topology
from parity.ranks import Zygote
from parity.statement.weights import expected_shard

ONE = Topology()
TP2 = Topology(tp=2)


def held(tiny: Tiny, topology: Topology) -> dict[str, list[str]]:
    """In a rank: parameter names by model chunk; `build` loads them strictly, shapes compared."""
    chunks, _ = tiny_llama.build(tiny, topology, make_vocab_size_divisible_by=8)
    return {str(index): sorted(name for name, _ in chunk.named_parameters()) for index, chunk in enumerate(chunks)}


@pytest.mark.parametrize(
    ("name", "topology", "layers"),
    [
        ("untied", Topology(pp=2, first_stage_layers=1), [1, 3]),
        ("untied", Topology(pp=2, last_stage_layers=1), [3, 1]),
        ("shallow", Topology(pp=4, count_embedding=True, count_loss=True), [0, 1, 1, 0]),
        ("shallow", Topology(pp=2, vpp=2, count_embedding=True, count_loss=True), [0, 1, 1, 0]),
    ],
    ids=str,
)
def test_uneven_stages_load_into_the_live_model(
    name: str, topology: Topology, layers: list[int], models: dict[str, Tiny], zygote: Zygote
) -> None:
    ranks = zygote.run(held, models[name], topology, world=topology.world_size, coords=topology.coords(), timeout=60)
    found = [ranks[pp][str(chunk)] for chunk in range(topology.vpp) for pp in range(topology.pp)]
    assert [sum(name.endswith("linear_qkv.weight") for name in names) for names in found] == layers
    assert [("embedding.word_embeddings.weight" in names) for names in found] == [True] + [False] * (len(found) - 1)
    assert ["decoder.final_layernorm.weight" in names for names in found] == [False] * (len(found) - 1) + [True]
    assert ["output_layer.weight" in names for names in found] == [False] * (len(found) - 1) + [True]


def test_rows_of_qkv_go_group_by_group(models: dict[str, Tiny]) -> None:
    tiny = models["untied"]
    weights = tiny.weights()
    q, k, v = (weights[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    shards = [
        expected_shard(weights, tiny.config, TP2, Coord(tp=tp))["decoder.layers.1.self_attention.linear_qkv.weight"]
        for tp in range(2)
    ]
    # 8 heads of 16 over 2 groups: each rank has one group, four query heads, then the key, then the value.
    assert torch.equal(shards[1][:64], q[64:])
    assert torch.equal(shards[1][64:80], k[16:])
    assert torch.equal(shards[1][80:], v[16:])
    assert torch.equal(shards[0], torch.cat([q[:64], k[:16], v[:16]]))


def test_gate_and_up_are_cut_before_they_are_joined(models: dict[str, Tiny]) -> None:
    tiny = models["biased"]
    weights = tiny.weights()
    shard = expected_shard(weights, tiny.config, TP2, Coord(tp=1))
    gate, up = (weights[f"model.layers.0.mlp.{name}_proj.bias"] for name in ("gate", "up"))
    assert torch.equal(shard["decoder.layers.0.mlp.linear_fc1.bias"], torch.cat([gate[80:], up[80:]]))
    assert torch.equal(shard["decoder.layers.0.mlp.linear_fc2.bias"], weights["model.layers.0.mlp.down_proj.bias"])


def test_the_vocabulary_ends_in_zero_rows(models: dict[str, Tiny]) -> None:
    tiny = models["tied"]
    weights = tiny.weights()
    shard = expected_shard(
        weights, tiny.config, Topology(tp=2, pp=2), Coord(tp=1, pp=1), make_vocab_size_divisible_by=8
    )
    head = shard["output_layer.weight"]
    assert head.shape == (72, 80)  # 131 rows are padded to 144
    assert torch.equal(head[:59], weights["model.embed_tokens.weight"][72:])
    assert not head[59:].any()


@pytest.mark.parametrize(
    ("name", "given", "zero"),
    [
        (
            "attention-biased",
            ["self_attention.linear_qkv", "self_attention.linear_proj"],
            ["mlp.linear_fc1", "mlp.linear_fc2"],
        ),
        (
            "mlp-biased",
            ["mlp.linear_fc1", "mlp.linear_fc2"],
            ["self_attention.linear_qkv", "self_attention.linear_proj"],
        ),
    ],
)
def test_biases_that_hf_has_not_are_zeros(
    name: str, given: list[str], zero: list[str], models: dict[str, Tiny]
) -> None:
    tiny = models[name]
    shard = expected_shard(tiny.weights(), tiny.config, ONE, Coord())
    assert all(shard[f"decoder.layers.0.{linear}.bias"].any() for linear in given)
    assert not any(shard[f"decoder.layers.0.{linear}.bias"].any() for linear in zero)


def test_norms_of_te_layers_belong_to_the_next_linear(models: dict[str, Tiny]) -> None:
    tiny = models["untied"]
    local, te = (expected_shard(tiny.weights(), tiny.config, ONE, Coord(), spec=spec) for spec in ("local", "te"))
    renamed = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight"}
    renamed["pre_mlp_layernorm.weight"] = "mlp.linear_fc1.layer_norm_weight"
    for name, tensor in local.items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        assert torch.equal(te.pop(name), tensor)
    assert not te


def test_a_missing_weight_is_named(models: dict[str, Tiny]) -> None:
    tiny = models["untied"]
    weights = tiny.weights()
    weights["model.norms.weight"] = weights.pop("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"no place for.*\n.*model\.norms\.weight"):
        expected_shard(weights, tiny.config, ONE, Coord())
    del weights["model.norms.weight"]
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.norm\.weight'"):
        expected_shard(weights, tiny.config, ONE, Coord())


def test_a_dim_that_does_not_divide_is_refused(models: dict[str, Tiny]) -> None:
    tiny = models["untied"]
    with pytest.raises(TopologyError, match="does not divide over tp=3"):
        expected_shard(tiny.weights(), tiny.config, Topology(tp=3), Coord())
