"""The `te` column: BioNeMo's names and rows, written down a second time, and what it adds to them over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from converters import execute
from converters.errors import CheckpointError
from converters.execute import info_of
from converters.models import family_of
from converters.plan import Plan
from converters.sources import read_config
from converters.tensors import TensorInfo
from converters.topology import Mesh, Topology
from parity.seeded import key_table
from parity.tiny import odd_config, shrink, with_layers

ODD = with_layers(odd_config(), 2) | {"hidden_size": 30, "intermediate_size": 45}
MODELS = {
    "biased": ODD,
    "attention-biased": ODD | {"mlp_bias": False},
    "mlp-biased": ODD | {"attention_bias": False},
    "plain": ODD | {"attention_bias": False, "mlp_bias": False},
    "tied": with_layers(shrink(read_config("meta-llama/Llama-3.2-1B")), 2),
}
Tensors = dict[str, torch.Tensor]


class Held:
    """Tensors in memory as a store."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.held = dict(tensors)

    def tensors(self) -> Mapping[str, TensorInfo]:
        return {key: info_of(tensor) for key, tensor in self.held.items()}

    def tensor(self, key: str) -> torch.Tensor:
        return self.held[key]


def plan(config: dict[str, Any], source: str = "hf", target: str = "te", **options: Any) -> Plan:
    return family_of(config).plan(source, target, config, **options)


def weights(config: dict[str, Any]) -> Tensors:
    """Every element its own number."""
    start, made = 1, {}
    for key, shape in key_table(config).items():
        count = torch.Size(shape).numel()
        made[key] = torch.arange(start, start + count, dtype=torch.float64).reshape(shape)
        start += count
    return made


