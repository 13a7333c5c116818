"""Safetensors folders as stores: their files mapped, for reading, and for writing at offsets known beforehand.

A tensor is a view of the mapped file: only the pages that a copy touches are read or written. All offsets are known
before anything is written, so that every rank can put its own bytes into the same files without gathering a tensor
anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from converters.execute import dtype_of
from converters.files.extents import FolderLayout
from converters.files.safetensors import SafetensorsFiles
from converters.tensors import CODES, TensorInfo

DTYPES: dict[str, torch.dtype] = {code: dtype_of(name) for code, name in CODES.items()}
NAMES = {dtype: code for code, dtype in DTYPES.items()}


class SafetensorsFolder:
    """The tensors of a Hugging Face checkpoint folder, read only.

    Args:
        folder: As of `SafetensorsFiles`.
        quantized: As of `SafetensorsFiles`.

    Raises:
        CheckpointError: As `SafetensorsFiles`.
    """

    def __init__(self, folder: Path, *, quantized: bool = False) -> None:
        self.folder = folder
        self.files = SafetensorsFiles(folder, quantized=quantized)
        self._mapped: dict[Path, torch.UntypedStorage] = {}

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every tensor."""
        return self.files.tensors()

    def tensor(self, key: str) -> torch.Tensor:
        """A view of the mapped file; what is written into it stays in memory."""
        (extent,) = self.files.extents(key)
        if extent.file not in self._mapped:
            self._mapped[extent.file] = _map(extent.file, shared=False)
        return _view(self._mapped[extent.file], extent.offset, self.tensors()[key])

    def shards(self) -> dict[str, list[str]]:
        """The keys of each file, in the order of their bytes."""
        return self.files.shards()


def create(folder: Path, layout: FolderLayout) -> None:
    """Create every file at its full size, with all that does not depend on the weights written."""
    for path, size in layout.sizes.items():
        with (folder / path).open("xb") as out:
            # Reserved now, so that a full disk is an error here and not a signal when a mapped page is written.
            os.posix_fallocate(out.fileno(), 0, size)
            for offset, content in layout.fixed[path]:
                os.pwrite(out.fileno(), content, offset)
    for path, content in layout.small.items():
        (folder / path).write_bytes(content)


class MappedFiles:
    """Files made by `create`, mapped for writing. Several processes may write different parts at once.

    Args:
        folder: Where they are.
        layout: Its tensors are one chunk each.
    """

    def __init__(self, folder: Path, layout: FolderLayout) -> None:
        self._mapped = {path: _map(folder / path, shared=True) for path in layout.sizes}
        self._chunks = {chunk.key: chunk for chunk in layout.chunks}

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every tensor."""
        return {key: chunk.info for key, chunk in self._chunks.items()}

    def tensor(self, key: str) -> torch.Tensor:
        """A writable view of the mapped file."""
        chunk = self._chunks[key]
        return _view(self._mapped[chunk.extent.file], chunk.extent.offset, chunk.info)


def _map(path: Path, *, shared: bool) -> torch.UntypedStorage:
    mapped = torch.UntypedStorage.from_file(str(path), shared=shared, nbytes=path.stat().st_size)
    assert isinstance(mapped, torch.UntypedStorage)
    return mapped


def _view(storage: torch.UntypedStorage, offset: int, info: TensorInfo) -> torch.Tensor:
    """The bytes at `offset`, which need not be aligned to elements, as a tensor."""
    part = storage[offset : offset + info.nbytes]
    made = torch.empty(0, dtype=dtype_of(info.dtype))
    return made.set_(part).view(info.shape)
