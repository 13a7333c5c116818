"""The number formats below bf16, to the bit: codes from values and values from codes.

All rounding is to the nearest, ties to even, and all conversion saturates: a finite value or an infinity beyond the
largest goes to the largest, as CUDA's `satfinite` conversions do. NaN keeps its one code in E4M3 and E5M2; E2M1 has
none and takes its largest value.

Source: OCP 8-bit Floating Point Specification 1.0; OCP Microscaling Formats 1.0; TransformerEngine 2.20.2,
transformer_engine/common/util/ptx.cuh (`exp2f`, `exp2f_rcp`) and ptx_arch_spec.cuh (`float_to_e8m0`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class FloatFormat:
    """A binary floating-point format of at most eight bits.

    Attributes:
        name: As in the specification.
        mantissa: Stored mantissa bits.
        exponent: Exponent of the smallest normal number (and of the subnormals).
        largest: The largest finite value.
        dtype: torch's own dtype, or None where torch computes nothing in it.
    """

    name: str
    mantissa: int
    exponent: int
    largest: float
    dtype: torch.dtype | None = None

    def encode(self, values: Tensor) -> Tensor:
        """`values` rounded to this format.

        Args:
            values: fp32, any shape.

        Returns:
            uint8 of the same shape, one code an element.
        """
        if self.dtype is None:
            return _encode_e2m1(values)
        clamped = values.clamp(-self.largest, self.largest)
        codes = clamped.to(self.dtype).view(torch.uint8)
        nan = clamped.isnan()
        return codes.masked_fill(nan, 0x7F) if bool(nan.any()) else codes

    def decode(self, codes: Tensor) -> Tensor:
        """The values of `codes` (uint8), exactly, in fp32."""
        if self.dtype is None:
            return torch.tensor(E2M1_VALUES).index_select(0, codes.flatten().int()).view(codes.shape)
        return codes.view(self.dtype).float()

    def spacing(self, values: Tensor) -> Tensor:
        """The distance from each of `values` (fp32, of this format) to the next larger magnitude in its binade.

        Rounding to nearest misses by at most half of it at the rounded value.
        """
        _, exponent = torch.frexp(values)
        exponent = torch.where(values == 0, torch.full_like(exponent, self.exponent), exponent - 1)
        return torch.ldexp(torch.ones_like(values), exponent.clamp(min=self.exponent) - self.mantissa)


E4M3 = FloatFormat(name="e4m3", mantissa=3, exponent=-6, largest=448.0, dtype=torch.float8_e4m3fn)
E5M2 = FloatFormat(name="e5m2", mantissa=2, exponent=-14, largest=57344.0, dtype=torch.float8_e5m2)
E2M1 = FloatFormat(name="e2m1", mantissa=1, exponent=0, largest=6.0)

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def _encode_e2m1(values: Tensor) -> Tensor:
    magnitude, bits = _magnitude(values)
    # Below 1 the steps are of 1/2; above, the bits are rounded after the first of the mantissa.
    small = (magnitude * 2).round_().int()
    rounded = (bits >> 22).bitwise_and_(1).add_(bits).add_(0x1FFFFF)
    return _e2m1(magnitude, small, rounded, values)


def encode_e2m1_stochastic(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """`values` rounded to one of the two E2M1 neighbours, the nearer the likelier, so that the mean is exact.

    Args:
        values: fp32, any shape.
        generator: Where the random numbers come from; torch's default one otherwise.

    Returns:
        uint8 codes. Reproducible under a seed; the GPU's own random bits are not reproduced.
    """
    magnitude, bits = _magnitude(values)
    chance = torch.randint(1 << 22, values.shape, generator=generator, dtype=torch.int32)
    small = torch.floor(magnitude.double() * 2 + chance * 2.0**-22).int()
    return _e2m1(magnitude, small, bits + chance, values)


def _magnitude(values: Tensor) -> tuple[Tensor, Tensor]:
    magnitude = values.abs().nan_to_num_(nan=6.0, posinf=6.0).clamp_(max=6.0)
    return magnitude, magnitude.view(torch.int32)


def _e2m1(magnitude: Tensor, small: Tensor, rounded: Tensor, signed: Tensor) -> Tensor:
    # Exponent 127 with an empty mantissa is 1.0, code 2.
    code = torch.where(magnitude < 1, small, rounded.bitwise_right_shift_(22).sub_(252))
    return code.bitwise_or_((signed.view(torch.int32) >> 28).bitwise_and_(8)).to(torch.uint8)


def pack(codes: Tensor) -> Tensor:
    """Two E2M1 codes a byte, the first in the low half: `[... n]` to `[... n/2]`."""
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`: `[... n/2]` to `[... n]`."""
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)


def encode_e8m0(values: Tensor) -> Tensor:
    """The power of two at or above each of `values` (fp32, not negative), as a biased exponent in uint8.

    Zero is the smallest, 2^-127; infinity the largest, 2^127; NaN is 255.
    """
    bits = values.view(torch.int32)
    exponent, mantissa = (bits >> 23) & 0xFF, bits & 0x7FFFFF
    # A subnormal up to 2^-127 has a power of two above it that exponent 0 already is.
    up = (mantissa > 0) & ~((exponent == 0) & (mantissa <= 0x400000))
    code = (exponent + up.int()).clamp(max=0xFE)
    return code.masked_fill(values.isnan(), 0xFF).to(torch.uint8)


def decode_e8m0(codes: Tensor) -> Tensor:
    """2^(code - 127) in fp32, exactly; code 255 is NaN."""
    return _power(codes.int() - 127).masked_fill(codes == 0xFF, torch.nan)


def decode_e8m0_inverse(codes: Tensor) -> Tensor:
    """2^(127 - code) in fp32, exactly; code 255 is NaN."""
    return _power(127 - codes.int()).masked_fill(codes == 0xFF, torch.nan)


def _power(exponent: Tensor) -> Tensor:
    return torch.ldexp(torch.ones(exponent.shape, dtype=torch.float64), exponent).float()
