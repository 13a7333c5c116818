"""A quantised matrix: codes and scales, what they stand for, and how far that is from the original at most."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from converters.te.quantization.formats import E4M3, FloatFormat, pack


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A matrix `[rows cols]` whose `cols` is the dimension that a GEMM sums over.

    Columnwise usage of a tensor `[m n]` is its transpose here, `[n m]`.

    Attributes:
        format: Of the elements.
        codes: `[rows cols]` uint8, one element a byte.
        scale_inv: fp32, `[ceil(rows / block[0]) ceil(cols / block[1])]`: what an element is multiplied by.
        block: How many rows and columns share a scale; None where all do (`scale_inv` is then `[1 1]`).
        scale_codes: uint8, the scales as they are stored where that is not fp32 (E8M0, E4M3).
        global_amax: fp32 scalar: the second level of scales, `global_amax * unit`; None without one.
        unit: See there.
        amax: fp32 scalar: the largest magnitude of the original, where there is one scale for all.
        columnwise: Whether this is the transpose of what was quantised.
        excess: fp32 scalar or like `scale_inv`, in scaled units: how far the largest value was beyond the format.
        stochastic: Whether elements were rounded to a neighbour by chance.
    """

    format: FloatFormat
    codes: Tensor
    scale_inv: Tensor
    block: tuple[int, int] | None = None
    scale_codes: Tensor | None = None
    global_amax: Tensor | None = None
    unit: float = 1.0
    amax: Tensor | None = None
    columnwise: bool = False
    excess: Tensor | None = None
    stochastic: bool = False

    def transposed(self) -> Quantized:
        """The same values the other way round, where blocks are square."""
        assert self.block is None or self.block[0] == self.block[1]
        return replace(
            self,
            codes=self.codes.T,
            scale_inv=self.scale_inv.T,
            scale_codes=None if self.scale_codes is None else self.scale_codes.T,
            excess=None if self.excess is None else self.excess.T,
            columnwise=not self.columnwise,
        )

    def expand(self, scales: Tensor) -> Tensor:
        """`scales`, one a block, to one an element or to a shape that broadcasts."""
        if self.block is None:
            return scales
        rows, cols = self.codes.shape
        for dim, size in enumerate(self.block):
            if size > 1:
                scales = scales.repeat_interleave(size, dim=dim)
        return scales[:rows, :cols]

    def operand(self) -> Tensor:
        """`[rows cols]` fp32: the elements with the scale of their block, before that of the whole tensor."""
        values = self.format.decode(self.codes)
        return values if self.block is None else values * self.expand(self.scale_inv)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """`[rows cols]` in `dtype`, as Transformer Engine's own dequantisation rounds."""
        scale = self.scale_inv
        if self.global_amax is not None:
            scale = scale * self.global_amax * torch.tensor(self.unit, dtype=torch.float32)
        return (self.format.decode(self.codes) * self.expand(scale)).to(dtype)

    def bound(self) -> Tensor:
        """The largest distance of each original element from `dequantize()`: `[rows cols]`, fp64.

        Half the spacing of the format at the rounded value (all of it under stochastic rounding); more where the
        format's largest value cut something off; and the roundings of the scales themselves, in fp32.
        For operands that went through a Hadamard transform, of the transformed ones.
        """
        values = self.format.decode(self.codes)
        reach = self.format.spacing(values).double() * (1.0 if self.stochastic else 0.5)
        if self.excess is not None:
            largest = values.abs() == self.format.largest
            reach = torch.where(largest, torch.maximum(reach, self.expand(self.excess).double()), reach)
        scale = self.expand(self.scale_inv).double()
        level = 1.0 if self.global_amax is None else float(self.global_amax) * self.unit
        bound = reach * scale * level
        if self.global_amax is not None:
            # A block scale that E4M3 rounded down leaves its largest elements beyond the largest code.
            short = self.expand(E4M3.spacing(self.scale_inv) * 0.5).double() * self.format.largest * level
            bound = torch.where(values.abs() == self.format.largest, torch.maximum(bound, short), bound)
        rounding = 2.0**-21 * (values.abs().double() * scale * level + bound) + 2.0**-148 * (values.abs() + 1)
        return bound + rounding

    def stored(self) -> tuple[Tensor, Tensor]:
        """Data and scales in Transformer Engine's own layout, before padding and swizzling.

        Returns:
            Data (uint8; E2M1 packed two a byte) and dequantisation scales (fp32, or the codes of E8M0 and E4M3).
            Per tensor: `[rows cols]` and `[1]`. 1 x 128 blocks: scales are stored block by row, `[cols/128 rows]`.
            MXFP8 columnwise: neither is transposed. NVFP4: one scale for each row, also of 16 x 16 blocks.

        Source: TransformerEngine 2.20.2, transformer_engine/pytorch/csrc/quantizer.cpp, `get_scale_shape` of each.
        """
        scales = self.scale_inv if self.scale_codes is None else self.scale_codes
        if self.block is None:
            return self.codes, scales.reshape(1)
        if self.global_amax is not None:
            return pack(self.codes), scales.repeat_interleave(self.block[0], dim=0)[: self.codes.shape[0]]
        if self.scale_codes is not None and self.columnwise:
            return self.codes.T, scales.T
        if self.scale_codes is None and self.block[0] == 1:
            return self.codes, scales.T
        return self.codes, scales


def product_scale(left: Quantized, right: Quantized) -> Tensor:
    """What the sum of products of two operands is multiplied by: fp32, `[1 1]` or scalar."""
    if left.global_amax is not None and right.global_amax is not None:
        return left.global_amax * right.global_amax * torch.tensor(left.unit * right.unit, dtype=torch.float32)
    one = torch.ones((), dtype=torch.float32)
    scales = [each.scale_inv if each.block is None else one for each in (left, right)]
    return scales[0] * scales[1]
