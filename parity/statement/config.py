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
