"""A folder of safetensors files as a store: mapped for reading, mapped for writing at offsets known beforehand.

Reading goes through the safetensors library, whose tensors are views of the mapped file: only the pages that a copy
touches are read. Writing lays all headers out first, so that every rank can put its own bytes into the same files
without gathering a tensor anywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from converters.errors import CheckpointError, listing
from converters.execute import TensorInfo

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000  # transformers' default `max_shard_size`
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}
QUANTIZED = (torch.float8_e4m3fn,)
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsFolder:
    """The tensors of a Hugging Face checkpoint folder, read only.

    Args:
        folder: Holds `model.safetensors`, or shards and their index.
        quantized: Read FP8 tensors too. They mean nothing without their scales, so nobody else gets to see them.

    Raises:
        CheckpointError: No safetensors, an index and files that disagree, or a file that is not a safetensors file.
    """

    def __init__(self, folder: Path, *, quantized: bool = False) -> None:
        self.folder = folder
        self.files = _files(folder)
        self._handles: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        self._infos: dict[str, TensorInfo] = {}
        problems: list[str] = []
        for file, promised in self.files.items():
            try:
                handle = safe_open(folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                problems.append(f"{file}: {error}")
                continue
            self._handles[file] = handle
            held = list(handle.keys())
            if promised is not None:
                problems += [f"{file}: the index promises {key!r}, the file lacks it" for key in promised - set(held)]
                problems += [f"{file}: holds {key!r}, which the index lacks" for key in set(held) - promised]
            for key in held:
                if key in self._where:
                    problems.append(f"{file}: holds {key!r}, as {self._where[key]} does")
                piece = handle.get_slice(key)
                if piece.get_dtype() not in DTYPES:
                    problems.append(f"{file}: {key!r} has dtype {piece.get_dtype()}, which cannot be converted yet")
                    continue
                if DTYPES[piece.get_dtype()] in QUANTIZED and not quantized:
                    problems.append(
                        f"{file}: {key!r} is quantised ({piece.get_dtype()}) and needs its scales; "
                        "make the checkpoint plain first: python -m converters dequantize SOURCE TARGET"
                    )
                    continue
                self._where[key] = file
                self._infos[key] = TensorInfo(tuple(piece.get_shape()), DTYPES[piece.get_dtype()])
        if problems:
            raise CheckpointError(listing(f"{folder}: files that cannot be trusted", problems))

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every tensor."""
        return self._infos

    def tensor(self, key: str) -> torch.Tensor:
        """A view of the mapped file."""
        found: torch.Tensor = self._handles[self._where[key]].get_tensor(key)
        return found

    def shards(self) -> dict[str, list[str]]:
        """The keys of each file, in the order of their bytes."""
        return {file: list(handle.offset_keys()) for file, handle in self._handles.items()}


def _files(folder: Path) -> dict[str, set[str] | None]:
    """The files of a checkpoint, and the keys that an index promises in each (`None` without an index)."""
    index = folder / INDEX
    if index.is_file() and (folder / SINGLE).is_file() and f'"{SINGLE}"' not in index.read_text(errors="replace"):
        raise CheckpointError(
            f"{folder}: holds both {SINGLE} and {INDEX}, and transformers reads the first; remove the one that is stale"
        )
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return {SINGLE: None}
        found = ", ".join(sorted(path.name for path in folder.glob("*"))[:8]) or "nothing"
        raise CheckpointError(f"{folder}: expected {SINGLE} or {INDEX}, found {found}")
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files: dict[str, set[str] | None] = {file: set() for file in sorted(set(weight_map.values()))}
        if not all(isinstance(file, str) for file in files):
            raise TypeError("a file's name is no text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index with a weight_map: {error!r}") from error
    outside = sorted(file for file in files if Path(file).name != file)
    if outside:
        raise CheckpointError(f"{index}: names files outside its folder: {', '.join(outside)}")
    absent = sorted(file for file in files if not (folder / file).is_file())
    if absent:
        raise CheckpointError(listing(f"{index}: names files that are not there", absent))
    for key, file in weight_map.items():
        files[file].add(key)  # type: ignore[union-attr]
    return files


