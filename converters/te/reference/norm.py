"""RMSNorm and LayerNorm as Transformer Engine computes them: in float32 inside, rounded once.

HF's `LlamaRMSNorm` rounds twice below float32: the normalised values, and their product with the weight.

Source: TransformerEngine 2.20.2, transformer_engine/common/normalization/rmsnorm/rmsnorm_fwd_kernels.cuh (the product
with gamma is of the compute type, float32, and only the result is cast), pytorch/module/rmsnorm.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from converters.errors import ConversionError
from converters.te.reference.parameters import Layer, Slot, refuse

KINDS = ("RMSNorm", "LayerNorm")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in where `dtype` is stored: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, zero_centered_gamma: bool, rounded: bool = True
) -> Tensor:
    """Normalise the last dimension: LayerNorm where there is a bias, RMSNorm where there is none.

    Args:
        x: `[... h]`.
        weight: `[h]`, less one where `zero_centered_gamma`.
        bias: `[h]`.
        eps: Added to the mean square (inside the root).
        zero_centered_gamma: Whether that is so.
        rounded: False hands on what was computed, for a GEMM that quantises it.

    Returns:
        `[... h]` in the dtype of `x`, or what it was computed in.
    """
    wide = x.to(compute_dtype(x.dtype))
    dtype = x.dtype if rounded else wide.dtype
    gamma = weight.to(wide.dtype)
    gamma = gamma + 1 if zero_centered_gamma else gamma
    if bias is None:
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * gamma).to(dtype)
    return torch.nn.functional.layer_norm(wide, wide.shape[-1:], gamma, bias.to(wide.dtype), eps).to(dtype)


def add_norm(
    layer: Layer,
    size: int,
    *,
    kind: str,
    zero_centered_gamma: bool,
    sequence_parallel: bool,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> None:
    """Give a linear layer the norm before it: `layer_norm_weight` and, for LayerNorm, `layer_norm_bias`.

    Raises:
        ConversionError: Transformer Engine has no such norm.
    """
    if kind not in KINDS:
        raise ConversionError(f"expected normalization to be one of {', '.join(KINDS)}, found {kind!r}")
    start = torch.nn.init.zeros_ if zero_centered_gamma else torch.nn.init.ones_
    slot = Slot(init=start, sequence_parallel=sequence_parallel)
    layer.add("layer_norm_weight", torch.empty(size, dtype=dtype, device=device), slot)
    if kind == "LayerNorm":
        slot = Slot(init=torch.nn.init.zeros_, sequence_parallel=sequence_parallel)
        layer.add("layer_norm_bias", torch.empty(size, dtype=dtype, device=device), slot)
    else:
        layer.register_parameter("layer_norm_bias", None)


class RMSNorm(Layer):
    """`transformer_engine.pytorch.RMSNorm`.

    Args:
        normalized_shape: Size of the last dimension.
        eps: Added to the mean square.
        sequence_parallel: Written on the weight: its gradient is of this rank's part of the sequence.
        params_dtype: Older name of `dtype`.
        zero_centered_gamma: The weight is stored less one.
        device: Where the weight is made.
        dtype: Of the weight; torch's default dtype where None.

    Raises:
        ConversionError: An option that the reference lacks.
    """

    weight: torch.nn.Parameter

    OFF: Mapping[str, object] = {"hidden_size": None, "sm_margin": 0}

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: object,
    ) -> None:
        super().__init__(gemms=0)
        refuse("RMSNorm", options, self.OFF, {"normalized_shape": None, "zero_centered_gamma": None, "dtype": None})
        self.eps, self.zero_centered_gamma, self.sequence_parallel = eps, zero_centered_gamma, sequence_parallel
        start = torch.nn.init.zeros_ if zero_centered_gamma else torch.nn.init.ones_
        dtype = dtype or params_dtype or torch.get_default_dtype()
        slot = Slot(init=start, sequence_parallel=sequence_parallel)
        self.add("weight", torch.empty(normalized_shape, dtype=dtype, device=device), slot)
        self.reset_parameters(defer_init=self.weight.is_meta)

    def forward(self, input: Tensor) -> Tensor:
        """`[... h]` to `[... h]` in the dtype of the weight."""
        weight = self.weight
        return normalize(
            input.to(weight.dtype), weight, None, eps=self.eps, zero_centered_gamma=self.zero_centered_gamma
        )
