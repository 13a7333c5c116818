"""One Llama decoder layer of transformers, and the reference layer with its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from converters.te import reference
from converters.te.reference import rope
from parity import bounds

# No two sizes alike, and an odd number of tokens.
CONFIG: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "rms_norm_eps": 3e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
}
TOKENS = 11
POSITIONS = 40


def config_of(**changes: Any) -> LlamaConfig:
    config = LlamaConfig(**{**CONFIG, **changes})
    config._attn_implementation = "eager"
    return config


def hf_layer(config: LlamaConfig) -> LlamaDecoderLayer:
    torch.manual_seed(3)
    layer = LlamaDecoderLayer(config, 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, mean=0.2, std=0.3)
    return layer


def hf_forward(layer: LlamaDecoderLayer, config: LlamaConfig, x: Tensor, implementation: str = "eager") -> Tensor:
    config._attn_implementation = implementation
    positions = torch.arange(x.shape[1])[None]
    hidden = torch.full((x.shape[1], x.shape[1]), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)[None, None]
    angles = LlamaRotaryEmbedding(config)(x, positions)
    out = layer(x, attention_mask=hidden, position_ids=positions, position_embeddings=angles)
    return out[0] if isinstance(out, tuple) else out


def weights(hf: LlamaDecoderLayer, config: LlamaConfig, value: Callable[[Tensor], Any]) -> dict[str, Tensor]:
    """`value` (the tensor, or its gradient) of every parameter, in the layout and under the names of the reference."""
    groups = config.num_key_value_heads
    attention_, mlp = hf.self_attn, hf.mlp

    def qkv(name: str) -> Tensor:
        parts = [value(getattr(getattr(attention_, f"{p}_proj"), name)) for p in "qkv"]
        return torch.cat([p.reshape(groups, -1, config.head_dim, *p.shape[1:]) for p in parts], 1).flatten(0, 2)

    found = {
        "self_attention.layernorm_qkv.layer_norm_weight": value(hf.input_layernorm.weight),
        "layernorm_mlp.layer_norm_weight": value(hf.post_attention_layernorm.weight),
    }
    for name in ("weight", "bias") if config.attention_bias else ("weight",):
        found |= {
            f"self_attention.layernorm_qkv.{name}": qkv(name),
            f"self_attention.proj.{name}": value(getattr(attention_.o_proj, name)),
            f"layernorm_mlp.fc1_{name}": torch.cat([value(getattr(m, name)) for m in (mlp.gate_proj, mlp.up_proj)]),
            f"layernorm_mlp.fc2_{name}": value(getattr(mlp.down_proj, name)),
        }
    return found


def reference_layer(config: LlamaConfig, values: dict[str, Tensor] | None = None, **changes: Any) -> torch.nn.Module:
    values = weights(hf_layer(config), config, torch.Tensor.detach) if values is None else values
    options: dict[str, Any] = {
        "num_gqa_groups": config.num_key_value_heads,
        "kv_channels": config.head_dim,
        "layernorm_epsilon": config.rms_norm_eps,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "layer_number": 1,
        "bias": config.attention_bias,
        "fuse_qkv_params": True,
        "normalization": "RMSNorm",
        "activation": "swiglu",
        "attn_input_format": "bshd",
        "params_dtype": torch.float32,
        **changes,
    }
    sizes = (config.hidden_size, config.intermediate_size, config.num_attention_heads)
    layer = reference.TransformerLayer(*sizes, **options)
    missing, unexpected = layer.load_state_dict(values, strict=False)
    assert not unexpected
    assert not values or all(key.endswith("_extra_state") for key in missing)
    return layer


def angles_of(config: LlamaConfig) -> Tensor:
    return rope.angles(LlamaRotaryEmbedding(config).inv_freq, POSITIONS)


def hidden(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, CONFIG["hidden_size"], generator=torch.Generator().manual_seed(seed))


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def assert_near(actual: Tensor, expected: Tensor, *others: Tensor) -> None:
    """Within ten floors, the floor being how far `others`, equal in exact arithmetic, are from `expected`."""
    expected_, *rest = (one.detach().float().numpy() for one in (expected, *others))
    floor = bounds.spread(rest, expected_).largest
    limit = bounds.allowed(floor, float(abs(expected_).max()))
    distance = bounds.largest(actual.detach().float().numpy(), expected_)
    assert distance.value <= limit, f"{distance} is over {limit}, of a floor of {floor}"


def blocks(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
