"""Digests of tensors that a conversion writes beside its checkpoint, and a checkpoint held against them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from converters.errors import CheckpointError, listing
from converters.files.compare import Comparison
from converters.files.dcp import uncovered
from converters.files.extents import Chunk, Extent, TensorFiles
from converters.files.gather import Gather, Part
from converters.files.place import settled
from converters.files.stream import Written
from converters.files.workers import Report, Worker, in_threads
from converters.tensors import ITEMSIZE, TensorInfo

KIND = "XXH3-128 of the bytes, row-major"
Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Starts and shape."""


@dataclass(frozen=True, kw_only=True)
class Digests:
    """The digests of a checkpoint.

    Attributes:
        column: Of the checkpoint, as a person says it.
        tensors: Shape and dtype of each.
        boxes: Of each, its boxes with the digest of their bytes.
    """

    column: str
    tensors: Mapping[str, TensorInfo]
    boxes: Mapping[str, Sequence[tuple[Box, str]]]

    @classmethod
    def read(cls, path: Path) -> Digests:
        """Read a file of digests.

        Raises:
            CheckpointError: It cannot be read, or is none.
        """
        try:
            account = json.loads(path.read_text())
            if account["digest"] != KIND:
                raise ValueError(f"digests by {str(account['digest'])[:80]!r}, expected {KIND!r}")
            column, said = str(account["column"]), account["tensors"].items()
            tensors = {key: TensorInfo(_numbers(each["shape"]), str(each["dtype"])) for key, each in said}
            boxes = {
                key: [((_numbers(box["starts"]), _numbers(box["shape"])), str(box["digest"])) for box in each["boxes"]]
                for key, each in said
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: expected digests as --digests writes them: {error!r}") from error
        problems = [f"{key}: of {info.dtype!r}" for key, info in tensors.items() if info.dtype not in ITEMSIZE]
        for key, info in tensors.items():
            held = [box for box, _ in boxes[key] if 0 not in box[1]]
            fault = uncovered(held, info.shape)
            problems += [f"{key}: {fault}"] if fault else []
        if problems:
            raise CheckpointError(listing(f"{path}: digests that do not cover their tensors", problems))
        return cls(column=column, tensors=tensors, boxes=boxes)

    def compare(
        self, parts: Sequence[Part], held: TensorFiles, *, workers: int = 2, report: Report | None = None
    ) -> Iterator[Comparison]:
        """Hold a checkpoint against them, every tensor of both.

        Args:
            parts: Plans from the checkpoint to itself, and its files.
            held: Its tensors.
            workers: Threads.
            report: Told of bytes as they are read.
        """
        gather, infos = Gather(parts), held.tensors()
        so_far: dict[str, Comparison] = {}
        for key in sorted(self.tensors.keys() | infos.keys()):
            expected, found = self.tensors.get(key), infos.get(key)
            if expected == found:
                so_far[key] = Comparison(key=key)
            elif expected is None or found is None:
                yield Comparison(key=key, faults=("no digest" if expected is None else "the checkpoint lacks it",))
            else:
                told = (f"{list(info.shape)} {info.dtype}" for info in (found, expected))
                yield Comparison(key=key, faults=(", the digests are of ".join(told),))
        tasks = [(key, box, digest) for key in so_far for box, digest in self.boxes[key]]

        def look(task: tuple[str, Box, str], worker: Worker) -> Comparison:
            key, (starts, shape), expected = task
            digest, faults = xxhash.xxh3_128(), list[str]()
            place = Extent(held.root, 0, starts, shape)
            for block in gather.blocks(key, infos[key], place, worker.stage, faults) if 0 not in shape else ():
                digest.update(block.data)
                worker.go_on(block.nbytes)
            if digest.hexdigest() != expected:
                where = f"at {list(starts)} of {list(shape)}: " if shape != infos[key].shape else ""
                faults.append(f"{where}digest {digest.hexdigest()}, expected {expected}")
            return Comparison(key=key, elements=math.prod(shape), faults=tuple(faults))

        for found_in in in_threads(tasks, look, workers=workers, report=report):
            one = so_far[found_in.key]
            so_far[found_in.key] = replace(
                one, elements=one.elements + found_in.elements, faults=(*one.faults, *found_in.faults)
            )
        for key, one in so_far.items():
            assert one.elements == infos[key].elements, f"{key}: looked at {one.elements:,} elements"
            yield one


def _numbers(values: Any) -> tuple[int, ...]:
    if type(values) is not list or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"expected a list of sizes, found {str(values)[:80]}")
    return tuple(values)


def free(path: Path, *, clear_of: Iterable[Path], overwrite: bool) -> Path:
    """Where digests may be written, from the root.

    Args:
        path: Where they are asked for.
        clear_of: Folders that they may not lie in.
        overwrite: Whether a file there may be replaced.

    Raises:
        CheckpointError: Nowhere there, or over something that is to be kept.
    """
    digests = settled(path)
    where = f"--digests {digests}"
    for folder in clear_of:
        for meant in (digests, digests.resolve()):
            if meant.is_relative_to(settled(folder)) or meant.is_relative_to(folder.resolve()):
                raise CheckpointError(f"{where}: lies inside {folder}; choose a place outside of the checkpoints")
    if os.path.lexists(digests) and not digests.is_file():
        raise CheckpointError(f"{where}: expected a file or nothing, and it is something else")
    if os.path.lexists(digests) and not overwrite:
        raise CheckpointError(f"{where}: exists already; choose another file, or allow it to be replaced (--overwrite)")
    above = next(folder for folder in digests.parents if os.path.lexists(folder))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise CheckpointError(f"{where}: cannot be written, {above} is no folder that takes files")
    return digests


def write(
    path: Path, column: str, infos: Mapping[str, TensorInfo], chunks: Iterable[Chunk], written: Iterable[Written]
) -> None:
    """Write a digest of the bytes of every tensor, of a stacked one for each of its boxes; whole or not at all.

    Args:
        path: Which `free` gave.
        column: Of the checkpoint.
        infos: Its tensors.
        chunks: Where each of them is in its files.
        written: What was found in writing the chunks.

    Raises:
        OSError: The file cannot be written.
    """
    boxes = {(str(chunk.extent.file), chunk.extent.offset, chunk.key): chunk.extent for chunk in chunks}
    tensors: dict[str, dict[str, Any]] = {
        key: {"dtype": info.dtype, "shape": list(info.shape), "boxes": []} for key, info in sorted(infos.items())
    }
    for one in written:
        box = boxes[str(one.file), one.offset, one.key]
        tensors[one.key]["boxes"].append(
            {"starts": list(box.starts), "shape": list(box.shape), "digest": one.digest, "nonfinite": one.nonfinite}
        )
    account = {"digest": KIND, "column": column, "tensors": tensors}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".digests-{os.getpid()}.partial"
    try:
        with aside.open("x") as file:
            file.write(json.dumps(account, indent=1) + "\n")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
