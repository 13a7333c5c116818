"""What each rank of a Megatron-Core Llama must hold, said a second time, plainly.

Nothing here uses the converter's layouts or plans. It was written from Megatron-Core's modules, with loops, `cat` and
`chunk`, so that one can read it beside them, and so that a mistake in the one is not a mistake in the other.

Source: NVIDIA/Megatron-LM core_v0.16.1 and core_v0.19.2 (the same in both), under megatron/core:
    transformer/attention.py `SelfAttention.get_query_key_value_tensors` (rows of linear_qkv),
    transformer/mlp.py `MLP.forward` (halves of linear_fc1),
    tensor_parallel/layers.py `VocabParallelEmbedding`, `ColumnParallelLinear`, `RowParallelLinear` (cuts),
    models/gpt/gpt_model.py `GPTModel.__init__` and
    models/common/language_module/language_module.py `setup_embeddings_and_output_layer` (embedding and head),
    transformer/transformer_block.py `has_final_layernorm_in_this_stage` (final norm).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from converters.errors import CheckpointError, TopologyError, listing, near
from converters.topology import Coord, Topology


class Read(Mapping[str, torch.Tensor]):
    """HF tensors by name; a missing one says so, with the nearest names."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"no tensor {name!r} among the HF weights{near(name, self._tensors)}")
        return self._tensors[name]

    def __iter__(self) -> Any:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def expected_shard(
    hf: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    topology: Topology,
    coord: Coord,
    *,
    make_vocab_size_divisible_by: int = 1,
    padded_query_groups: int | None = None,
    spec: Literal["local", "te"] = "local",
) -> dict[str, torch.Tensor]:
    """The parameters of the model chunk at `coord`, by their names in the live `GPTModel`.

    Args:
        hf: The HF weights by name. Every one must be used by the config, and every one that it asks for be here.
        config: The HF config as a dict, transformers' defaults filled in.
        topology: The mesh.
        coord: The rank, and the model chunk (`coord.chunk`) of it.
        make_vocab_size_divisible_by: Each rank's part of the vocabulary is a multiple of this.
        padded_query_groups: Key-value groups, those of zeros after the model's own included; `None` is the model's own.
        spec: Local layers have norms of their own; in TE's they are part of the linear that follows.

    Returns:
        New tensors in the dtypes of `hf`; biases and vocabulary rows that HF has not are zeros.

    Raises:
        CheckpointError: An HF weight is missing, or is of no use under this config.
        TopologyError: A dim does not divide over the ranks.
    """
    weights = Read(hf)
    check_names(hf, config)
    groups = config.get("num_key_value_heads") or config["num_attention_heads"]
    ghosts = 0 if padded_query_groups is None else padded_query_groups - groups
    tp, rank = topology.tp, coord.tp
    shard: dict[str, torch.Tensor] = {}

    first = coord.pp == 0 and coord.chunk == 0
    last = coord.pp == topology.pp - 1 and coord.chunk == topology.vpp - 1

    if first:
        shard["embedding.word_embeddings.weight"] = vocabulary(
            weights["model.embed_tokens.weight"], tp, rank, make_vocab_size_divisible_by
        )

    for run in topology.placement(config["num_hidden_layers"]):
        if (run.pp, run.chunk) != (coord.pp, coord.chunk):
            continue
        for local, layer in enumerate(range(run.start, run.stop)):
            parameters = _layer(weights, config, f"model.layers.{layer}.", tp, rank, spec, ghosts)
            for name, tensor in parameters.items():
                shard[f"decoder.layers.{local}.{name}"] = tensor

    if last:
        shard["decoder.final_layernorm.weight"] = weights["model.norm.weight"].clone()
        # A tied head on the embedding's own chunk is the embedding: it has no parameter. Elsewhere it is a copy.
        if not config["tie_word_embeddings"]:
            head = weights["lm_head.weight"]
        elif not first:
            head = weights["model.embed_tokens.weight"]
        else:
            return shard
        shard["output_layer.weight"] = vocabulary(head, tp, rank, make_vocab_size_divisible_by)
    return shard


