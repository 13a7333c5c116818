"""Files mapped for reading, and the elements of a strided region in one as a view."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.errors import CheckpointError
from converters.tensors import ITEMSIZE

Bits = npt.NDArray[np.unsignedinteger]
UNSIGNED: dict[int, Any] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.uint16),
    4: np.dtype(np.uint32),
    8: np.dtype(np.uint64),
}


def bits_of(dtype: str) -> np.dtype[np.unsignedinteger]:
    """The unsigned integers that hold the bits of a dtype's elements."""
    found: np.dtype[np.unsignedinteger] = UNSIGNED[ITEMSIZE[dtype]]
    return found


class Mapped:
    """Files, each mapped once when it is first read. Pages of a mapped file are the page cache's own, and no copy."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()

    def __getitem__(self, file: Path) -> mmap.mmap:
        """All bytes of a file.

        Raises:
            CheckpointError: It cannot be read, or is empty.
        """
        with self._lock:
            if file not in self._maps:
                self._maps[file] = _mapped(file)
            return self._maps[file]

    def close(self) -> None:
        """Forget all files; their memory goes with the last view of it."""
        self._maps.clear()


def _mapped(file: Path) -> mmap.mmap:
    try:
        handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return mmap.mmap(handle, 0, prot=mmap.PROT_READ)
        finally:
            os.close(handle)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error


def strided(
    memory: mmap.mmap | Bits,
    dtype: np.dtype[np.unsignedinteger],
    offset: int,
    strides: Sequence[int],
    shape: Sequence[int],
) -> Bits:
    """The elements of a region as a view.

    Args:
        memory: What holds them.
        dtype: Of an element.
        offset: Of the first element, in bytes.
        strides: In elements.
        shape: Of the view.
    """
    steps = tuple(stride * dtype.itemsize for stride in strides)
    return np.ndarray(tuple(shape), dtype, memory, offset, steps)
