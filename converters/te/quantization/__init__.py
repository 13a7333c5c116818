"""FP8 and below, as Transformer Engine computes them, in torch."""

from __future__ import annotations

from converters.te.quantization.recipes import PRECISIONS, compute_capability, recipe_of
from converters.te.quantization.state import autocast, quantized_model_init

__all__ = ["PRECISIONS", "autocast", "compute_capability", "quantized_model_init", "recipe_of"]
