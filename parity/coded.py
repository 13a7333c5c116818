"""Weights whose every element says where it came from.

The elements of a checkpoint are numbered through, tensor after tensor. In float32 the number is stored as a bit
pattern: one pattern a number, never NaN, infinite, zero or subnormal, so that neither a copy nor a device that flushes
subnormals changes it. Neighbours are sent far apart, so that even a tolerant comparison sees an exchange. A wrong
tensor can then be asked what it is made of (`where_from`).

bfloat16 has 65,024 such patterns and cannot number a checkpoint: there each element is a hash of its number. A
misplaced element still differs, but for one in 65,024, and cannot say where it came from.
"""

from __future__ import annotations

import math
import struct

import numpy as np

from converters.errors import ConfigError, near

_NORMAL = 254 << 23  # positive normal float32 patterns, the first of them 1 << 23
CAPACITY = 2 * _NORMAL
"""Numbers that float32 can hold: 4,261,412,864."""
_STRIDE = 2_654_435_761  # prime, and so coprime to CAPACITY = 127 * 2**25: n -> n * _STRIDE is one to one
_BACK = pow(_STRIDE, -1, CAPACITY)
_NORMAL_BF16 = 254 << 7

Table = dict[str, tuple[int, ...]]


def starts(table: Table) -> dict[str, int]:
    """The number of each tensor's first element."""
    out, number = {}, 0
    for key, shape in table.items():
        out[key] = number
        number += math.prod(shape)
    return out


def require_room(count: int) -> None:
    """Refuse more elements than float32 has codes.

    Raises:
        ConfigError: There are more than `CAPACITY`.
    """
    if count > CAPACITY:
        raise ConfigError(
            f"{count:,} elements are more than the {CAPACITY:,} codes of float32: use fewer layers or a tiny size"
        )


def codes(start: int, count: int, dtype: str) -> bytes:
    """The codes of elements `start` to `start + count`, as little-endian bytes of F32 or BF16."""
    numbers = np.arange(start, start + count, dtype=np.uint64)
    if dtype == "F32":
        low, high = numbers & np.uint64(0xFFFF), numbers >> np.uint64(16)
        # (high * 2^16 + low) * stride mod CAPACITY, in steps that stay below 2^64.
        capacity, stride = np.uint64(CAPACITY), np.uint64(_STRIDE)
        mixed = (((high * stride) % capacity << np.uint64(16)) + low * stride) % capacity
        sign, rest = mixed // np.uint64(_NORMAL), mixed % np.uint64(_NORMAL)
        return ((sign << np.uint64(31)) + rest + np.uint64(1 << 23)).astype("<u4").tobytes()
    assert dtype == "BF16"
    mixed = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # the finaliser of splitmix64
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed = (mixed ^ mixed >> np.uint64(31)) % np.uint64(2 * _NORMAL_BF16)
    sign, rest = mixed // np.uint64(_NORMAL_BF16), mixed % np.uint64(_NORMAL_BF16)
    return ((sign << np.uint64(15)) + rest + np.uint64(1 << 7)).astype("<u2").tobytes()


def expected(table: Table, key: str, dtype: str = "F32") -> np.ndarray:
    """What the coded tensor `key` holds, as bit patterns: uint32 (F32) or uint16 (BF16), in its shape.

    Raises:
        ConfigError: No such tensor.
    """
    if key not in table:
        raise ConfigError(f"no tensor {key!r}{near(key, table)}")
    raw = codes(starts(table)[key], math.prod(table[key]), dtype)
    return np.frombuffer(raw, dtype="<u4" if dtype == "F32" else "<u2").reshape(table[key])


def decode(table: Table, value: float) -> tuple[str, tuple[int, ...]] | None:
    """The tensor and index that a float32 value is the code of, or `None` if it is no code of this table."""
    try:
        bits = int(struct.unpack("<I", struct.pack("<f", value))[0])
    except OverflowError:  # no float32 is that large
        return None
    sign, rest = bits >> 31, (bits & 0x7FFFFFFF) - (1 << 23)
    if not 0 <= rest < _NORMAL:
        return None
    number = (sign * _NORMAL + rest) * _BACK % CAPACITY
    for key, shape in table.items():
        if number < math.prod(shape):
            return key, tuple(int(i) for i in np.unravel_index(number, shape))
        number -= math.prod(shape)
    return None


def numbers_of(patterns: np.ndarray) -> np.ndarray:
    """The numbers that float32 bit patterns (uint32, any shape) are the codes of, int64; -1 for a pattern without."""
    sign = (patterns >> np.uint32(31)).astype(np.uint64)
    rest = (patterns & np.uint32(0x7FFFFFFF)).astype(np.int64) - (1 << 23)
    valid = (rest >= 0) & (rest < _NORMAL)
    mixed = sign * np.uint64(_NORMAL) + np.where(valid, rest, 0).astype(np.uint64)
    # CAPACITY squared is below 2^64.
    return np.where(valid, (mixed * np.uint64(_BACK) % np.uint64(CAPACITY)).astype(np.int64), -1)


def where_from(table: Table, value: float) -> str:
    """`decode`, as text: `model.layers.3.self_attn.k_proj.weight[12, 5]`, or what else the value is."""
    found = decode(table, value)
    if found is None:
        return "zero" if value == 0 else f"no element of this model ({value!r})"
    return f"{found[0]}{list(found[1])}"
