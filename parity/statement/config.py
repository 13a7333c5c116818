"""What a config demands of a Megatron-Core model, said without the converter's table of fields, and what one answers.

The demand is transformers': its own config class fills the defaults in, and its own rotary embedding computes the
frequencies. The answer is read off the modules of a built model: the numbers that it will compute with, not those that
it was told.

Source: huggingface/transformers 5.23.0, models/llama/configuration_llama.py and modeling_llama.py
    (`LlamaRotaryEmbedding`, `LlamaMLP`); NVIDIA/Megatron-LM core_v0.16.1 and core_v0.19.2, under megatron/core:
    transformer/transformer_config.py, models/gpt/gpt_model.py (rotary_pos_emb, share_embeddings_and_output_weights).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.values import ROUNDOFF
from parity.causes import Cause
from parity.statement.rope import Floats, rope_cause

Facts = dict[str, Any]
STEPS = 16
"""Roundings on the way to a frequency or an activation, by whichever formula; each at most `ROUNDOFF` of the value."""
FREQUENCIES, ACTIVATION = "rotary frequencies", "hidden_act"
ACTIVATIONS = ("silu", "gelu", "relu", "tanh", "sigmoid")
"""Functions of `torch.nn.functional` that both sides know by one name."""
_OWN = {
    "normalization": ("RMSNorm", "norm"),
    "hidden_dropout": (0.0, "mlp"),
    "qk_layernorm": (False, "attention"),
    "apply_residual_connection_post_layernorm": (False, "norm"),
    "softmax_scale": (None, "attention"),
}
"""Megatron-Core's fields that no config of a Llama says: the only value that computes one, and the sub-module."""


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
                "vocab_size",
            )
        },
        ACTIVATION: sampled(ACT2FN[config.hidden_act]),
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
        ACTIVATION: sampled(config.activation_func),
        "sliding_window": getattr(config, "window_size", None),
    }
    if not config.gated_linear_unit:
        out[ACTIVATION] = "a feed-forward part without a gate"
    for name in ("max_position_embeddings", "vocab_size"):  # a provider's, not Megatron-Core's own
        if getattr(config, name, None) is not None:
            out[name] = getattr(config, name)
    if (rotary := getattr(model, "rotary_pos_emb", None)) is not None:
        out[FREQUENCIES] = rotary.inv_freq.detach().float().cpu().numpy().ravel()
        if rotary.rotary_interleaved:
            out[FREQUENCIES] = "neighbouring channels rotate against each other"
    else:  # every stage has one
        out[FREQUENCIES] = "positions are not told: there is no rotary embedding"
    usual = config.kv_channels**-0.5
    for name, (only, _) in _OWN.items():
        value = getattr(config, name, only)
        same = name == "softmax_scale" and isinstance(value, float) and math.isclose(value, usual, rel_tol=2**-24)
        if value != only and not same:
            out[name] = value
    return out


def disagreements(wanted: Facts, found: Facts, config: Mapping[str, Any]) -> Iterator[tuple[str, Cause]]:
    """A line and a cause for each field in which a model is not what its config demands."""
    for name in found:
        if (cause := disagreement(name, wanted, found, config)) is not None:
            yield f"{name}: {cause.detail}", cause


def disagreement(name: str, wanted: Facts, found: Facts, config: Mapping[str, Any]) -> Cause | None:
    """Why a model is not what its config demands in the field `name`; `None` where it is."""
    want, have = wanted.get(name), found[name]
    if name in _OWN:
        return Cause(kind="computation", what=(_OWN[name][1],), detail=f"{name}={have!r}")
    if not isinstance(want, np.ndarray):
        detail = f"demanded {want!r}, the model has {have!r}"
        return None if want == have else Cause(kind="config", what=(name,), detail=detail)
    if not isinstance(have, np.ndarray):
        return Cause(kind="computation", what=("rope" if name == FREQUENCIES else "mlp",), detail=str(have))
    if _near(have, want):
        return None
    if name == FREQUENCIES:
        return rope_cause(want, have, config)
    detail = f"{activation_name(have) or 'another function'} for {config.get(name)}"
    return Cause(kind="config", what=(name,), detail=detail)


def activation_name(samples: Floats) -> str | None:
    """The function that `answered` has sampled, by the name that both sides know it by."""
    import torch

    known = ((name, sampled(getattr(torch.nn.functional, name))) for name in ACTIVATIONS)
    return next((name for name, values in known if _near(samples, values)), None)


def sampled(function: Callable[..., Any]) -> Floats:
    import torch

    values: Floats = function(torch.linspace(-6, 6, 241)).detach().cpu().numpy()
    return values


def _near(found: Floats, wanted: Floats) -> bool:
    """Whether two float32 evaluations of one formula agree; activations cancel, so the scale is at least one input."""
    if found.shape != wanted.shape:
        return False
    scale = np.maximum(np.abs(wanted), np.finfo(np.float32).tiny) if (wanted > 0).all() else np.abs(wanted).max()
    return bool((np.abs(found.astype(np.float64) - wanted) <= STEPS * ROUNDOFF["float32"] * scale).all())
