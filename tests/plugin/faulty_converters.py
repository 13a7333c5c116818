"""Converters that are wrong in one known way each, and the tiny model that they are tried on. Sent to ranks by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parity.converter import Own, Settings

# Every axis of another size, and llama3's three bands of frequencies within reach of a hundred positions.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_size": 80,
    "intermediate_size": 96,
    "vocab_size": 131,
    "max_position_embeddings": 900,
    "rms_norm_eps": 3e-4,
    "rope_theta": 5000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 5.0,
        "original_max_position_embeddings": 48,
    },
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Mutated(Own):
    """Imports another folder than it is asked to."""

    instead: Path

    def to_megatron(self, folder: Path, settings: Settings) -> Sequence[Any]:
        return super().to_megatron(self.instead, settings)


@dataclass(frozen=True)
class Patched(Own):
    """Imports what it is asked to, or another folder, and breaks what the model computes."""

    how: str
    instead: Path | None = None

    def to_megatron(self, folder: Path, settings: Settings) -> Sequence[Any]:
        from converters.megatron.provider import unwrap

        chunks = super().to_megatron(self.instead or folder, settings)
        for chunk in chunks:
            PATCHES[self.how](unwrap(chunk))
        return chunks


def _rounded_frequencies(model: Any) -> None:
    model.rotary_pos_emb.inv_freq = model.rotary_pos_emb.inv_freq.bfloat16().float()


def _own_frequencies(model: Any) -> None:
    """As Megatron-Core computes them: it knows the factor, and takes the other fields for Llama 3.1's."""
    rope = model.rotary_pos_emb
    plain = 1.0 / (model.config.rotary_base ** (torch.arange(0, 16, 2, dtype=torch.float32) / 16))
    rope.inv_freq = rope._apply_scaling(plain, factor=model.config.rope_scaling_factor)


def _interleaved(model: Any) -> None:
    model.config.rotary_interleaved = True
    model.rotary_pos_emb.rotary_interleaved = True


def _eps_outside(model: Any) -> None:
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.RMSNorm)):
        norm.forward = lambda x, norm=norm: x / (x.square().mean(-1, keepdim=True).sqrt() + norm.eps) * norm.weight


def _no_mask(model: Any) -> None:
    for layer in model.decoder.layers:
        core = layer.self_attention.core_attention
        core.forward = _causal(core.forward)


def _causal(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(query: Any, key: Any, value: Any, attention_mask: Any, *rest: Any, **named: Any) -> Any:
        length = query.size(0)
        future = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
        return forward(query, key, value, None if attention_mask is None else future, *rest, **named)

    return call


def _last_mlp_scaled(model: Any) -> None:
    for layer in model.decoder.layers:
        if layer.layer_number == 3:
            layer.mlp.register_forward_hook(lambda module, given, output: (output[0] * 1.001, output[1]))


def _scaled_logits(model: Any) -> None:
    if model.post_process:
        model.output_layer.register_forward_hook(lambda module, given, output: (output[0] * 1.01, output[1]))


PATCHES: dict[str, Callable[[Any], None]] = {
    "frequencies in bfloat16": _rounded_frequencies,
    "frequencies of Megatron's own": _own_frequencies,
    "logits scaled": _scaled_logits,
    "interleaved": _interleaved,
    "eps outside of the root": _eps_outside,
    "mask ignored": _no_mask,
    "an MLP scaled": _last_mlp_scaled,
}


def with_tensors(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint with other tensors."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    change(tensors)
    target.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


def with_fields(source: Path, target: Path, **fields: Any) -> Path:
    """A copy of a checkpoint with another config; fields of the rope are given by their own names."""
    config = json.loads((source / "config.json").read_text())
    rope = {name: fields.pop(name) for name in list(fields) if name in config["rope_scaling"]}
    config |= fields
    if rope:
        config["rope_scaling"] |= rope
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    (target / "model.safetensors").hardlink_to(source / "model.safetensors")
    return target
