"""What a conversion may do to a value besides moving it: a closed set, each with the bound that it promises.

A plain move has no value map and keeps every bit. Everything here is declared in a table or asked for by the caller,
shows in the plan, and is refused otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Unit roundoff: half the distance from 1 to the next number, so the relative error of rounding to nearest.
ROUNDOFF: dict[str, float] = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class Constant:
    """Elements that one format has and the other does not: written on the way there, verified on the way back."""

    value: float


@dataclass(frozen=True)
class Shift:
    """The `column` side stores `x + by` (`by=-1` for a norm weight that is centred on zero).

    Adding rounds once, so the way back returns `x` within `bound` and not to the bit.
    """

    column: str
    by: float

    def bound(self, dtype: str, largest: float) -> float:
        """Largest absolute error of there and back for values up to `largest` in magnitude.

        Two roundings, each of a number no larger than `largest + |by|`.
        """
        return 2 * ROUNDOFF[dtype] * (largest + abs(self.by))


@dataclass(frozen=True)
class Cast:
    """A change of dtype, rounding to nearest even. Only on request: a plan by itself never changes a dtype."""

    source: str
    target: str

    @property
    def exact(self) -> bool:
        """Whether every value of `source` is one of `target`."""
        return (self.source, self.target) in {
            ("bfloat16", "float32"),
            ("float16", "float32"),
            ("bfloat16", "float64"),
            ("float16", "float64"),
            ("float32", "float64"),
        }

    @property
    def bound(self) -> float:
        """Largest relative error for values in the normal range of `target`."""
        return 0.0 if self.exact else ROUNDOFF[self.target]


@dataclass(frozen=True)
class Quantize:
    """Numbers of four significant bits (e4m3) times a scale that a block of elements shares, read back as `dtype`.

    A bfloat16 scale times an e4m3 number is exact in float32, so reading back rounds in a narrower `dtype` only.

    Source: Micikevicius et al., FP8 Formats for Deep Learning (arXiv 2209.05433), table 1: e4m3 has numbers up to 448,
        normal ones from 2^-6, subnormal ones 2^-9 apart, no infinity.
    """

    dtype: str

    def bound(self, value: float, scale: float) -> float:
        """Largest absolute error of there and back for one element of a block with that scale.

        Half the distance between neighbours of e4m3 at `value`, times the scale, and the roundings of the division and
        of reading back.

        Args:
            value: The element, at most 464 scales in magnitude: what rounds to 448 and does not saturate.
            scale: A bfloat16 number.
        """
        binade = math.frexp(min(abs(value) / scale, 448.0))[1] - 1
        half = 2.0 ** (max(binade, -6) - 4) * scale
        error = half + ROUNDOFF["float32"] * abs(value)
        if self.dtype == "float32":
            return error
        return error + ROUNDOFF[self.dtype] * (abs(value) + error) + 2.0**-134  # half of bfloat16's last subnormal step


@dataclass(frozen=True)
class Tie:
    """The `column` side holds a second copy of elements that another rule already places.

    Towards that side the copy is written; away from it, it must equal what is already there, bit for bit.
    """

    column: str


@dataclass(frozen=True)
class Drop:
    """Elements of the `column` side that have no counterpart, for a reason that a reader can check."""

    column: str
    reason: str


Value = Shift | Tie | Drop
