"""Converters to Transformer Engine's layers that are wrong in one known way each. Sent to ranks by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parity.converter import Own, Settings

# Over two ranks every size of a linear layer is a multiple of 32, and no two axes are of one size.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_size": 96,
    "intermediate_size": 448,
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
class Broken(Own):
    """Imports what it is asked to, and breaks the model."""

    how: str

    def to_te(self, folder: Path, settings: Settings) -> Any:
        model = super().to_te(folder, settings)
        with torch.no_grad():
            BREAKS[self.how](model)
        return model


@dataclass(frozen=True)
class Exporting(Own):
    """Breaks the model before it is exported."""

    how: str

    def te_to_hf(self, model: Any, source: Path, target: Path) -> None:
        with torch.no_grad():
            BREAKS[self.how](model)
        super().te_to_hf(model, source, target)


class OneWay:
    """A converter to Megatron-Core alone."""

    def to_megatron(self, folder: Path, settings: Settings) -> Any:
        raise NotImplementedError

    def to_hf(self, chunks: Any, source: Path, target: Path) -> None:
        raise NotImplementedError


def _keys_for_values(model: Any) -> None:
    """The last two of the blocks of a group: its key and its value, in every layer."""
    for layer in model.model.layers:
        weight = layer.self_attention.layernorm_qkv.weight
        groups = weight.unflatten(0, (-1, 5, 32))
        groups.copy_(groups[:, [0, 1, 2, 4, 3]].clone())


def _up_for_gate(model: Any) -> None:
    for layer in model.model.layers:
        weight = layer.layernorm_mlp.fc1_weight
        weight.copy_(torch.cat(weight.chunk(2)[::-1]))


def _default_eps(model: Any) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "eps", None), float):
            module.eps = 1e-5


def _unquantised(model: Any) -> None:
    """The recipe is forgotten: every product is of bfloat16."""
    from converters.te.precision import Precision

    model.model.precision = Precision(of=(), recipes={}, quantized_init=False)


def _rounded_frequencies(model: Any) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.bfloat16().float()


def _stale_cache(model: Any) -> None:
    """Beams go on from their own keys and values, whichever beam they continue."""
    from converters.te import generation

    generation.HFInferenceParams.reorder_cache = lambda self, beams: None  # type: ignore[method-assign]


BREAKS: dict[str, Any] = {
    "k and v": _keys_for_values,
    "gate and up": _up_for_gate,
    "eps": _default_eps,
    "quantisation": _unquantised,
    "frequencies": _rounded_frequencies,
    "beams": _stale_cache,
}
