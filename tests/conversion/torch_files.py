"""Files of torch, made and read in the plainest way."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from converters.files import dcp_metadata
from converters.files.dcp import DcpFiles
from converters.files.dcp_metadata import DcpMetadata, Piece, Place
from converters.files.extents import FolderLayout
from converters.tensors import TensorInfo

Box = tuple[tuple[int, ...], tuple[int, ...]]


def saved(value: Any) -> bytes:
    """What `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def archive_of(pickle: bytes, **others: bytes) -> bytes:
    """An archive with this pickle and one storage of four floats."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in {"data.pkl": pickle, "data/0": bytes(16), "byteorder": b"little", **others}.items():
            file.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def info_of(tensor: torch.Tensor) -> TensorInfo:
    return TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def data_of(tensor: torch.Tensor) -> bytes:
    """The bytes of the elements, row-major."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def cut(tensor: torch.Tensor, starts: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    return tensor[tuple(slice(start, start + size) for start, size in zip(starts, shape, strict=True))]


def fill(layout: FolderLayout, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a layout in full; its bytes must come to the sizes that it gives."""
    folder.mkdir()
    written = 0
    for path, size in layout.sizes.items():
        with (folder / path).open("wb") as file:
            file.truncate(size)
            parts = list(layout.fixed[path])
            for chunk in layout.chunks:
                data = data_of(cut(tensors[chunk.key], chunk.extent.starts, chunk.extent.shape))
                parts += [(chunk.extent.offset, data), *chunk.seal(zlib.crc32(data))]
            for at, content in parts:
                file.seek(at)
                written += file.write(content)
    assert written == sum(layout.sizes.values())
    for path, content in layout.small.items():
        (folder / path).write_bytes(content)


def boxed(folder: Path, tensor: torch.Tensor, boxes: Sequence[Box], key: str = "weight") -> DcpMetadata:
    """A folder that holds one tensor in these boxes, each saved by torch."""
    folder.mkdir(exist_ok=True)
    content, pieces = b"", []
    for starts, shape in boxes:
        archive = saved(cut(tensor, starts, shape).clone())
        pieces.append(Piece(starts, shape, Place("__0_0.distcp", len(content), len(archive))))
        content += archive
    metadata = DcpMetadata(tensors={key: info_of(tensor)}, pieces={key: pieces}, objects={})
    (folder / "__0_0.distcp").write_bytes(content)
    (folder / ".metadata").write_bytes(dcp_metadata.write(metadata))
    return metadata


def tensor_of(files: DcpFiles, key: str) -> torch.Tensor:
    """A weight, put together from its extents."""
    info = files.tensors()[key]
    out = torch.empty(info.shape, dtype=getattr(torch, info.dtype))
    for extent in files.extents(key):
        box = cut(out, extent.starts, extent.shape)
        content = extent.file.read_bytes()[extent.offset : extent.offset + box.numel() * out.element_size()]
        box.copy_(torch.frombuffer(bytearray(content), dtype=out.dtype).view(extent.shape))
    return out
