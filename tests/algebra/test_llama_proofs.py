"""Every Llama that a config can describe, proved in both directions under many meshes."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_arrays import coded, convert, run, same

from converters.models import llama
from converters.plan import Plan
from converters.topology import Topology

QUANTITIES = {
    **{"num_hidden_layers": 4, "hidden_size": 10, "intermediate_size": 24, "num_key_value_heads": 2},
    **{"padded_query_groups": 2, "num_attention_heads": 8, "head_dim": 6, "rotary_dims": 3},
    **{"vocab_size": 21, "padded_vocab_size": 24},
}
SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "layernorm_zero_centered_gamma")
MODELS = [frozenset(n for n, on in zip(SWITCHES, way, strict=True) if on) for way in product((False, True), repeat=4)]
MESHES = (
    Topology(tp=2, pp=2, vpp=2),
    Topology(tp=4, cp=2),
    Topology(tp=8, dp=2),
    Topology(pp=3, count_embedding=True, count_loss=True),
    Topology(tp=2, pp=3, first_stage_layers=1, last_stage_layers=1),
    Topology(pp=4, tp=3),
)


def plan(source: str, target: str, features: Any = (), **changed: int) -> Plan:
    sizes = llama.TABLE.solve({**QUANTITIES, **changed})
    return llama.TABLE.plan(source, target, sizes=sizes, features=frozenset(features))


def groups(topology: Topology) -> dict[str, int]:
    return {"padded_query_groups": topology.query_groups(2, 4)}


@pytest.mark.parametrize("column", ["megatron", "megatron_local", "te"])
@pytest.mark.parametrize("features", MODELS, ids=lambda f: "-".join(sorted(f)) or "plain")
def test_every_switch_is_proved_in_both_directions(features: frozenset[str], column: str) -> None:
    for mesh in (None, *MESHES[:2], MESHES[3]):
        there = plan("hf", column, features, **(groups(mesh) if mesh else {}))
        forward = there.prove(target=mesh).check()
        backward = there.inverse().prove(source=mesh).check()
        assert forward.elements == backward.elements


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("features", [(), ("tie_word_embeddings", "mlp_bias")], ids=["untied", "tied"])
def test_tensors_survive_the_way_through_the_ranks(features: tuple[str, ...], mesh: Topology) -> None:
    there = plan("hf", "megatron", features, **groups(mesh))
    there.prove(target=mesh).check()
    tensors = coded(there.source_tensors)
    shards = convert(there, {None: tensors}, target=mesh)
    assert same(convert(there.inverse(), shards, source=mesh)[None], tensors)


@pytest.mark.parametrize("features", MODELS, ids=lambda f: "-".join(sorted(f)) or "plain")
def test_te_on_the_way_changes_nothing(features: frozenset[str]) -> None:
    for column in ("megatron", "megatron_local"):
        straight = plan("hf", column, features)
        tensors = coded(straight.source_tensors)
        between = run(plan("hf", "te", features), tensors)
        assert same(run(plan("te", column, features), between), run(straight, tensors))
        assert same(run(plan(column, "te", features), run(straight, tensors)), between)


@st.composite
def quantities(draw: st.DrawFn) -> tuple[dict[str, int], Topology]:
    """The sizes of a model that fits tp, as both Megatron-Core and Transformer Engine can cut it."""
    mesh = Topology(tp=draw(st.sampled_from((1, 2, 4, 8))))
    group, rep, dim = draw(st.integers(1, 5)), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 2))
    vocab = draw(st.integers(1, 11))
    return {
        **{"num_hidden_layers": draw(st.integers(1, 2)), "hidden_size": draw(st.integers(1, 5))},
        **{"intermediate_size": mesh.tp * draw(st.integers(1, 3)), "num_key_value_heads": group},
        **{"padded_query_groups": mesh.whole_query_groups(group), "num_attention_heads": group * rep},
        **{"head_dim": dim, "rotary_dims": dim // 2},
        **{"vocab_size": vocab, "padded_vocab_size": -(-vocab // mesh.tp) * mesh.tp},
    }, mesh


@given(quantities(), st.sampled_from(MODELS))
@settings(max_examples=8, deadline=None)
def test_te_over_ranks_changes_nothing(case: tuple[dict[str, int], Topology], features: frozenset[str]) -> None:
    sizes, mesh = case
    there, onward, straight = (
        plan(source, target, features, **sizes)
        for source, target in (("hf", "te"), ("te", "megatron"), ("hf", "megatron"))
    )
    there.prove(target=mesh).check()
    onward.prove(source=mesh, target=mesh).check()
    tensors = coded(there.source_tensors)
    held = convert(there, {None: tensors}, target=mesh)
    wanted = convert(straight, {None: tensors}, target=mesh)
    moved = convert(onward, held, source=mesh, target=mesh)
    assert all(same(moved[place], wanted[place]) for place in wanted)
    assert same(convert(there.inverse(), held, source=mesh)[None], tensors)


def test_ghost_groups_and_tp_larger_than_the_groups() -> None:
    wide = plan("hf", "megatron").prove(target=Topology(tp=8)).check()
    assert wide.padding == {"embedding.word_embeddings.weight": 30, "output_layer.weight": 30}
    mesh = Topology(tp=3)
    ghosts = plan("hf", "megatron", **groups(mesh))
    assert ghosts.sizes["ghost"] == 1
    padding = ghosts.prove(target=mesh).check().padding
    assert padding["decoder.layers.0.self_attention.linear_qkv.weight"] == 6 * 6 * 10
    assert padding["decoder.layers.3.self_attention.linear_proj.weight"] == 4 * 6 * 10


def test_biases_that_one_format_lacks_are_zeros() -> None:
    proof = plan("hf", "megatron", ("mlp_bias",)).prove().check()
    assert proof.padding["decoder.layers.0.self_attention.linear_qkv.bias"] == 2 * 6 * 6
    assert proof.padding["decoder.layers.0.self_attention.linear_proj.bias"] == 10
    proof = plan("hf", "megatron", ("attention_bias",)).prove().check()
    assert proof.padding["decoder.layers.1.mlp.linear_fc1.bias"] == 48


def test_a_stored_copy_of_the_head_is_verified_and_written_again() -> None:
    there = plan("hf", "megatron", ("tie_word_embeddings", "stored_lm_head"))
    for mesh in (None, Topology(pp=2)):
        assert there.prove(target=mesh).check().tied["stored copy of a tied head"] == 210
        assert there.inverse().prove(source=mesh).check().tied["stored copy of a tied head"] == 210
    tensors = coded(there.source_tensors)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    assert same(run(there.inverse(), run(there, tensors)), tensors)
    tensors["lm_head.weight"][3, 4] += 1
    with pytest.raises(AssertionError, match="differs"):
        run(there, tensors)


def test_stored_frequencies_are_dropped_for_a_reason_and_lost_on_the_way_back() -> None:
    there = plan("hf", "megatron", ("stored_inv_freq",))
    keys = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(4)}
    assert set(there.prove().check().dropped) == keys == set(there.inverse().prove().check().lost)
    assert not keys & set(there.inverse().target_tensors)
    assert "rope_theta" in there.drops[min(keys)]


def test_a_zero_centred_norm_is_shifted_there_and_back() -> None:
    there = plan("hf", "megatron", ("layernorm_zero_centered_gamma",))
    tensors = coded(there.source_tensors)
    moved = run(there, tensors)
    assert (moved["decoder.final_layernorm.weight"] == tensors["model.norm.weight"] - 1).all()
    assert same(run(there.inverse(), moved), tensors)


def test_llama_405b_is_proved_over_256_shards() -> None:
    sizes = {
        **{"num_hidden_layers": 126, "hidden_size": 16384, "intermediate_size": 53248, "num_key_value_heads": 8},
        **{"padded_query_groups": 8, "num_attention_heads": 128, "head_dim": 128, "rotary_dims": 64},
        **{"vocab_size": 128256, "padded_vocab_size": 128256},
    }
    mesh = Topology(tp=8, pp=16, vpp=2).evenly(126)
    assert (mesh.count_embedding, mesh.count_loss) == (True, True)
    proof = plan("hf", "megatron", **sizes).prove(target=mesh).check()
    assert proof.elements == 405_853_388_800
    # the norms of a layer are on every rank of its stage, everything else on one
    norms = (2 * 126 + 1) * 16384
    assert sum(proof.rank_elements) == 405_853_388_800 + 7 * norms
