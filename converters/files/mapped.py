"""Files mapped for reading, and the elements of a strided region in one as a view.

A file that another process truncates while it is mapped ends this one by SIGBUS where a lost page is touched, which
cannot be caught in Python; what is being written stays hidden, as after a kill.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.errors import CheckpointError
from converters.files.identity import Identity, changed
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
    """Files, each mapped once when it is first read. Pages of a mapped file are the page cache's own, and no copy.

    Args:
        identities: Which file each path must lead to, of those whose headers were read.
    """

    def __init__(self, identities: Mapping[Path, Identity]) -> None:
        self._identities = identities
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()

    def __getitem__(self, file: Path) -> mmap.mmap:
        """All bytes of a file.

        Raises:
            CheckpointError: It cannot be read, is empty, or is not the file whose header was read.
        """
        with self._lock:
            if file not in self._maps:
                self._maps[file] = _mapped(file, self._identities[file])
            return self._maps[file]

    def close(self) -> None:
        """Forget all files; their memory goes with the last view of it."""
        self._maps.clear()


def _mapped(file: Path, expected: Identity) -> mmap.mmap:
    try:
        handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            mapped = mmap.mmap(handle, 0, prot=mmap.PROT_READ)
            found = Identity.of(handle)  # after the mapping, whose size is the file's at that moment
        finally:
            os.close(handle)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    if found != expected:
        raise changed(file)
    return mapped


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