def _layer(
    weights: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    prefix: str,
    tp: int,
    rank: int,
    spec: Literal["local", "te"],
    ghosts: int,
) -> dict[str, torch.Tensor]:
    """One decoder layer's parameters on tensor-parallel rank `rank`."""
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    out: dict[str, torch.Tensor] = {}

    norm = "self_attention.linear_qkv.layer_norm_weight" if spec == "te" else "input_layernorm.weight"
    out[norm] = weights[prefix + "input_layernorm.weight"].clone()
    norm = "mlp.linear_fc1.layer_norm_weight" if spec == "te" else "pre_mlp_layernorm.weight"
    out[norm] = weights[prefix + "post_attention_layernorm.weight"].clone()

    # Column parallel: a rank has some rows. Row parallel: some columns.
    q, k, v = (weights[f"{attention}{name}_proj.weight"] for name in "qkv")
    out["self_attention.linear_qkv.weight"] = part(merge_qkv(q, k, v, config, ghosts), tp, rank, dim=0)
    o = weights[attention + "o_proj.weight"]
    # A ghost's query heads are read by columns of zeros, one for each channel of each head.
    columns = o.new_zeros(o.size(0), q.size(0) // (k.size(0) // head_dim(config)) * ghosts)
    out["self_attention.linear_proj.weight"] = part(torch.cat([o, columns], dim=1), tp, rank, dim=1)

    gate = part(weights[mlp + "gate_proj.weight"], tp, rank, dim=0)
    up = part(weights[mlp + "up_proj.weight"], tp, rank, dim=0)
    out["mlp.linear_fc1.weight"] = torch.cat([gate, up])
    out["mlp.linear_fc2.weight"] = part(weights[mlp + "down_proj.weight"], tp, rank, dim=1)

    # Megatron-Core has one switch for the biases of all four linears. Those that HF has not are zeros.
    if config["attention_bias"] or config["mlp_bias"]:
        if config["attention_bias"]:
            q, k, v = (weights[f"{attention}{name}_proj.bias"] for name in "qkv")
            o = weights[attention + "o_proj.bias"]
        else:
            q, k, v = (torch.zeros_like(tensor[:, 0]) for tensor in (q, k, v))
            o = torch.zeros_like(weights[attention + "o_proj.weight"][:, 0])
        out["self_attention.linear_qkv.bias"] = part(merge_qkv(q, k, v, config, ghosts), tp, rank, dim=0)
        out["self_attention.linear_proj.bias"] = o.clone()  # row parallel: added once, after the sum over ranks

        if config["mlp_bias"]:
            gate, up, down = (weights[f"{mlp}{name}_proj.bias"] for name in ("gate", "up", "down"))
        else:
            gate, up, down = (
                torch.zeros_like(weights[f"{mlp}{name}_proj.weight"][:, 0]) for name in ("gate", "up", "down")
            )
        out["mlp.linear_fc1.bias"] = torch.cat([part(gate, tp, rank, dim=0), part(up, tp, rank, dim=0)])
        out["mlp.linear_fc2.bias"] = down.clone()
    return out


def head_dim(config: Mapping[str, Any]) -> int:
    """Channels of a head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def merge_qkv(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: Mapping[str, Any], ghosts: int
) -> torch.Tensor:
    """Rows of `linear_qkv`: for each key-value group its query heads, then its key head, then its value head.

    Behind them `ghosts` groups of zeros.
    """
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    dim = head_dim(config)
    per_group = heads // groups * dim
    rows = []
    for group in range(groups):
        rows.append(q[group * per_group : (group + 1) * per_group])
        rows.append(k[group * dim : (group + 1) * dim])
        rows.append(v[group * dim : (group + 1) * dim])
    rows.append(q.new_zeros(ghosts * (per_group + 2 * dim), *q.shape[1:]))
    return torch.cat(rows)


def vocabulary(weight: torch.Tensor, tp: int, rank: int, divisible_by: int) -> torch.Tensor:
    """This rank's rows of an embedding `[v h]`, after zero rows up to a multiple of `divisible_by * tp`."""
    multiple = divisible_by * tp
    missing = -weight.size(0) % multiple
    padded = torch.cat([weight, weight.new_zeros(missing, weight.size(1))])
    return part(padded, tp, rank, dim=0)


def part(tensor: torch.Tensor, tp: int, rank: int, *, dim: int) -> torch.Tensor:
    """Part `rank` of `tp` equal parts of `tensor` along `dim` (a copy)."""
    if tensor.size(dim) % tp:
        raise TopologyError(
            f"a dim of {tensor.size(dim)} does not divide over tp={tp}: {tuple(tensor.shape)} dim {dim}"
        )
    return tensor.chunk(tp, dim=dim)[rank].clone(memory_format=torch.contiguous_format)


def check_names(hf: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Refuse weights that nothing below would read: a statement about part of a model proves nothing about the rest."""
    known = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        known |= {prefix + "input_layernorm.weight", prefix + "post_attention_layernorm.weight"}
        for part, names, bias in (
            ("self_attn", "qkvo", config["attention_bias"]),
            ("mlp", ("gate", "up", "down"), config["mlp_bias"]),
        ):
            for name in names:
                known.add(f"{prefix}{part}.{name}_proj.weight")
                if bias:
                    known.add(f"{prefix}{part}.{name}_proj.bias")
    if unused := set(hf) - known:
        raise CheckpointError(listing("HF weights that this config has no place for", unused))
