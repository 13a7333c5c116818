"""A checkpoint format of the plainest kind: boxes of tensors at any offsets of any files. It checks nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from converters.execute import dtype_of, info_of
from converters.files.extents import Chunk, Extent, FolderLayout
from converters.files.identity import Identity
from converters.tensors import ITEMSIZE, TensorInfo


@dataclass(frozen=True)
class BoxedFiles:
    """Tensors in boxes."""

    root: Path
    infos: Mapping[str, TensorInfo]
    boxes: Mapping[str, Sequence[Extent]]
    left_alone: Mapping[str, str]

    @property
    def identities(self) -> Mapping[Path, Identity]:
        return {extent.file: Identity.of(extent.file) for boxes in self.boxes.values() for extent in boxes}

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.infos

    def extents(self, key: str) -> Sequence[Extent]:
        return self.boxes[key]


def boxes_of(shape: tuple[int, ...], cuts: int, chance: random.Random) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes that hold every element once, each with its starts and its shape."""
    found = [((0,) * len(shape), shape)]
    for _ in range(cuts if shape else 0):
        starts, box = found.pop(chance.randrange(len(found)))
        dim = chance.randrange(len(shape))
        at = chance.randint(0, box[dim])
        found.append((starts, (*box[:dim], at, *box[dim + 1 :])))
        low = (*starts[:dim], starts[dim] + at, *starts[dim + 1 :])
        found.append((low, (*box[:dim], box[dim] - at, *box[dim + 1 :])))
    return [(starts, box) for starts, box in found if math.prod(box)]


def lay_out(infos: Mapping[str, TensorInfo], *, cuts: int = 0, seed: int = 0, gap: int = 0) -> FolderLayout:
    """Boxes cut at random, one after the other in two files, with a seal of 16 bytes after each."""
    chance = random.Random(seed)
    sizes = {Path("one.bin"): gap, Path("two.bin"): gap}
    chunks = []
    for key, info in infos.items():
        for starts, box in boxes_of(info.shape, cuts, chance):
            file = chance.choice(list(sizes))
            end = sizes[file] + math.prod(box) * ITEMSIZE[info.dtype]
            chunks.append(Chunk(key, info, Extent(file, sizes[file], starts, box), _Seal(end)))
            sizes[file] = end + 16 + gap
    chance.shuffle(chunks)
    return FolderLayout(sizes=sizes, fixed={}, chunks=chunks)


@dataclass(frozen=True)
class _Seal:
    at: int

    def __call__(self, crc: int) -> Sequence[tuple[int, bytes]]:
        return [(self.at, b"%016x" % crc)]


def prepare(folder: Path, layout: FolderLayout) -> None:
    """The files at full size."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, size in layout.sizes.items():
        (folder / file).write_bytes(b"\xa5" * size)


def opened(folder: Path, layout: FolderLayout) -> BoxedFiles:
    """What was written there."""
    infos = {chunk.key: chunk.info for chunk in layout.chunks}
    boxes: dict[str, list[Extent]] = {}
    for chunk in layout.chunks:
        extent = chunk.extent
        boxes.setdefault(chunk.key, []).append(Extent(folder / extent.file, extent.offset, extent.starts, extent.shape))
    return BoxedFiles(folder, infos, boxes, {})


def save(folder: Path, tensors: Mapping[str, torch.Tensor], **how: int) -> BoxedFiles:
    """Write tensors box by box, without the engine."""
    layout = lay_out({key: info_of(tensor) for key, tensor in tensors.items()}, **how)
    prepare(folder, layout)
    for chunk in layout.chunks:
        extent = chunk.extent
        ranges = tuple(slice(low, low + size) for low, size in zip(extent.starts, extent.shape, strict=True))
        data = tensors[chunk.key][ranges].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        with (folder / extent.file).open("r+b") as file:
            file.seek(extent.offset)
            file.write(data)
    return opened(folder, layout)


def load(files: BoxedFiles) -> dict[str, torch.Tensor]:
    """Read tensors box by box, without the engine."""
    out = {}
    for key, info in files.infos.items():
        tensor = torch.zeros(info.shape, dtype=dtype_of(info.dtype))
        for extent in files.boxes[key]:
            count = math.prod(extent.shape) * ITEMSIZE[info.dtype]
            data = np.frombuffer(extent.file.read_bytes(), np.uint8, count, extent.offset).copy()
            ranges = tuple(slice(low, low + size) for low, size in zip(extent.starts, extent.shape, strict=True))
            tensor[ranges] = torch.from_numpy(data).view(dtype_of(info.dtype)).reshape(extent.shape)
        out[key] = tensor
    return out
