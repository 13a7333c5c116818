"""What a config demands of a Megatron-Core model, said without the converter's table of fields, and what one answers.

The demand is transformers': its own config class fills the defaults in, and its own rotary embedding computes the
frequencies. The answer is read off the modules of a built model: the numbers that it will compute with, not those that
it was told.

Source: huggingface/transformers 5.23.0, models/llama/configuration_llama.py and modeling_llama.py
    (`LlamaRotaryEmbedding`, `LlamaMLP`); NVIDIA/Megatron-LM core_v0.16.1 and core_v0.19.2, under megatron/core:
    transformer/transformer_config.py, models/gpt/gpt_model.py (rotary_pos_emb, share_embeddings_and_output_weights).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.values import ROUNDOFF
from parity.causes import Cause

Facts = dict[str, Any]
Floats = npt.NDArray[np.float32]
STEPS = 16
"""Roundings on the way to a frequency or an activation, by whichever formula; each at most `ROUNDOFF` of the value."""
FREQUENCIES, ACTIVATION = "rotary frequencies", "hidden_act"
_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def demanded(folder: Path) -> Facts:
    """What the config in `folder` demands, by HF's names of fields. Asks transformers."""
    from transformers import LlamaConfig
    from transformers.activations import ACT2FN
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig.from_pretrained(folder)
    return {
        **{
            name: getattr(config, name)
            for name in (
                "num_hidden_layers",
                "hidden_size",
                "intermediate_size",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "rms_norm_eps",
                "tie_word_embeddings",
                "attention_dropout",
                "max_position_embeddings",
            )
        },
        ACTIVATION: _sampled(ACT2FN[config.hidden_act]),
        FREQUENCIES: LlamaRotaryEmbedding(config).inv_freq.float().numpy(),
        "sliding_window": None,
    }


