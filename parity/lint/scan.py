"""One pass over the bytes of every tensor: what is no number, what is constant, and what is there twice.

Files are mapped, and numbers are compared as the integers of their bits, a few megabytes at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from converters.files.mapped import Bits, Mapped, bits_of, strided
from converters.files.nonfinite import INFINITY, count_nonfinite
from converters.tensors import TensorInfo

if TYPE_CHECKING:
    from converters.files.extents import TensorFiles

BLOCK = 4 << 20  # bytes, within a core's cache
PLAIN = ("float64", "float32", "bfloat16", "float16")
"""What weights are in that are not quantised. Of the bits of others, only whether they are equal means something."""


@dataclass(frozen=True, kw_only=True)
class Values:
    """What the bits of one tensor say.

    Attributes:
        digest: Of its bytes.
        nonfinite: NaN and infinities.
        first: Where the first of them is.
        constant: Whether all elements have the same bits.
        constant_rows: Rows (along the first dim) whose elements all have the same bits; none of a vector.
        zero_columns: Columns that hold zeros alone; none of a vector.
        negative: Elements below zero, of a vector.
        repeated_rows: Rows equal to an earlier one, of a tensor with a row for each token.
    """

    digest: str
    nonfinite: int = 0
    first: tuple[int, ...] = ()
    constant: bool = False
    constant_rows: tuple[int, ...] = ()
    zero_columns: tuple[int, ...] = ()
    negative: int = 0
    repeated_rows: tuple[int, ...] = ()


Scan = Mapping[str, Values]


def scan(files: TensorFiles, vocabularies: tuple[str, ...]) -> Scan:
    """What the values of every tensor of a checkpoint say.

    Args:
        files: Tensors that lie in one piece each.
        vocabularies: Keys of those with a row for each token, whose rows are compared with each other.
    """
    mapped = Mapped(files.identities)
    return {key: _values(files, key, info, mapped, by_row=key in vocabularies) for key, info in files.tensors().items()}


def _values(files: TensorFiles, key: str, info: TensorInfo, mapped: Mapped, *, by_row: bool) -> Values:
    digest, at = xxhash.xxh3_128(), 0
    lowest: list[Bits] = []
    highest: list[Bits] = []
    columns: Bits | None = None
    nonfinite, negative, first = 0, 0, None
    seen: dict[int, int] = {}
    repeated: list[int] = []
    for block in _blocks(files, key, info, mapped):
        digest.update(block.data)
        if info.dtype not in PLAIN or not block.size:
            continue
        if count := count_nonfinite(block, info.dtype):
            magnitude = block & ((1 << (8 * block.itemsize - 1)) - 1)
            if first is None:
                first = at * block.shape[1] + int((magnitude >= INFINITY[info.dtype]).argmax())
            nonfinite += count
        lowest.append(block.min(axis=1))
        highest.append(block.max(axis=1))
        if len(info.shape) > 1:
            folded = np.bitwise_or.reduce(block, axis=0)
            columns = folded if columns is None else columns | folded
        else:
            negative += int((block.view(f"i{block.itemsize}") < 0).sum())
        if by_row:
            rows = (xxhash.xxh3_64_intdigest(row) for row in block)
            repeated += [at + i for i, row in enumerate(rows) if seen.setdefault(row, at + i) != at + i]
        at += len(block)
    if not lowest:
        return Values(digest=digest.hexdigest())
    low, high = np.concatenate(lowest), np.concatenate(highest)
    zero = np.flatnonzero(columns << 1 == 0).tolist() if columns is not None else []  # a zero may be -0.0
    return Values(
        digest=digest.hexdigest(),
        nonfinite=nonfinite,
        first=() if first is None else tuple(int(i) for i in np.unravel_index(first, info.shape)),
        constant=bool(low.min() == high.max()),
        constant_rows=tuple(np.flatnonzero(low == high).tolist()) if len(info.shape) > 1 else (),
        zero_columns=tuple(zero),
        negative=negative,
        repeated_rows=tuple(repeated),
    )


def _blocks(files: TensorFiles, key: str, info: TensorInfo, mapped: Mapped) -> Iterator[Bits]:
    """The tensor as blocks of whole rows, in order; a vector is one row."""
    if not info.elements:
        return
    (extent,), dtype = files.extents(key), bits_of(info.dtype)
    rows = info.shape[0] if len(info.shape) > 1 else 1
    width = info.elements // rows
    step = max(1, BLOCK // (width * dtype.itemsize))
    for start in range(0, rows, step):
        offset, count = extent.offset + start * width * dtype.itemsize, min(step, rows - start)
        yield strided(mapped[extent.file], dtype, offset, (width, 1), (count, width))
