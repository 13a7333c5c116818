"""What a Llama on Transformer Engine's layers computes with, read off its modules, as `parity.statement.config`.

Transformer Engine's own layers and the torch reference of them have the attributes that are read here.

Source: NVIDIA/TransformerEngine v2.20.2, transformer_engine/pytorch: module/layernorm_linear.py `LayerNormLinear`,
    module/layernorm_mlp.py `LayerNormMLP`, attention/dot_product_attention/dot_product_attention.py
    `DotProductAttention`, ops/basic/rmsnorm.py `RMSNorm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from parity.statement.config import ACTIVATION, FREQUENCIES, Facts, sampled

_GATED: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "swiglu": torch.nn.functional.silu,
    "geglu": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "qgeglu": lambda x: x * torch.sigmoid(1.702 * x),
    "reglu": torch.nn.functional.relu,
    "sreglu": lambda x: torch.nn.functional.relu(x).square(),
}
"""What multiplies the gate, by the name of the gated form."""


def answered(model: Any) -> Facts:
    """What a model computes with, by HF's names of fields; what it does not say is left out.

    Ghost groups of zeros are no part of the model: its config, which says how many groups are its own, is believed
    where the layers hold as many or more.
    """
    config, layers = model.config, list(model.model.layers)
    modules = [module for module in model.modules() if isinstance(getattr(module, "eps", None), float)]
    eps = sorted({float(module.eps) for module in modules})
    cores = [layer.self_attention.core_attention for layer in layers]
    head_dim = layers[0].self_attention.hidden_size_per_attention_head
    per_group = cores[0].num_attention_heads // cores[0].num_gqa_groups
    groups = min(cores[0].num_gqa_groups, config.num_key_value_heads)
    out: Facts = {
        "num_hidden_layers": len(layers),
        "hidden_size": layers[0].self_attention.layernorm_qkv.in_features,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": groups * per_group,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "rms_norm_eps": eps[0] if len(eps) == 1 else tuple(eps),
        "tie_word_embeddings": model.lm_head.weight is model.model.embed_tokens.weight,
        "attention_dropout": max(float(core.attention_dropout) for core in cores),
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        FREQUENCIES: model.model.rotary_emb.inv_freq.detach().float().cpu().numpy().ravel(),
        "sliding_window": None,
    }
    activations = {layer.layernorm_mlp.activation for layer in layers}
    name = activations.pop()
    known = _GATED.get(name) if not activations else None
    out[ACTIVATION] = sampled(known) if known else "a feed-forward part without a gate, or of several kinds"
    centred = [module for module in modules if getattr(module, "zero_centered_gamma", False)]
    if centred:
        out["normalization"] = f"{len(centred)} norms centred on zero"
    if dropout := max(float(layer.hidden_dropout) for layer in layers):
        out["hidden_dropout"] = dropout
    scales = {float(core.softmax_scale) for core in cores}
    if odd := [scale for scale in scales if not math.isclose(scale, head_dim**-0.5, rel_tol=2**-24)]:
        out["softmax_scale"] = odd[0]
    return out


def set_fields(model: Any) -> Mapping[str, str]:
    """Fields of the model's config that are not at their default, as text."""
    usual = type(model.config)().to_dict()
    return {name: repr(value) for name, value in model.config.to_dict().items() if value != usual.get(name)}
