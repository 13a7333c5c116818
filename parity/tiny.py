"""Configs made tiny without coincidences: whatever can be confused at this size is confused by a fault, not by chance.

No two axes have one size, the number of groups is not heads/groups, head_dim is not hidden/heads, the vocabulary is
odd, and no constant is a default of Hugging Face or of Megatron-Core: a field that a converter forgets changes logits.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

from converters.errors import ConfigError
from converters.models import require_hf

Config = dict[str, Any]

VOCAB, HEAD_DIM = 331, 32


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Sizes of a tiny model."""

    layers: int
    groups: int
    heads_per_group: int
    hidden: int
    ffn: int


TINY = Axes(layers=8, groups=4, heads_per_group=6, hidden=72, ffn=88)
"""tp 1, 2, 4 and 8 divide the heads, and 8 exceeds the groups; 8 layers hold pp 4 with vpp 2. transformers refuses a
hidden size that the heads do not divide, although head_dim is set."""
ALIGNED = Axes(layers=4, groups=2, heads_per_group=3, hidden=96, ffn=448)
"""For quantised matrix products: over tp 1 and 2, every size is a multiple of 32, and few of 128."""

MAX_POSITIONS = 1531
_FAMOUS_EPS = (1e-5, 1e-6)  # the defaults of Megatron-Core and of transformers
_TINY_EPS = 3e-5
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def shrink(config: Config, axes: Axes = TINY) -> Config:
    """`config` with tiny axes and telling constants, every feature kept.

    Kept: whether attention is multi-head, grouped or multi-query; tied or untied head; biases; the rope type and the
    spelling of its fields; dtype; which token ids are equal. Rope fields are moved off their well-known values, and
    llama3's lengths are set such that each of its frequency bands holds a frequency that 100 positions can feel.

    Raises:
        ConfigError: Not a Llama config, or a rope type that is not known here.
    """
    require_llama(config)
    out = copy.deepcopy(config)
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    tiny_heads = axes.groups * axes.heads_per_group
    out |= {
        "num_hidden_layers": axes.layers,
        "num_attention_heads": tiny_heads,
        "num_key_value_heads": tiny_heads if groups == heads else 1 if groups == 1 else axes.groups,
        "head_dim": HEAD_DIM,
        "hidden_size": axes.hidden,
        "intermediate_size": axes.ffn,
        "vocab_size": VOCAB,
        "max_position_embeddings": MAX_POSITIONS,
    }
    if out.get("rms_norm_eps", 1e-6) in _FAMOUS_EPS:
        out["rms_norm_eps"] = _TINY_EPS
    _shrink_rope(out)
    _shrink_token_ids(out)
    return out


def odd_config() -> Config:
    """A Llama config in which every axis and every constant is unusual, all biases are on and the head is untied."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": 503,
        "eos_token_id": [505, 501],
        "pad_token_id": 499,
        "head_dim": 24,
        "hidden_act": "silu",
        "hidden_size": 210,
        "initializer_range": 0.019,
        "intermediate_size": 435,
        "max_position_embeddings": 2111,
        "mlp_bias": True,
        "num_attention_heads": 15,
        "num_hidden_layers": 6,
        "num_key_value_heads": 5,
        "pretraining_tp": 1,
        "rms_norm_eps": 7e-5,
        "rope_scaling": {
            "factor": 13.0,
            "high_freq_factor": 5.5,
            "low_freq_factor": 1.375,
            "original_max_position_embeddings": 113,
            "rope_type": "llama3",
        },
        "rope_theta": 23456.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": 509,
    }


def with_layers(config: Config, layers: int) -> Config:
    """`config` with its first `layers` layers only.

    Raises:
        ConfigError: The model does not have that many.
    """
    if not 1 <= layers <= config["num_hidden_layers"]:
        raise ConfigError(f"layers must be from 1 to the model's {config['num_hidden_layers']}, found {layers}")
    return copy.deepcopy(config) | {"num_hidden_layers": layers}


def require_llama(config: Config) -> None:
    """Refuse a config that is not of the Llama family, or of quantised weights.

    Raises:
        ConfigError: It is in another column, its model_type is not `llama`, a size is missing, or it has a
            quantization_config.
    """
    require_hf(config)
    if config.get("model_type") != "llama":
        raise ConfigError(f"model_type is {config.get('model_type')!r}, expected 'llama'")
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    missing = [name for name in needed if not config.get(name)]
    if missing:
        raise ConfigError(f"the config lacks {', '.join(missing)}")
    if config.get("quantization_config") is not None:
        raise ConfigError(
            "the checkpoint is quantised, and is checked as what it stands for; make it plain first: "
            "python -m converters dequantize SOURCE TARGET"
        )


def llama3_bands(theta: float, head_dim: int, rope: Config) -> tuple[int, int, int]:
    """How many frequencies llama3's scaling leaves alone, interpolates, and divides by the factor.

    Source: huggingface/transformers 5.23.0, modeling_rope_utils.py `_compute_llama3_parameters`.
    """
    length = rope["original_max_position_embeddings"]
    waves = [2 * math.pi * theta ** (2 * i / head_dim) for i in range(head_dim // 2)]
    kept = sum(wave < length / rope["high_freq_factor"] for wave in waves)
    scaled = sum(wave > length / rope["low_freq_factor"] for wave in waves)
    return kept, len(waves) - kept - scaled, scaled


def _shrink_rope(config: Config) -> None:
    """Move theta and the scaling's fields off their well-known values, in whichever spelling they are written."""
    modern = config.get("rope_parameters")
    legacy = config.get("rope_scaling")
    scalings = [rope for rope in (modern, legacy) if isinstance(rope, dict)]
    theta = next((rope["rope_theta"] for rope in scalings if "rope_theta" in rope), config.get("rope_theta", 10000.0))
    theta = 0.6 * theta
    if modern is None or "rope_theta" in config:
        config["rope_theta"] = theta
    for rope in scalings:
        if rope is modern or "rope_theta" in rope:
            rope["rope_theta"] = theta
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "linear", "dynamic", "llama3", "yarn"):
            raise ConfigError(f"cannot shrink a model with rope type {kind!r}: its fields are not known here")
        if kind != "default":
            rope["factor"] = rope.get("factor", 1.0) + 3.0
        if kind == "llama3":
            rope |= {"low_freq_factor": 1.25, "high_freq_factor": 5.0}
            # The third wavelength lies in the middle of the interpolated band: two or more below, the rest above.
            wave = 2 * math.pi * theta ** (2 * 2 / HEAD_DIM)
            rope["original_max_position_embeddings"] = round(wave * math.sqrt(1.25 * 5.0))
            bands = llama3_bands(theta, HEAD_DIM, rope)
            assert min(bands) >= 1, f"llama3 bands {bands} leave one without a frequency"
        elif "original_max_position_embeddings" in rope:
            rope["original_max_position_embeddings"] = 61


def _shrink_token_ids(config: Config) -> None:
    """Ids at the end of the tiny vocabulary: equal where they were equal, in the same order, negative ones kept."""

    def ids(value: Any) -> list[int]:
        return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int) and v >= 0]

    old = sorted({token for name in _TOKEN_IDS for token in ids(config.get(name))})
    new = {token: VOCAB - 2 * (len(old) - place) for place, token in enumerate(old)}
    for name in _TOKEN_IDS:
        value = config.get(name)
        if isinstance(value, list):
            config[name] = [new.get(token, token) for token in value]
        elif isinstance(value, int):
            config[name] = new.get(value, value)
