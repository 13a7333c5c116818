"""Scales from largest magnitudes.

Source: TransformerEngine 2.20.2, transformer_engine/common/recipe/recipe_common.cuh (`compute_scale_from_amax`).
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT32_MAX = torch.finfo(torch.float32).max


def amax_of(x: Tensor, dim: int | tuple[int, ...] = ()) -> Tensor:
    """The largest magnitude, fp32, over all of `x` or over `dim`. NaN does not count, as with CUDA's `fmaxf`."""
    magnitude = x.abs()
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32)
    found = magnitude.amax(dim)
    if bool(found.isnan().any()):
        found = magnitude.nan_to_num(nan=0.0, posinf=torch.inf).amax(dim)
    return found.float()


def scale_of(
    amax: Tensor, *, largest: float, epsilon: float = 0.0, power_of_two: bool = False, ceiling: float = FLOAT32_MAX
) -> Tensor:
    """The factor that takes `amax` to `largest`.

    Args:
        amax: fp32, any shape.
        largest: The largest value of the format.
        epsilon: The least `amax` to reckon with.
        power_of_two: Round the factor down to a power of two.
        ceiling: The factor where the quotient overflows fp32.

    Returns:
        fp32 of the same shape; 1 where `amax` is zero or infinite.
    """
    amax = amax.clamp(min=epsilon)
    scale = torch.full_like(amax, largest) / amax
    scale = torch.where(scale.isinf(), torch.full_like(scale, ceiling), scale)
    if power_of_two:
        scale = (scale.view(torch.int32) & ~0x7FFFFF).view(torch.float32)
    return torch.where(amax.isinf() | (amax == 0), torch.ones_like(scale), scale)
