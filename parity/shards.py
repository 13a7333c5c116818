"""Safetensors files, read and written as streams of bytes, so that no tensor has to fit in memory.

They are written in the order that the caller gives, which is not the library's: a converter has to follow it.

Source: huggingface/safetensors 0.8.0, README "Format": eight bytes of header length (little-endian), a JSON header of
`{key: {dtype, shape, data_offsets}}` whose offsets are relative to the header's end, contiguous and in order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from converters.errors import CheckpointError, listing
from converters.files.safetensors_header import Header
from converters.tensors import CODE_OF

ITEMSIZE = {"F32": 4, "BF16": 2, "F16": 2}
_CHUNK = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a file: `dtype` in safetensors' spelling, and where its bytes are."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def chunks(self) -> Iterator[bytes]:
        """The tensor's bytes, in pieces."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.stop - self.start
            while left:
                piece = file.read(min(_CHUNK, left))
                if not piece:
                    raise CheckpointError(f"{self.path} is truncated: {left} bytes short. Fetch or write it again")
                left -= len(piece)
                yield piece


def read_entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of the safetensors files in `folder`, by key.

    Raises:
        CheckpointError: A file that is not safetensors, or a key that two files hold.
    """
    out: dict[str, Entry] = {}
    for path in sorted(folder.glob("*.safetensors")):
        header = Header.read(path)
        if header.problems:
            raise CheckpointError(
                listing(f"{path} is not a safetensors file. Fetch or write it again", header.problems)
            )
        for key, info in header.tensors.items():
            if key in out:
                raise CheckpointError(f"{key} is in two files, {out[key].path.name} and {path.name}")
            start, code = header.offsets[key], CODE_OF[info.dtype]
            out[key] = Entry(path=path, dtype=code, shape=info.shape, start=start, stop=start + info.nbytes)
    return out


def write_shards(
    folder: Path,
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    chunks: Callable[[str], Iterable[bytes]],
    *,
    shards: int = 1,
) -> None:
    """Write tensors over `shards` files of about equal size, with an index if there are several.

    Args:
        folder: Where the files go.
        tensors: Safetensors dtype and shape of each key, in the order in which they are written.
        chunks: The bytes of a tensor, in pieces, row-major and little-endian.
        shards: Number of files; each gets at least one tensor.
    """
    size = {key: ITEMSIZE[dtype] * math.prod(shape) for key, (dtype, shape) in tensors.items()}
    total, done = sum(size.values()), 0
    groups: list[list[str]] = [[] for _ in range(min(shards, len(tensors)))]
    for index, key in enumerate(tensors):
        # By bytes, but never so late that a following shard would go without a tensor.
        at_least = len(groups) - (len(tensors) - index)
        groups[max(at_least, min(done * len(groups) // total, index))].append(key)
        done += size[key]
    groups = [group for group in groups if group]
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = "model.safetensors" if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        _write(folder / name, {key: tensors[key] for key in group}, size, chunks)
        weight_map |= dict.fromkeys(group, name)
    if len(groups) > 1:
        index_json = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2) + "\n")


def _write(
    path: Path,
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    size: dict[str, int],
    chunks: Callable[[str], Iterable[bytes]],
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, (dtype, shape) in tensors.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size[key]]}
        offset += size[key]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in tensors:
            written = sum(file.write(piece) for piece in chunks(key))
            assert written == size[key], f"{key}: {written} bytes given, {size[key]} expected"
