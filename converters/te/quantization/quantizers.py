"""One quantizer for each scheme: a matrix to codes and scales, to the bit as Transformer Engine's kernels do.

Source: TransformerEngine 2.20.2, transformer_engine/common: cast/fp8/quantize_fp8.cuh, recipe/current_scaling.cu,
transpose/quantize_transpose_{vector,square}_blockwise.cu, cast/mxfp8/quantize_mxfp8.cuh,
cast/nvfp4/{core_nvfp4,quantize_transpose_nvfp4}.cuh; and pytorch/csrc/quantizer.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from converters.errors import ConversionError
from converters.te.quantization import hadamard
from converters.te.quantization.formats import (
    E2M1,
    E4M3,
    FloatFormat,
    decode_e8m0,
    decode_e8m0_inverse,
    encode_e2m1_stochastic,
    encode_e8m0,
)
from converters.te.quantization.quantized import Quantized
from converters.te.quantization.scaling import FLOAT32_MAX, amax_of, scale_of


class Quantizer(Protocol):
    """How one operand of a GEMM is quantised."""

    def quantize(self, x: Tensor, *, columnwise: bool = False) -> Quantized:
        """`x` `[m n]`, to be summed over `n`, or over `m` when `columnwise` (the result is then `[n m]`).

        Always from the original: where blocks are not square, the two usages are not each other's transpose.
        """


@dataclass(frozen=True, kw_only=True)
class DelayedQuantizer:
    """A scale that was made of earlier steps, and a record of the largest magnitude for the steps to come.

    Attributes:
        format: Of the elements.
        scale: fp32 scalar, a view into the state.
        amax: fp32 scalar, a view into the newest row of the history; raised in place.
    """

    format: FloatFormat
    scale: Tensor
    amax: Tensor

    def quantize(self, x: Tensor, *, columnwise: bool = False) -> Quantized:
        amax = amax_of(x)
        self.record(amax)
        result = _per_tensor(x, self.scale.clone(), amax, self.format)
        return result.transposed() if columnwise else result

    def record(self, amax: Tensor) -> None:
        """Raise the newest largest magnitude to `amax`."""
        with torch.no_grad():
            self.amax.copy_(torch.maximum(self.amax, amax))


@dataclass(frozen=True, kw_only=True)
class CurrentQuantizer:
    """A scale from the tensor's own largest magnitude.

    Attributes:
        format: Of the elements.
        epsilon: The least magnitude to reckon with.
        power_of_two: Whether the scale is rounded down to a power of two.
        rounded: The dtype that elements are rounded to after the largest magnitude was taken, as after an activation
            that records it; None to take them as they are.
    """

    format: FloatFormat
    epsilon: float = 0.0
    power_of_two: bool = False
    rounded: torch.dtype | None = None

    def quantize(self, x: Tensor, *, columnwise: bool = False) -> Quantized:
        amax = amax_of(x)
        x = x if self.rounded is None else x.to(self.rounded)
        scale = scale_of(amax, largest=self.format.largest, epsilon=self.epsilon, power_of_two=self.power_of_two)
        result = _per_tensor(x, scale, amax, self.format)
        return result.transposed() if columnwise else result


def _per_tensor(x: Tensor, scale: Tensor, amax: Tensor, target: FloatFormat) -> Quantized:
    return Quantized(
        format=target,
        codes=target.encode(x.float() * scale),
        scale_inv=scale.reciprocal().reshape(1, 1),
        amax=amax,
        excess=(amax * scale - target.largest).clamp(min=0).reshape(1, 1),
    )


@dataclass(frozen=True, kw_only=True)
class BlockQuantizer:
    """A scale from the largest magnitude of each block of 1 x 128 or 128 x 128 elements; short ones at the edges."""

    format: FloatFormat
    block: tuple[int, int]
    epsilon: float = 0.0
    power_of_two: bool = True

    def quantize(self, x: Tensor, *, columnwise: bool = False) -> Quantized:
        ceiling = float(torch.finfo(x.dtype).max)
        x = x.T if columnwise else x
        amax = _block_amax(x, self.block)
        scale = scale_of(
            amax,
            largest=self.format.largest,
            epsilon=self.epsilon,
            power_of_two=self.power_of_two,
            ceiling=ceiling,
        )
        return Quantized(
            format=self.format,
            codes=self.format.encode(x.float() * _expand(scale, self.block, x.shape)),
            scale_inv=scale.reciprocal(),
            block=self.block,
            columnwise=columnwise,
            excess=(amax * scale - self.format.largest).clamp(min=0),
        )


@dataclass(frozen=True, kw_only=True)
class MXQuantizer:
    """A power of two for each 32 elements (or 32 x 32): the least that brings the largest of them into the format."""

    format: FloatFormat
    block: tuple[int, int] = (1, 32)

    def quantize(self, x: Tensor, *, columnwise: bool = False) -> Quantized:
        """See `Quantizer.quantize`.

        Raises:
            ConversionError: A dimension that is not a multiple of 32.
        """
        _require(x, 32, "MXFP8")
        x = x.T if columnwise else x
        amax = _block_amax(x, self.block)
        # The kernel multiplies by the rounded reciprocal; a division would differ in the last bit.
        codes = encode_e8m0(amax * torch.tensor(1.0 / self.format.largest, dtype=torch.float32))
        factor = _expand(decode_e8m0_inverse(codes), self.block, x.shape)
        return Quantized(
            format=self.format,
            codes=self.format.encode(x.float() * factor),
            scale_inv=decode_e8m0(codes),
            scale_codes=codes,
            block=self.block,
            columnwise=columnwise,
            excess=(amax * decode_e8m0_inverse(codes) - self.format.largest).clamp(min=0),
        )


@dataclass(frozen=True, kw_only=True)
class NVFP4Quantizer:
    """E2M1 elements, an E4M3 scale for each 16 (or 16 x 16) of them, and one fp32 scale for all.

    Attributes:
        block: `(1, 16)` or `(16, 16)`.
        transform: Whether columnwise usage goes through the random Hadamard transform.
        stochastic: Whether elements are rounded by chance.
        generator: Where the chance comes from; torch's default generator otherwise.
    """

    block: tuple[int, int] = (1, 16)
    transform: bool = False
    stochastic: bool = False
    generator: torch.Generator | None = None

    def quantize(self, x: Tensor, *, columnwise: bool = False) -> Quantized:
        """See `Quantizer.quantize`.

        Raises:
            ConversionError: A dimension that is not a multiple of 16, or another dtype than bf16 before a transform.
        """
        _require(x, 16, "NVFP4")
        if self.transform and x.dtype != torch.bfloat16:
            raise ConversionError(
                f"NVFP4 transforms bfloat16 tensors alone, found {x.dtype}: use bfloat16 parameters and activations, "
                "or NVFP4BlockScaling(disable_rht=True)"
            )
        x = x.T if columnwise else x
        if self.transform and columnwise:
            x = hadamard.transform(x)
        global_amax = amax_of(x)
        one = torch.ones((), dtype=torch.float32)
        encode = (one * (E4M3.largest * E2M1.largest) / global_amax).clamp(max=FLOAT32_MAX)
        encode = torch.where((global_amax == 0) | (encode == 0), one, encode)
        decode = one / encode
        amax = _block_amax(x, self.block)
        scale_codes = E4M3.encode((amax * (encode * torch.tensor(1.0 / 6.0))).clamp(max=FLOAT32_MAX))
        scale_inv = E4M3.decode(scale_codes)
        factor = (one / (scale_inv * decode)).clamp(max=FLOAT32_MAX)
        scaled = x.float() * _expand(factor, self.block, x.shape)
        return Quantized(
            format=E2M1,
            codes=encode_e2m1_stochastic(scaled, self.generator) if self.stochastic else E2M1.encode(scaled),
            scale_inv=scale_inv,
            scale_codes=scale_codes,
            block=self.block,
            global_amax=global_amax,
            unit=1.0 / (E4M3.largest * E2M1.largest),
            columnwise=columnwise,
            stochastic=self.stochastic,
        )


def _block_amax(x: Tensor, block: tuple[int, int]) -> Tensor:
    rows, cols = x.shape
    short = (-rows % block[0], -cols % block[1])
    if any(short):
        x = torch.nn.functional.pad(x, (0, short[1], 0, short[0]))
    tiles = x.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
    return amax_of(tiles, (1, 3))


def _expand(scales: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    for dim, size in enumerate(block):
        if size > 1:
            scales = scales.repeat_interleave(size, dim=dim)
    return scales[: shape[0], : shape[1]]


def _require(x: Tensor, multiple: int, scheme: str) -> None:
    rows, cols = x.shape
    if rows % multiple or cols % multiple:
        raise ConversionError(
            f"{scheme} quantises blocks of {multiple} in both directions: a tensor of {rows} rows (tokens, or outputs "
            f"of a weight) and {cols} columns has {rows % multiple} rows and {cols % multiple} columns over. Pad the "
            f"batch to a multiple of {multiple} tokens (pad_to_multiple_of={multiple}), or choose a per-tensor recipe"
        )
