"""The order in which transformers' models list their tensors, which is the order in which their files are filled."""

from __future__ import annotations

from collections.abc import Iterable

NAMES = (
    *("model", "embed_tokens", "layers"),
    *("self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
    *("mlp", "block_sparse_moe", "gate", "experts", "gate_proj", "up_proj", "down_proj"),
    *("input_layernorm", "post_attention_layernorm"),
    *("norm", "lm_head", "weight", "bias"),
)
"""Parts of keys, those of one module in the order in which its constructor makes them; others follow, by name.

Source: huggingface/transformers 5.23, models/llama/modeling_llama.py, `LlamaDecoderLayer`, `LlamaAttention`,
    `LlamaMLP`, `LlamaModel`, `LlamaForCausalLM`.
"""
PLACES = {name: place for place, name in enumerate(NAMES)}


def in_module_order(keys: Iterable[str]) -> list[str]:
    """The keys, layer by layer."""
    return sorted(keys, key=lambda key: [_place(part) for part in key.split(".")])


def _place(part: str) -> tuple[int, int, str]:
    number = int(part) if part.isascii() and part.isdigit() and len(part) < 10 else 0
    return PLACES.get(part, len(PLACES)), number, part
