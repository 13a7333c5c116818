"""The layers of Transformer Engine that the model uses, in torch: same names, parameters and meaning."""

from converters.te.reference.attention import DotProductAttention
from converters.te.reference.inference import InferenceParams
from converters.te.reference.layernorm_linear import LayerNormLinear
from converters.te.reference.layernorm_mlp import LayerNormMLP
from converters.te.reference.linear import Linear
from converters.te.reference.multi_head_attention import MultiheadAttention
from converters.te.reference.norm import RMSNorm
from converters.te.reference.transformer import TransformerLayer

__all__ = [
    "DotProductAttention",
    "InferenceParams",
    "LayerNormLinear",
    "LayerNormMLP",
    "Linear",
    "MultiheadAttention",
    "RMSNorm",
    "TransformerLayer",
]