def run(part: Plan, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    into = Held({key: torch.full(shape, -1.0, dtype=torch.float64) for key, shape in part.target_tensors.items()})
    execute.run(part, Held(tensors), into)
    return into.held


def bionemo(hf: Mapping[str, torch.Tensor], config: dict[str, Any]) -> Tensors:
    """The recipe's state dict. Rows of the merged projection go group by group: query heads, then key, then value.

    Source: NVIDIA/bionemo-framework 3a9d005, bionemo-recipes/models/llama3: the names of the mapping in convert.py, and
        `qkv_weight_interleaved=True` in modeling_llama_te.py.
    """
    groups, dim = config["num_key_value_heads"], config["head_dim"]
    rep = config["num_attention_heads"] // groups
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    out = {"model.embed_tokens.weight": hf["model.embed_tokens.weight"], "model.norm.weight": hf["model.norm.weight"]}
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = hf["lm_head.weight"]

    def merged(layer: str, kind: str) -> torch.Tensor:
        q, k, v = (hf[f"{layer}.self_attn.{name}_proj.{kind}"] for name in "qkv")
        rows = []
        for group in range(groups):
            rows += [q[head * dim : (head + 1) * dim] for head in range(group * rep, (group + 1) * rep)]
            rows += [k[group * dim : (group + 1) * dim], v[group * dim : (group + 1) * dim]]
        return torch.cat(rows)

    zeros = {"qkv": (config["num_attention_heads"] + 2 * groups) * dim, "proj": hidden, "fc1": 2 * ffn, "fc2": hidden}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        attention, mlp = f"{layer}.self_attention", f"{layer}.layernorm_mlp"
        out[f"{attention}.layernorm_qkv.layer_norm_weight"] = hf[f"{layer}.input_layernorm.weight"]
        out[f"{attention}.layernorm_qkv.weight"] = merged(layer, "weight")
        out[f"{attention}.proj.weight"] = hf[f"{layer}.self_attn.o_proj.weight"]
        out[f"{mlp}.layer_norm_weight"] = hf[f"{layer}.post_attention_layernorm.weight"]
        out[f"{mlp}.fc1_weight"] = torch.cat([hf[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up")])
        out[f"{mlp}.fc2_weight"] = hf[f"{layer}.mlp.down_proj.weight"]
        if not (config["attention_bias"] or config["mlp_bias"]):
            continue
        biases = {name: torch.zeros(rows, dtype=torch.float64) for name, rows in zeros.items()}
        if config["attention_bias"]:
            biases |= {"qkv": merged(layer, "bias"), "proj": hf[f"{layer}.self_attn.o_proj.bias"]}
        if config["mlp_bias"]:
            biases["fc1"] = torch.cat([hf[f"{layer}.mlp.{name}_proj.bias"] for name in ("gate", "up")])
            biases["fc2"] = hf[f"{layer}.mlp.down_proj.bias"]
        out[f"{attention}.layernorm_qkv.bias"], out[f"{attention}.proj.bias"] = biases["qkv"], biases["proj"]
        out[f"{mlp}.fc1_bias"], out[f"{mlp}.fc2_bias"] = biases["fc1"], biases["fc2"]
    return out


def same(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    unlike = [key for key, tensor in expected.items() if not torch.equal(actual[key], tensor)]
    assert not unlike


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_in_one_piece_it_is_what_the_recipe_writes(config: dict[str, Any]) -> None:
    hf = weights(config)
    te = run(plan(config), hf)
    same(te, bionemo(hf, config))
    same(run(plan(config, "te", "hf"), te), hf)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_a_published_model_is_proved_over_ranks(tp: int) -> None:
    config, mesh = with_layers(read_config("meta-llama/Llama-3.2-1B"), 2), Topology(tp=tp)
    plan(config).prove(target=mesh).check()
    plan(config, "te", "hf").prove(source=mesh).check()
    plan(config, "te", "megatron").prove(source=mesh, target=mesh).check()


def shard(whole: Tensors, config: dict[str, Any], topology: Topology, rank: int) -> Tensors:
    """What a rank holds, cut by hand from the whole: rows, or the columns of what follows them."""
    tp = topology.tp
    ghosts = topology.whole_query_groups(config["num_key_value_heads"]) - config["num_key_value_heads"]
    dim, rep = config["head_dim"], config["num_attention_heads"] // config["num_key_value_heads"]

    def part(tensor: torch.Tensor, along: int, *, zeros: int = 0, chunks: int = 1) -> torch.Tensor:
        pad = list(tensor.shape)
        pad[along] = zeros
        pieces = torch.cat([tensor, tensor.new_zeros(pad)], along).chunk(chunks, along)
        return torch.cat([piece.chunk(tp, along)[rank] for piece in pieces], along)

    out = {}
    for key, tensor in whole.items():
        if "layernorm_qkv" in key and "layer_norm" not in key:
            out[key] = part(tensor, 0, zeros=ghosts * (rep + 2) * dim)
        elif key.endswith("proj.weight"):
            out[key] = part(tensor, 1, zeros=ghosts * rep * dim)
        elif "fc1" in key:
            out[key] = part(tensor, 0, chunks=2)
        elif key.endswith("fc2_weight"):
            out[key] = part(tensor, 1)
        elif key in ("model.embed_tokens.weight", "lm_head.weight"):
            out[key] = part(tensor, 0, zeros=-tensor.size(0) % tp)
        else:
            out[key] = tensor
    return out


@pytest.mark.parametrize(("name", "tp"), [("biased", 3), ("mlp-biased", 5), ("attention-biased", 3)])
def test_a_rank_holds_what_the_layers_cut(name: str, tp: int) -> None:
    """Three ranks need a ghost group for five; both pad the vocabulary of 509."""
    config, topology = MODELS[name], Topology(tp=tp)
    padded = {"padded_vocab_size": -(-509 // tp) * tp, "padded_query_groups": topology.whole_query_groups(5)}
    there = plan(config, **padded)
    hf = weights(config)
    whole = bionemo(hf, config)
    for rank, coord in enumerate(topology.coords()):
        mesh = Mesh(topology, coord)
        held = run(there.restrict(target=mesh), hf)
        same(held, shard(whole, config, topology, rank))
        folder = plan(config, "te", "te", unpadded="source", **padded)
        same(run(folder.restrict(target=mesh), whole), held)
        assert folder.inverse().target_tensors == {key: tuple(tensor.shape) for key, tensor in whole.items()}
        assert folder.inverse().inverse() == folder
        # And what it holds is all that its part of a Megatron-Core model is made of.
        megatron = run(plan(config, "hf", "megatron", **padded).restrict(target=mesh), hf)
        onward = plan(config, "te", "megatron", **padded).restrict(source=mesh, target=mesh)
        same(run(onward, held), megatron)
        same(run(onward.inverse(), megatron), held)


@pytest.mark.parametrize(
    ("name", "bias"),
    [("mlp-biased", "self_attention.layernorm_qkv.bias"), ("attention-biased", "layernorm_mlp.fc2_bias")],
)
def test_a_bias_that_the_model_lacks_must_be_zero(name: str, bias: str) -> None:
    config = MODELS[name]
    te = run(plan(config), weights(config))
    te[f"model.layers.1.{bias}"][3] = 0.5
    with pytest.raises(CheckpointError, match=rf"model.layers.1.{bias}: 1 of [\d,]+ elements that must be 0 are not"):
        run(plan(config, "te", "hf"), te)


def test_a_stored_copy_of_a_tied_head_is_kept_and_held_against_the_embedding() -> None:
    config, stored = MODELS["tied"], {"features": frozenset({"stored_lm_head"})}
    hf = weights(config)
    hf["lm_head.weight"] = hf["model.embed_tokens.weight"].clone()
    te = run(plan(config, **stored), hf)
    same({"": te["lm_head.weight"]}, {"": hf["lm_head.weight"]})
    same(run(plan(config, "te", "hf", **stored), te), hf)
    assert "lm_head.weight" not in run(plan(config), weights(config))
    hf["lm_head.weight"][7, 7] += 1
    with pytest.raises(CheckpointError, match=r"lm_head.weight is a tied copy .* differs from it \(1 elements\)"):
        run(plan(config, **stored), hf)
    te["lm_head.weight"][7, 7] += 1
    with pytest.raises(CheckpointError, match=r"lm_head.weight is a tied copy .* differs from it \(1 elements\)"):
        run(plan(config, "te", "hf", **stored), te)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is a tied copy .* differs from it \(1 elements\)"):
        run(plan(config, "te", "megatron", **stored), te)


def test_norms_are_centred_on_one_whatever_megatron_has() -> None:
    config, centred = MODELS["biased"], {"features": frozenset({"layernorm_zero_centered_gamma"})}
    hf = weights(config)
    same(run(plan(config, **centred), hf), bionemo(hf, config))
    moved = run(plan(config, "te", "megatron", **centred), bionemo(hf, config))
    assert torch.equal(moved["decoder.final_layernorm.weight"], hf["model.norm.weight"] - 1)
    same(run(plan(config, "megatron", "te", **centred), moved), bionemo(hf, config))


def test_stored_frequencies_are_dropped_for_a_reason() -> None:
    config = MODELS["biased"]
    back = plan(config, "te", "hf", features=frozenset({"stored_te_inv_freq"}))
    assert back.prove().check().dropped.keys() == {"model.rotary_emb.inv_freq"}
    assert back.source_tensors["model.rotary_emb.inv_freq"] == (12,)
    assert "stored_te_inv_freq" in family_of(config).stored("te", ["model.rotary_emb.inv_freq"], tied=False)
