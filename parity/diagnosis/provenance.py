"""Where the elements of a wrong tensor come from: read off their codes, or found by matching whole rows and columns.

A source is the number of an element: tensors of the checkpoint are numbered through, as in `parity.coded`. Of a row it
is the number of its first element, of a column that of its topmost; -1 is no source. A vector is a matrix of one
column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from parity import coded

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Tensors = Mapping[str, Floats]
"""HF tensors by key; those of a narrower dtype widened, which is exact."""
_PIECE = 1 << 22  # elements hashed at a time


def bits(values: Floats) -> npt.NDArray[np.uint32]:
    """The bit patterns of float32 values."""
    return np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)


def matrix(values: Floats) -> Floats:
    """A tensor as a matrix: a vector as one column."""
    return values.reshape(values.shape[0] if values.ndim else 1, -1)


class Numbering:
    """The numbers of a checkpoint's elements.

    Args:
        table: Shape of each tensor, in order.
    """

    def __init__(self, table: coded.Table) -> None:
        self.table = table
        self.starts = coded.starts(table)
        self.total = sum(math.prod(shape) for shape in table.values())
        self._keys = list(table)
        self._firsts = np.array([self.starts[key] for key in self._keys], dtype=np.int64)
        self._columns = np.array([math.prod(shape[1:]) for shape in table.values()], dtype=np.int64)

    def key_of(self, number: int) -> str:
        """The tensor of element `number`."""
        return self._keys[int(np.searchsorted(self._firsts, number, side="right")) - 1]

    def keys_of(self, numbers: Ints) -> Ints:
        """The place in the table of the tensor of each number; -1 for none."""
        found = np.searchsorted(self._firsts, numbers, side="right") - 1
        return np.where(numbers < 0, -1, found)

    def keys_in(self, numbers: Ints) -> list[str]:
        """The tensors of some numbers, the most frequent first."""
        places, counts = np.unique(self.keys_of(numbers[numbers >= 0]), return_counts=True)
        return [self._keys[place] for place in places[np.argsort(-counts, kind="stable")]]

    def row_starts(self, numbers: Ints, columns: int) -> Bools:
        """Which numbers are the first element of a row of a tensor with `columns` columns."""
        places = self.keys_of(numbers)
        fits = (numbers >= 0) & (self._columns[places] == columns)
        aligned: Bools = fits & ((numbers - self._firsts[places]) % columns == 0)
        return aligned

    def columns_at(self, numbers: Ints) -> Ints:
        """Columns of the tensor of each number."""
        return self._columns[self.keys_of(numbers)]


class Origins(Protocol):
    """Tells sources of whole rows and columns."""

    def rows(self, key: str, values: Floats, lines: Bools) -> Ints:
        """The sources of those rows, `lines`, of the matrix `values`, found in the place of tensor `key`."""

    def columns(self, key: str, values: Floats, lines: Bools) -> Ints:
        """The sources of its columns `lines`."""


class Coded:
    """Origins of coded float32 tensors: every element says its own (`parity.coded`)."""

    def __init__(self, numbering: Numbering) -> None:
        self._numbering = numbering

    def elements(self, values: Floats) -> Ints:
        """The source of each element."""
        numbers = coded.numbers_of(bits(values))
        return np.where(numbers < self._numbering.total, numbers, -1)

    def rows(self, key: str, values: Floats, lines: Bools) -> Ints:
        """See `Origins`."""
        found = self.elements(values[lines])
        first = found[:, 0]
        whole = (found - first[:, None] == np.arange(found.shape[1])).all(axis=1)
        return np.where(whole & self._numbering.row_starts(first, found.shape[1]), first, -1)

    def columns(self, key: str, values: Floats, lines: Bools) -> Ints:
        """See `Origins`."""
        found = self.elements(values[:, lines])
        first = found[0]
        step = self._numbering.columns_at(np.maximum(first, 0))
        whole = (found - first[None] == np.arange(found.shape[0])[:, None] * step).all(axis=0)
        return np.where(whole & (first >= 0), first, -1)


class Matched:
    """Origins of any tensors: rows and columns are looked up by hash among those that belong to the model.

    A vector is looked up whole, and otherwise element by element among its own.
    """

    def __init__(self, numbering: Numbering, expected: Tensors) -> None:
        self._numbering, self._expected = numbering, expected

    def rows(self, key: str, values: Floats, lines: Bools) -> Ints:
        """See `Origins`."""
        if values.shape[1] == 1:
            return self._vector(key, values)[lines]
        values = values[lines]
        return self._find(key, values, _hashes(values), self._rows)

    def columns(self, key: str, values: Floats, lines: Bools) -> Ints:
        """See `Origins`."""
        values = values[:, lines]
        return self._find(key, values, _hashes(values.T), self._columns)

    @cached_property
    def _rows(self) -> dict[str, npt.NDArray[np.uint64]]:
        return {key: _hashes(matrix(self._expected[key])) for key, s in self._numbering.table.items() if len(s) == 2}

    @cached_property
    def _columns(self) -> dict[str, npt.NDArray[np.uint64]]:
        return {key: _hashes(matrix(self._expected[key]).T) for key, s in self._numbering.table.items() if len(s) == 2}

    def _find(
        self, key: str, values: Floats, hashes: npt.NDArray[np.uint64], known: Mapping[str, npt.NDArray[np.uint64]]
    ) -> Ints:
        """Each hash among the tensor's own, then among those of the same layer, then among all."""
        table, by_rows = self._numbering.table, known is self._rows
        out = np.full(len(hashes), -1, dtype=np.int64)
        layer = key.rpartition("layers.")[2].partition(".")[0]
        alike = [
            other
            for other in known
            if (table[other][1] == values.shape[1] if by_rows else table[other][0] == values.shape[0])
        ]
        alike.sort(key=lambda other: (other != key, f"layers.{layer}." not in other))
        for other in alike:
            open_ = out < 0
            if not open_.any():
                break
            order = np.argsort(known[other], kind="stable")
            at = np.minimum(np.searchsorted(known[other], hashes[open_], sorter=order), len(order) - 1)
            hit = known[other][order[at]] == hashes[open_]
            step = table[other][1] if by_rows else 1
            out[open_] = np.where(hit, self._numbering.starts[other] + order[at] * step, -1)
        return out

    def _vector(self, key: str, values: Floats) -> Ints:
        flat = bits(values).ravel()
        for other, shape in self._numbering.table.items():
            if shape == (len(flat),) and np.array_equal(bits(self._expected[other]), flat):
                return self._numbering.starts[other] + np.arange(len(flat))
        own, first, counts = np.unique(bits(self._expected[key]).ravel(), return_index=True, return_counts=True)
        at = np.minimum(np.searchsorted(own, flat), len(own) - 1)
        # A value that stands in several places says nothing about its own.
        found = np.where((own[at] == flat) & (counts[at] == 1), self._numbering.starts[key] + first[at], -1)
        right = flat == bits(self._expected[key]).ravel()
        return np.where(right, self._numbering.starts[key] + np.arange(len(flat)), found)


def _hashes(values: Floats) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of each row: a sum of its bit patterns with odd factors, the same for rows of one length."""
    factors = np.random.default_rng(20_200).integers(0, 1 << 63, values.shape[1], dtype=np.uint64) * np.uint64(2)
    factors += np.uint64(1)
    out = np.empty(len(values), dtype=np.uint64)
    step = max(1, _PIECE // max(1, values.shape[1]))
    for start in range(0, len(values), step):
        piece = bits(values[start : start + step]).astype(np.uint64)
        out[start : start + step] = (piece * factors).sum(axis=1, dtype=np.uint64)
    return out
