"""The config of the Llama model on Transformer Engine layers: a Llama config, and how its layers run."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from converters.errors import ConfigError

FORMATS = ("bshd", "thd")
MASKS = ("padding_causal", "causal", "padding", "no_mask")
PRECISIONS = ("fp8", "fp4", None)

# What multiplies the gate, by the name that Transformer Engine gives the gated form. Its GELU is the tanh
# approximation, so the exact one ("gelu") has no counterpart.
# Source: transformer_engine 2.20.2, pytorch/module/layernorm_mlp.py, _get_act_func_supported_list, and
#   common/util/math.h, gelu and qgelu; transformers 5.23.0, activations.py, ACT2CLS.
ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu",
    "gelu_new": "geglu",
    "quick_gelu": "qgeglu",
    "relu": "reglu",
    "relu2": "sreglu",
}

ROPE_THAT_MOVES = ("dynamic", "longrope")  # their frequencies depend on how long the sequence is


class NVLlamaConfigError(ConfigError, ValueError):
    """A config that the model cannot be built from."""


class NVLlamaConfig(LlamaConfig):
    """A Llama on Transformer Engine layers.

    Reads what the BioNeMo recipe writes, whose `model_type` is `llama`, and takes its defaults where a file names
    neither format nor mask.

    Attributes:
        attn_input_format: What the layers are given: `bshd` (a padded batch) or `thd` (sequences packed one after
            another; a padded batch is packed on the way in and padded again on the way out).
        self_attn_mask_type: `padding_causal` or `causal` for a language model; `padding` or `no_mask` attend both ways.
        layer_precision: `"fp8"`, `"fp4"` or `None` for each layer; `None` for the whole list asks for no quantisation,
            unless the model is given an FP8 recipe, which then holds for every layer.
        use_quantized_model_init: Whether quantised layers hold quantised weights only.

    Raises:
        NVLlamaConfigError: A field whose value the layers cannot compute.

    Source: NVIDIA/bionemo-framework, bionemo-recipes/models/llama3/modeling_llama_te.py, NVLlamaConfig.
    """

    model_type = "nvllama"

    attn_input_format: str = "thd"
    self_attn_mask_type: str = "padding_causal"
    layer_precision: list[str | None] | None = None
    use_quantized_model_init: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("model_type", None)  # of the config that this one is made from
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self.check()

    def check(self) -> None:
        """Refuse what the layers cannot compute, all of it at once.

        Raises:
            NVLlamaConfigError: See the class.
        """
        wrong = [*self._wrong_layers(), *self._wrong_rope()]
        if wrong:
            raise NVLlamaConfigError("\n".join(["this config has no Transformer Engine model:", *wrong]))

    @property
    def te_activation(self) -> str:
        """The activation as Transformer Engine calls it."""
        return ACTIVATIONS[self.hidden_act]

    @property
    def te_bias(self) -> bool:
        """Transformer Engine's one switch for the biases of all four linears of a layer."""
        return bool(self.attention_bias or self.mlp_bias)

    def _wrong_layers(self) -> list[str]:
        wrong = []
        if self.attn_input_format not in FORMATS:
            wrong.append(f"  attn_input_format must be one of {FORMATS}, got {self.attn_input_format!r}")
        if self.self_attn_mask_type not in MASKS:
            wrong.append(f"  self_attn_mask_type must be one of {MASKS}, got {self.self_attn_mask_type!r}")
        elif self.attn_input_format == "thd" and not self.self_attn_mask_type.startswith("padding"):
            wrong.append(
                f"  self_attn_mask_type={self.self_attn_mask_type!r} does not tell packed sequences apart: "
                "attn_input_format='thd' takes 'padding_causal' or 'padding'"
            )
        precisions, layers = self.layer_precision, self.num_hidden_layers
        if precisions is not None and len(precisions) != layers:
            wrong.append(f"  layer_precision must be a list of length {layers}, got {len(precisions)} elements")
        for precision in dict.fromkeys(precisions or ()):
            if precision not in PRECISIONS:
                wrong.append(f'  layer_precision element must be "fp8", "fp4", or None, got {precision!r}')
        if self.hidden_act not in ACTIVATIONS:
            exact = " (its GELU is the tanh approximation: gelu_pytorch_tanh)" if self.hidden_act == "gelu" else ""
            wrong.append(f"  hidden_act must be one of {tuple(ACTIVATIONS)}{exact}, got {self.hidden_act!r}")
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            wrong.append(
                f"  num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        return wrong

    def _wrong_rope(self) -> list[str]:
        rope = self.rope_parameters or {}
        kind = rope.get("rope_type", "default")
        if kind in ROPE_THAT_MOVES:
            return [f"  rope_type={kind!r} changes the frequencies with the length of the sequence: they must be fixed"]
        if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
            return [f"  rope_type must be one of {('default', *ROPE_INIT_FUNCTIONS)}, got {kind!r}"]
        if (partial := rope.get("partial_rotary_factor")) not in (None, 1.0):
            return [f"  partial_rotary_factor={partial}: a Llama rotates whole heads"]
        if kind != "default" and (scaling := ROPE_INIT_FUNCTIONS[kind](self, "cpu")[1]) != 1.0:
            return [
                f"  rope_type={kind!r} scales cosine and sine by {scaling}: the layers take angles, which cannot "
                "carry a scale; only attention_factor=1 can be computed"
            ]
        return []