@dataclass(frozen=True)
class FileLayout:
    """One safetensors file to be: its name, and its tensors in the order of their bytes."""

    name: str
    tensors: Mapping[str, TensorInfo]

    @property
    def size(self) -> int:
        """Bytes of tensor data."""
        return sum(_bytes(info) for info in self.tensors.values())

    def header(self) -> bytes:
        """Length, JSON and padding that precede the data."""
        fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for key, info in self.tensors.items():
            end = at + _bytes(info)
            fields[key] = {"dtype": NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(fields, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def _bytes(info: TensorInfo) -> int:
    return prod(info.shape) * info.dtype.itemsize


def lay_out(tensors: Mapping[str, TensorInfo], like: Mapping[str, Iterable[str]] | None = None) -> list[FileLayout]:
    """The files that hold `tensors`.

    Args:
        tensors: Shape and dtype of each tensor.
        like: Keys of each file of another checkpoint, followed where it names the same tensors.
    """
    if like is not None and {key for keys in like.values() for key in keys} == set(tensors):
        return [_file(file, {key: tensors[key] for key in keys}) for file, keys in like.items()]
    groups: list[dict[str, TensorInfo]] = [{}]
    room = MAX_SHARD_BYTES
    for key, info in tensors.items():
        if groups[-1] and _bytes(info) > room:
            groups.append({})
            room = MAX_SHARD_BYTES
        groups[-1][key] = info
        room -= _bytes(info)
    if len(groups) == 1:
        return [_file(SINGLE, groups[0])]
    return [_file(f"model-{i + 1:05}-of-{len(groups):05}.safetensors", group) for i, group in enumerate(groups)]


def _file(name: str, tensors: Mapping[str, TensorInfo]) -> FileLayout:
    """The widest dtypes first, as the safetensors library has it, so that every tensor starts aligned."""
    return FileLayout(name, dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)))


def index_of(files: Iterable[FileLayout]) -> str:
    """The text of the index over `files`."""
    listed = list(files)
    where = {key: file.name for file in listed for key in file.tensors}
    total = {"total_size": sum(file.size for file in listed)}
    return json.dumps({"metadata": total, "weight_map": dict(sorted(where.items()))}, indent=2) + "\n"


def create(folder: Path, files: Iterable[FileLayout]) -> None:
    """Create every file at its full size with its header written, and the index where there are several."""
    listed = list(files)
    for file in listed:
        header = file.header()
        with (folder / file.name).open("xb") as out:
            out.write(header)
            out.flush()
            # Reserved now, so that a full disk is an error here and not a signal when a mapped page is written.
            os.posix_fallocate(out.fileno(), 0, len(header) + file.size)
    if len(listed) > 1 or listed[0].name != SINGLE:
        (folder / INDEX).write_text(index_of(listed))


class MappedFiles:
    """Files made by `create`, mapped for writing. Several processes may write different parts at once.

    Args:
        folder: Where they are.
        files: Their layouts.
    """

    def __init__(self, folder: Path, files: Iterable[FileLayout]) -> None:
        self._views: dict[str, torch.Tensor] = {}
        self._infos: dict[str, TensorInfo] = {}
        for file in files:
            path = folder / file.name
            at = len(file.header())
            storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=path.stat().st_size)
            mapped = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]  # an UntypedStorage
            for key, info in file.tensors.items():
                end = at + _bytes(info)
                self._views[key] = mapped[at:end]
                self._infos[key] = info
                at = end

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every tensor."""
        return self._infos

    def tensor(self, key: str) -> torch.Tensor:
        """A writable view of the mapped file."""
        info = self._infos[key]
        return self._views[key].view(info.dtype).view(info.shape)
