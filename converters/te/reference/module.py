"""What the reference layers have in common: their GEMMs, in the recipe of the moment."""

from __future__ import annotations

import torch
from torch import Tensor


class Module(torch.nn.Module):
    """A layer with one or more GEMMs, each `x @ weight.T + bias`.

    Args:
        gemms: How many; `LayerNormMLP` has two.
    """

    def __init__(self, *, gemms: int = 1) -> None:
        super().__init__()
        self.gemms = gemms

    def gemm(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, index: int = 0) -> Tensor:
        """`x @ weight.T + bias`, forward and backward in the recipe of the enclosing `autocast`, if there is one.

        Args:
            x: `[... in]`.
            weight: `[out in]`.
            bias: `[out]`.
            index: Which of the layer's GEMMs.

        Returns:
            `[... out]` in the dtype of `x`.
        """
        return torch.nn.functional.linear(x, weight, bias)
