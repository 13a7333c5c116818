"""A tiny Llama of odd sizes in transformers, its weights merged by hand for the Transformer Engine model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from converters.te import NVLlamaConfig, NVLlamaForCausalLM
from parity import bounds

GROUPS, PER_GROUP, DIM, VOCABULARY = 2, 3, 12, 61
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e4,
    "factor": 6.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 16,
}


def sizes(**changes: Any) -> dict[str, Any]:
    """Of a config: no two alike, heads * dim != hidden, biases on, a rope of llama3."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": GROUPS * PER_GROUP,
        "num_key_value_heads": GROUPS,
        "head_dim": DIM,
        "attention_bias": True,
        "mlp_bias": True,
        "rms_norm_eps": 3e-5,
        "rope_parameters": dict(LLAMA3),
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        **changes,
    }


def llama(**changes: Any) -> LlamaForCausalLM:
    """The one of transformers, every parameter random, norms around one."""
    generator = torch.Generator().manual_seed(11)
    model = LlamaForCausalLM(LlamaConfig(**sizes(**changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.25 * noise)
    return model


def merged(of_hf: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by transformers' keys as the Transformer Engine model has them."""
    made: dict[str, Tensor] = {}
    for key, value in of_hf.items():
        if not key.startswith("model.layers."):
            made[key] = value
            continue
        layer, rest = ".".join(key.split(".")[:3]), ".".join(key.split(".")[3:])
        kind = rest.rsplit(".", 1)[1]
        tail = value.shape[1:]
        if rest.startswith("self_attn.q_proj"):
            q, k, v = (of_hf[f"{layer}.self_attn.{one}_proj.{kind}"] for one in "qkv")
            grouped = [
                q.reshape(GROUPS, PER_GROUP, DIM, *tail),
                k.reshape(GROUPS, 1, DIM, *tail),
                v.reshape(GROUPS, 1, DIM, *tail),
            ]
            made[f"{layer}.self_attention.layernorm_qkv.{kind}"] = torch.cat(grouped, 1).reshape(-1, *tail)
        elif rest.startswith("mlp.gate_proj"):
            made[f"{layer}.layernorm_mlp.fc1_{kind}"] = torch.cat([value, of_hf[f"{layer}.mlp.up_proj.{kind}"]])
        elif rest.startswith("self_attn.o_proj"):
            made[f"{layer}.self_attention.proj.{kind}"] = value
        elif rest.startswith("mlp.down_proj"):
            made[f"{layer}.layernorm_mlp.fc2_{kind}"] = value
        elif rest == "input_layernorm.weight":
            made[f"{layer}.self_attention.layernorm_qkv.layer_norm_weight"] = value
        elif rest == "post_attention_layernorm.weight":
            made[f"{layer}.layernorm_mlp.layer_norm_weight"] = value
    return made


def nvllama(hf: LlamaForCausalLM, layout: str, **changes: Any) -> NVLlamaForCausalLM:
    """The same model on the reference layers."""
    fields = {name: value for name, value in hf.config.to_dict().items() if name != "architectures"}
    model = NVLlamaForCausalLM(NVLlamaConfig(**{**fields, "attn_input_format": layout, **changes})).eval()
    state = merged(dict(hf.state_dict()))
    model.load_state_dict({key: value.to(model.dtype) for key, value in state.items()})
    return model


def assert_within_floors(actual: Tensor, evaluations: list[Tensor], expected: Tensor, *, what: str) -> None:
    """`actual` within ten noise floors of `expected`; the floor is how far `evaluations` lie from it."""

    def flat(tensor: Tensor) -> Any:
        return np.asarray(tensor.detach().double().reshape(-1).numpy())

    wanted = flat(expected)
    floor = max(bounds.largest(flat(one), wanted).value for one in evaluations)
    allowed = bounds.allowed(floor, float(np.abs(wanted).max()))
    found = bounds.largest(flat(actual), wanted)
    assert found.value <= allowed, f"{what}: {found.value} at {found.where}, allowed {allowed}"
