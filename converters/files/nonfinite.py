"""Numbers that are none, counted in raw bytes: two maxima tell that there are none of them, which is as a rule so."""

from __future__ import annotations

from converters.files.mapped import Bits, bits_of

INFINITY = {
    "bfloat16": 0x7F80,
    "float16": 0x7C00,
    "float32": 0x7F80_0000,
    "float64": 0x7FF0_0000_0000_0000,
    "float8_e5m2": 0x7C,
    "float8_e4m3fn": 0x7F,
}
"""The bits from which positive numbers are infinite or NaN; negative ones are from there on with the sign bit set."""
NAN = {"float8_e4m3fnuz": 0x80, "float8_e5m2fnuz": 0x80, "float8_e8m0fnu": 0xFF}
"""The one code that is no number, of dtypes that have no other.

Source: pytorch 2.13.0, torch/headeronly/util/Float8_e4m3fnuz.h, Float8_e5m2fnuz.h and Float8_e8m0fnu.h (`isnan`).
"""


def count_nonfinite(block: Bits, dtype: str) -> int:
    """How many elements of some bytes are NaN or infinite.

    Args:
        block: The bytes.
        dtype: What they are; integers are all finite.
    """
    if dtype in NAN:
        return int((block == NAN[dtype]).sum())
    least = INFINITY.get(dtype)
    if least is None or not block.size:
        return 0
    unsigned = block.view(bits_of(dtype))
    sign = 1 << (8 * unsigned.itemsize - 1)
    signed = unsigned.view(f"i{unsigned.itemsize}")
    if signed.max() < least and unsigned.max() < sign + least:
        return 0
    return int(((unsigned & (sign - 1)) >= least).sum())