def answered(model: Any) -> Facts:
    """What a bare `GPTModel` computes with, by HF's names of fields; what it does not say is left out.

    Ghost groups of zeros are no part of the model.
    """
    config = model.config
    ghosts = getattr(config, "ghost_query_groups", 0)
    groups = config.num_query_groups or config.num_attention_heads
    eps = sorted({float(m.eps) for m in model.modules() if isinstance(getattr(m, "eps", None), float)})
    out: Facts = {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads - ghosts * (config.num_attention_heads // groups),
        "num_key_value_heads": groups - ghosts,
        "head_dim": config.kv_channels,
        # A stage without a norm is asked what it was told.
        "rms_norm_eps": eps[0] if len(eps) == 1 else tuple(eps) or config.layernorm_epsilon,
        "tie_word_embeddings": bool(model.share_embeddings_and_output_weights),
        "attention_dropout": float(config.attention_dropout),
        ACTIVATION: _sampled(config.activation_func),
        "sliding_window": getattr(config, "window_size", None),
    }
    if not config.gated_linear_unit:
        out[ACTIVATION] = "a feed-forward part without a gate"
    if getattr(config, "max_position_embeddings", None) is not None:
        out["max_position_embeddings"] = config.max_position_embeddings
    if (rotary := getattr(model, "rotary_pos_emb", None)) is not None:
        out[FREQUENCIES] = rotary.inv_freq.detach().float().cpu().numpy().ravel()
        if rotary.rotary_interleaved:
            out[FREQUENCIES] = "neighbouring channels rotate against each other"
    for name, only in (("normalization", "RMSNorm"), ("hidden_dropout", 0.0), ("qk_layernorm", False)):
        if getattr(config, name, only) != only:
            out[name] = getattr(config, name)
    scale = getattr(config, "softmax_scale", None)
    if scale is not None and not math.isclose(scale, config.kv_channels**-0.5, rel_tol=ROUNDOFF["float32"]):
        out["softmax_scale"] = scale
    return out


def disagreements(wanted: Facts, found: Facts, config: Mapping[str, Any]) -> Iterator[tuple[str, Cause]]:
    """A line and a cause for each field in which a model is not what its config demands."""
    for name in found:
        want, have = wanted.get(name), found[name]
        if isinstance(want, np.ndarray):
            if isinstance(have, np.ndarray) and _near(have, want):
                continue
            if name == FREQUENCIES:
                cause = _rope_cause(want, have, config)
            else:
                cause = Cause(kind="config", what=(name,), detail=f"another function than {config.get(name)!r}")
            yield f"{name}: {cause.detail}", cause
        elif want != have:
            detail = f"demanded {want!r}, the model has {have!r}"
            yield f"{name}: {detail}", Cause(kind="config", what=(name,), detail=detail)


def _sampled(function: Callable[..., Any]) -> Floats:
    import torch

    values: Floats = function(torch.linspace(-6, 6, 241)).detach().cpu().numpy()
    return values


def _near(found: Floats, wanted: Floats) -> bool:
    """Whether two float32 evaluations of one formula agree; activations cancel, so the scale is at least one input."""
    if found.shape != wanted.shape:
        return False
    scale = np.maximum(np.abs(wanted), np.finfo(np.float32).tiny) if (wanted > 0).all() else np.abs(wanted).max()
    return bool((np.abs(found.astype(np.float64) - wanted) <= STEPS * ROUNDOFF["float32"] * scale).all())


def _rope_cause(wanted: Floats, found: Any, config: Mapping[str, Any]) -> Cause:
    """Which field of the rope, or which few, another value of which gives the frequencies that were found."""
    if not isinstance(found, np.ndarray):
        return Cause(kind="computation", what=("rope",), detail=str(found))
    if found.shape != wanted.shape:
        detail = f"{len(found)} frequencies, of a head of {2 * len(found)}, for {len(wanted)}"
        return Cause(kind="config", what=("head_dim",), detail=detail)
    if np.array_equal(found, _bf16(wanted)):
        return Cause(kind="computation", what=("rope",), detail="the frequencies are rounded to bfloat16")
    true = _rope_fields(config)
    guesses: dict[str, list[Any]] = {
        "rope_theta": [10000.0, 500000.0, 1e6, float(found[1]) ** -len(found)],
        "factor": [8.0, 1.0, 32.0],
        "low_freq_factor": [1.0],
        "high_freq_factor": [4.0],
        "original_max_position_embeddings": [8192, config.get("max_position_embeddings")],
        "rope_type": ["default"],
    }
    if true["rope_type"] == "default":
        guesses = {"rope_theta": guesses["rope_theta"]}
    else:
        plain = _frequencies({**true, "rope_type": "default"}, len(found))
        guesses["factor"].insert(0, float(plain[-1] / found[-1]))
    for count in range(1, 5):
        for names in itertools.combinations(guesses, count):
            for values in itertools.product(*(guesses[name] for name in names)):
                changed = {**true, **dict(zip(names, values, strict=True))}
                if None not in values and np.allclose(_frequencies(changed, len(found)), found, rtol=1e-5, atol=0):
                    detail = ", ".join(
                        f"{name} {_number(value)} for {_number(true[name])}"
                        for name, value in zip(names, values, strict=True)
                    )
                    return Cause(kind="config", what=tuple(sorted(_in_full(name) for name in names)), detail=detail)
    what = "rope_theta" if true["rope_type"] == "default" else "rope_scaling"
    first = int(np.argmax(np.abs(found / wanted - 1)))
    detail = f"frequency {first} is {found[first]:.6g} for {wanted[first]:.6g}, which no field explains by itself"
    return Cause(kind="config", what=(what,), detail=detail)


def _in_full(name: str) -> str:
    return {"rope_theta": name, "rope_type": "rope_scaling"}.get(name, f"rope_scaling.{name}")


def _rope_fields(config: Mapping[str, Any]) -> Facts:
    """The rope's fields, in whichever spelling."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    return {"rope_theta": theta, "rope_type": kind, **{name: rope.get(name) for name in _ROPE}}


def _frequencies(rope: Facts, count: int) -> npt.NDArray[np.float64]:
    """Inverse frequencies in float64: to find a cause, never to judge."""
    plain: npt.NDArray[np.float64] = float(rope["rope_theta"]) ** (-np.arange(count) / count)
    if rope["rope_type"] != "llama3":
        return plain / float(rope["factor"] if rope["rope_type"] == "linear" else 1.0)
    turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1) if high != low else (turns > high).astype(float)
    scaled: npt.NDArray[np.float64] = plain * (kept + (1 - kept) / rope["factor"])
    return scaled


def _bf16(values: Floats) -> Floats:
    pattern = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    pattern = (pattern + np.uint32(0x7FFF) + (pattern >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return pattern.view(np.float32)


def _number(value: Any) -> str:
    return f"{value:.7g}" if isinstance(value, float) else repr(value)
