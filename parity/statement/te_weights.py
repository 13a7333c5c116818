"""What each rank of a Llama on Transformer Engine's layers must hold, said a second time, plainly.

As `parity.statement.weights`, and like it without the converter's layouts and plans. Names and order of rows are those
of BioNeMo's `NVLlamaForCausalLM` in one piece; over ranks they are cut as Transformer Engine's layers cut them.

Source: NVIDIA/TransformerEngine v2.20.2, transformer_engine/pytorch: attention/multi_head_attention.py
    `MultiheadAttention` (`qkv_weight_interleaved`: for each group its query heads, its key, its value),
    module/layernorm_mlp.py `LayerNormMLP` (rows of fc1: gate, then up), module/linear.py `Linear` (a row-parallel
    layer's bias is whole on every rank); NVIDIA/bionemo-framework, bionemo-recipes/models/llama3/modeling_llama_te.py
    (names).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from converters.topology import Coord, Topology
from parity.statement.weights import Read, check_names, head_dim, merge_qkv, part, vocabulary


def expected_shard(
    hf: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    topology: Topology,
    coord: Coord,
    *,
    vocabulary_rows: int | None = None,
    padded_query_groups: int | None = None,
) -> dict[str, torch.Tensor]:
    """The parameters of the model on the rank at `coord`, by their names.

    Args:
        hf: The HF weights by name. Every one must be used by the config, and every one that it asks for be here.
        config: The HF config as a dict, transformers' defaults filled in.
        topology: The mesh.
        coord: The rank.
        vocabulary_rows: Of this rank, zeros included; `None` is as few as tp needs.
        padded_query_groups: Key-value groups, those of zeros after the model's own included; `None` is the model's own.

    Returns:
        New tensors in the dtypes of `hf`; biases, groups and vocabulary rows that HF has not are zeros.

    Raises:
        CheckpointError: An HF weight is missing, or is of no use under this config.
        TopologyError: A dim does not divide over the ranks.
    """
    weights = Read(hf)
    check_names(hf, config)
    tp, rank = topology.tp, coord.tp
    groups = config.get("num_key_value_heads") or config["num_attention_heads"]
    ghosts = 0 if padded_query_groups is None else padded_query_groups - groups
    rows = vocabulary_rows or 1
    shard = {"model.embed_tokens.weight": vocabulary(weights["model.embed_tokens.weight"], tp, rank, rows)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        attention = _attention(weights, config, prefix + "self_attn.", tp, rank, ghosts)
        mlp = _mlp(weights, config, prefix + "mlp.", tp, rank)
        attention["layernorm_qkv.layer_norm_weight"] = weights[prefix + "input_layernorm.weight"].clone()
        mlp["layer_norm_weight"] = weights[prefix + "post_attention_layernorm.weight"].clone()
        shard |= {f"{prefix}self_attention.{name}": tensor for name, tensor in attention.items()}
        shard |= {f"{prefix}layernorm_mlp.{name}": tensor for name, tensor in mlp.items()}
    shard["model.norm.weight"] = weights["model.norm.weight"].clone()
    if not config["tie_word_embeddings"]:  # a tied head is the embedding: it has no parameter
        shard["lm_head.weight"] = vocabulary(weights["lm_head.weight"], tp, rank, rows)
    return shard


def _attention(
    weights: Mapping[str, torch.Tensor], config: Mapping[str, Any], prefix: str, tp: int, rank: int, ghosts: int
) -> dict[str, torch.Tensor]:
    """Query, key and value, whose rows are cut, and the output, whose columns are."""
    q, k, v, o = (weights[f"{prefix}{name}_proj.weight"] for name in "qkvo")
    # The heads of a ghost are read by columns of zeros, one for each channel of each head.
    columns = o.new_zeros(o.size(0), q.size(0) // (k.size(0) // head_dim(config)) * ghosts)
    out = {
        "layernorm_qkv.weight": part(merge_qkv(q, k, v, config, ghosts), tp, rank, dim=0),
        "proj.weight": part(torch.cat([o, columns], dim=1), tp, rank, dim=1),
    }
    if config["attention_bias"] or config["mlp_bias"]:  # one switch for all four linear layers
        names = [f"{prefix}{name}_proj" for name in "qkvo"]
        q, k, v, o = (_bias(weights, name, there=config["attention_bias"]) for name in names)
        out["layernorm_qkv.bias"] = part(merge_qkv(q, k, v, config, ghosts), tp, rank, dim=0)
        out["proj.bias"] = o
    return out


def _mlp(
    weights: Mapping[str, torch.Tensor], config: Mapping[str, Any], prefix: str, tp: int, rank: int
) -> dict[str, torch.Tensor]:
    """Gate and up, of each of which a rank has its rows, and down, of which it has columns."""
    gate, up, down = (f"{prefix}{name}_proj" for name in ("gate", "up", "down"))
    out = {
        "fc1_weight": torch.cat([part(weights[name + ".weight"], tp, rank, dim=0) for name in (gate, up)]),
        "fc2_weight": part(weights[down + ".weight"], tp, rank, dim=1),
    }
    if config["attention_bias"] or config["mlp_bias"]:
        first = (_bias(weights, name, there=config["mlp_bias"]) for name in (gate, up))
        out["fc1_bias"] = torch.cat([part(bias, tp, rank, dim=0) for bias in first])
        out["fc2_bias"] = _bias(weights, down, there=config["mlp_bias"])
    return out


def _bias(weights: Mapping[str, torch.Tensor], linear: str, *, there: bool) -> torch.Tensor:
    """The bias of a linear layer; zeros where HF has none."""
    return weights[linear + ".bias"].clone() if there else torch.zeros_like(weights[linear + ".weight"][:, 0])
