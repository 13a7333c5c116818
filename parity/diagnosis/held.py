"""What a built Megatron-Core model is: its config in Hugging Face's terms, its frequencies, and its weights in theirs.

All of it is read off the live model, and nothing here uses the converter's tables: an import that is wrong by its table
would be read back by the same table as if it were right. Weights are carried back by `parity.diagnosis.pullback`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from converters.topology import Topology
from parity.diagnosis.pullback import Pullback
from parity.observation import observe, taps
from parity.observation.activations import LOGITS, Floats
from parity.probes import Probe
from parity.statement.weights import expected_shard

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True, kw_only=True)
class Held:
    """What one rank's chunks are, and what they compute.

    Args:
        taps: Its stage's activations and, on the last one, logits; empty on ranks that have none whole.
        fields: Config fields by their names in `LlamaConfig`; fields of the rope by `rope_parameters`' names.
        frequencies: The inverse frequencies that the rope turns by, `[head_dim / 2]` float32.
        beyond: Sub-module and what it does that no Hugging Face config says.
        stray: What of its weights has no place in the checkpoint.
    """

    taps: Mapping[str, Floats]
    fields: Mapping[str, Any]
    frequencies: Floats
    beyond: tuple[tuple[str, str], ...]
    stray: tuple[str, ...]


def config_of(model: Any) -> tuple[dict[str, Any], tuple[tuple[str, str], ...]]:
    """The config of a live `GPTModel` in the terms of `LlamaConfig`, and what goes beyond it.

    Source: NVIDIA/Megatron-LM core_v0.16.1 and core_v0.19.2, megatron/core/transformer/transformer_config.py and
        models/gpt/gpt_model.py `GPTModel.__init__`.
    """
    config = model.config
    functional = torch.nn.functional
    activations = {functional.silu: "silu", functional.gelu: "gelu", functional.relu: "relu"}
    beyond = []
    eps = {float(module.eps) for module in model.modules() if isinstance(getattr(module, "eps", None), float)}
    if len(eps) > 1:
        beyond.append(("norm", f"norms add {', '.join(map(str, sorted(eps)))}"))
    activation = activations.get(config.activation_func)
    if activation is None:
        beyond.append(("mlp", f"the activation is {config.activation_func!r}"))
    if not config.gated_linear_unit:
        beyond.append(("mlp", "the MLP has no gate"))
    for name, usual, part in (
        ("rotary_interleaved", False, "rope"),
        ("window_size", None, "attention"),
        ("qk_layernorm", False, "attention"),
        ("apply_residual_connection_post_layernorm", False, "norm"),
    ):
        if getattr(config, name, usual) != usual:
            beyond.append((part, f"{name}={getattr(config, name)!r}"))
    if getattr(model, "rotary_percent", 1.0) != 1.0:
        beyond.append(("rope", f"rotary_percent={model.rotary_percent!r}"))
    scale = getattr(config, "softmax_scale", None)
    if scale is not None and abs(scale * config.kv_channels**0.5 - 1) > 1e-6:
        beyond.append(("attention", f"softmax_scale={scale!r}"))
    fields = {
        "rms_norm_eps": eps.pop() if len(eps) == 1 else config.layernorm_epsilon,
        "hidden_act": activation,
        "head_dim": config.kv_channels,
        "tie_word_embeddings": bool(model.share_embeddings_and_output_weights),
        "rope_theta": getattr(config, "rotary_base", getattr(model, "rotary_base", None)),
        **_rope_scaling(model),
    }
    return {name: value for name, value in fields.items() if value is not None}, tuple(beyond)


def _rope_scaling(model: Any) -> dict[str, Any]:
    """The rope's type and factors as the model's config states them; where it states none, only the type."""
    config = model.config
    if getattr(config, "seq_len_interpolation_factor", None) is not None:
        return {"rope_type": "linear", "factor": float(config.seq_len_interpolation_factor)}
    if not getattr(config, "rope_scaling", getattr(model, "rotary_scaling", False)):
        return {"rope_type": "default"}
    return {
        "rope_type": "llama3",
        "factor": getattr(config, "rope_scaling_factor", None),
        "low_freq_factor": getattr(config, "rope_low_freq_factor", None),
        "high_freq_factor": getattr(config, "rope_high_freq_factor", None),
        "original_max_position_embeddings": getattr(config, "rope_original_max_position_embeddings", None),
    }


def pull_back(
    chunks: Sequence[Any], source: Mapping[str, torch.Tensor], config: Mapping[str, Any], topology: Topology, at: Path
) -> tuple[str, ...]:
    """Leave this rank's wrong elements in the shared folder `at`, in the tensors of the checkpoint. Collective.

    Args:
        chunks: This rank's chunks, bare.
        source: The checkpoint, in the model's dtype.
        config: Its config, transformers' defaults filled in.
        topology: The layout.
        at: What `pullback` gives is stored there.

    Returns:
        What has no place in the checkpoint: strange parameters, and padding that is not zero.
    """
    rank = torch.distributed.get_rank()
    pulled = pullback(at, source, config)
    if rank == 0:
        pulled.create()
    torch.distributed.barrier()
    stray: list[str] = []
    for model, place in zip(chunks, topology.chunks_of(topology.coord(rank)), strict=True):
        parameters = {name: parameter.data.cpu() for name, parameter in model.named_parameters()}
        rows = [parameters[name].size(0) for name in VOCABULARY if name in parameters]
        choices: dict[str, Any] = {
            "make_vocab_size_divisible_by": rows[0] if rows else 1,
            "padded_query_groups": model.config.num_query_groups,
            "spec": "te" if any(name.endswith("linear_fc1.layer_norm_weight") for name in parameters) else "local",
        }
        stated = expected_shard(source, config, topology, place, **choices)
        numbers = pulled.numbers(config, topology, place, **choices)
        stray += [f"{place}: {name} should not be held" for name in sorted(set(parameters) - set(stated))]
        for name, right in stated.items():
            found = parameters.get(name)
            if found is None:
                stray.append(f"{place}: {name} is not held")
            elif found.shape != right.shape:
                stray.append(f"{place}: {name}: expected shape {list(right.shape)}, found {list(found.shape)}")
            else:
                traces = pulled.put(name, numbers[name], found, right)
                stray += [f"{place}: {name}: {trace.kind} {trace.detail}" for trace in traces]
    return tuple(stray)


def pullback(at: Path, source: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Pullback:
    """The shared files in the folder `at` for the tensors of `source`."""
    table = {key: tuple(tensor.shape) for key, tensor in source.items()}
    return Pullback(at, table, tied=bool(config["tie_word_embeddings"]))


def observed(converter: Any, folder: Path, settings: Any, probe: Probe, scratch: Path) -> Held:
    """Import `folder`, run `probe`, and say what the model is. In each rank; collective."""
    from parity.observation import weights as measure

    chunks = measure.loaded(converter, folder, settings)
    topology: Topology = settings.topology
    config, source = taps.hf_config(folder), checkpoint(folder, settings.precision)
    with taps.megatron_taps(chunks) as recorded:
        seen = observe.megatron_observation(chunks, probe, topology=topology, vocab_size=config["vocab_size"])
    whole = recorded.of_megatron(topology, *probe.tokens.shape)
    if seen is not None:
        whole[LOGITS] = seen.logits
    models = measure.unwrapped(chunks)
    fields, beyond = config_of(models[0])
    return Held(
        taps=whole,
        fields=fields,
        frequencies=models[0].rotary_pos_emb.inv_freq.detach().float().cpu().numpy().reshape(-1),
        beyond=beyond,
        stray=pull_back(models, source, config, topology, scratch),
    )


def checkpoint(folder: Path, precision: str) -> dict[str, torch.Tensor]:
    """The model's own tensors of a checkpoint, in `precision`; no copy of a tied head, no buffers."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else []
    out: dict[str, torch.Tensor] = {}
    for file in names or ["model.safetensors"]:
        handle = safe_open(folder / file, framework="pt")
        out |= {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118  # not a mapping
    tied = taps.hf_config(folder)["tie_word_embeddings"]
    return {
        key: tensor.to(observe.DTYPES[precision])
        for key, tensor in out.items()
        if not key.endswith("rotary_emb.inv_freq") and not (tied and key == "lm_head.weight")
    }
