"""Checkpoints of torch.distributed.checkpoint (DCP), and so Megatron's `torch_dist`, as byte ranges of their files.

A `.distcp` file is a sequence of archives of `torch.save`, one for each box of a tensor and each object; `.metadata`
says where each begins. So a box's elements lie in one piece in a file, and can be moved without torch.

Source: pytorch 2.13.0, torch/distributed/checkpoint/filesystem.py (`FileSystemWriter`, `FileSystemReader`),
    default_planner.py (`_validate_global_plan`: boxes neither overlap nor leave the tensor).
"""

from __future__ import annotations

import itertools
import mmap
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath

from converters.errors import CheckpointError, listing
from converters.files import dcp_metadata, torch_archive
from converters.files.dcp_metadata import METADATA, DcpMetadata, Piece, Place
from converters.files.extents import Chunk, Extent, FolderLayout, Record
from converters.files.identity import Identity
from converters.files.links import check_inside
from converters.files.torch_archive import Archive, Stored
from converters.files.zip_records import ALIGNMENT
from converters.pickle_names import shown
from converters.tensors import ITEMSIZE, QUANTIZED, TensorInfo

FILE = Path("__0_0.distcp")
EXTRA_STATE = torch_archive.save([None])
"""What Megatron-Core writes for a layer that keeps no state of quantisation."""
_OPTIMIZER = re.compile(r"(chained_\d+\.)?(optimizer|optim)\b")
_MOST_EXTENTS = 1 << 16  # of one box


class DcpFiles:
    """The weights of a DCP folder, whoever wrote it.

    Args:
        folder: Holds `.metadata` and the files that it names.
        prefix: What the keys of weights begin with (`model.`); it is left off, and the rest is left alone.

    Attributes:
        identities: Which files hold its weights.

    Raises:
        CheckpointError: Metadata that is damaged, that names files outside of the folder or bytes that are not there,
            boxes that overlap or leave holes, archives that hold something else than they should; all of them.
    """

    def __init__(self, folder: Path, *, prefix: str = "", metadata: DcpMetadata | None = None) -> None:
        self._root = folder
        self.metadata = dcp_metadata.read(folder) if metadata is None else metadata
        left: dict[str, list[int]] = defaultdict(list)
        weights: dict[str, TensorInfo] = {}
        for key, info in self.metadata.tensors.items():
            reason = _no_weight(key, info, prefix)
            if reason is None:
                weights[key] = info
            else:
                pieces = self.metadata.pieces[key]
                left[reason].append(
                    info.nbytes if info.dtype in ITEMSIZE else sum(piece.place.size for piece in pieces)
                )
        self.identities: dict[Path, Identity] = {}
        self._records: list[Record] = []
        extents = self._read(weights)
        self._infos = {key.removeprefix(prefix): info for key, info in weights.items()}
        self._extents = {key.removeprefix(prefix): extents[key] for key in weights}
        objects: dict[str, list[int]] = defaultdict(list)
        for key, place in self.metadata.objects.items():
            objects[_group(key)].append(place.size)
        self._left = {name: f"{_amount('tensor', sizes)}, not weights" for name, sizes in left.items()}
        for name, sizes in objects.items():
            also = f"{self._left[name]}; " if name in self._left else ""
            self._left[name] = f"{also}{_amount('object', sizes)}, no tensors"

    @property
    def root(self) -> Path:
        """The folder."""
        return self._root

    @property
    def left_alone(self) -> Mapping[str, str]:
        """Optimizer state, objects, and keys outside of the prefix: what there is of them."""
        return self._left

    def keys(self) -> list[str]:
        """Every key of the checkpoint, as it is written there, weights or not."""
        return [*self.metadata.tensors, *self.metadata.objects]

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every weight."""
        return self._infos

    def extents(self, key: str) -> Sequence[Extent]:
        """The boxes of a weight."""
        return self._extents[key]

    def records(self) -> Sequence[Record]:
        """The records of their archives."""
        return self._records

    def object(self, key: str) -> bytes:
        """The bytes of an object: a file of `torch.save`, to be read by `torch_archive.read`.

        Raises:
            CheckpointError: No such object, or its bytes are not there.
        """
        if key not in self.metadata.objects:
            raise CheckpointError(f"{self._root}: has no object {key!r}")
        place = self.metadata.objects[key]
        try:
            content, _ = _mapped(self._root, place.file)
            with content:
                _check(place, len(content))
                return content[place.offset : place.offset + place.size]
        except CheckpointError as error:
            raise CheckpointError(f"{self._root}: {key}: {error}") from error

    def _read(self, weights: Mapping[str, TensorInfo]) -> Mapping[str, list[Extent]]:
        """The extents of tensors, when each of their boxes was found where it should be."""
        out: dict[str, list[Extent]] = {key: [] for key in weights}
        problems = [
            f"{shown(key)} is quantised ({info.dtype}) and needs its scales, which no other format here has"
            for key, info in weights.items()
            if info.dtype.startswith(QUANTIZED)
        ]
        by_file: dict[str, list[tuple[str, Piece]]] = defaultdict(list)
        for key, info in weights.items():
            pieces = [piece for piece in self.metadata.pieces[key] if 0 not in piece.shape]
            fault = uncovered([(piece.starts, piece.shape) for piece in pieces], info.shape)
            problems += [f"{shown(key)}: {fault}"] if fault else []
            for piece in pieces:
                by_file[piece.place.file].append((key, piece))
        for name, inside in by_file.items():  # one after the other: there may be more than can be open at a time
            try:
                content, self.identities[self._root / name] = _mapped(self._root, name)
            except CheckpointError as error:
                keys = sorted({shown(key) for key, _ in inside})
                problems.append(f"{error}; of {keys[0]}" + (f" and {len(keys) - 1:,} more" if keys[1:] else ""))
                continue
            for key, piece in inside:
                try:
                    found, boxes = _box(content, self._root / name, key, weights[key].dtype, piece)
                    out[key] += boxes
                    self._records.append(Record(key, self._root / name, *found.record, found.crc))
                except CheckpointError as error:
                    problems.append(str(error))
        if problems:
            raise CheckpointError(listing(f"{self._root}: a checkpoint that cannot be trusted", problems))
        return out


def _box(content: mmap.mmap, file: Path, key: str, dtype: str, piece: Piece) -> tuple[Stored, Iterator[Extent]]:
    """One box of a tensor, which is an archive of its own, and its extents."""
    place, expected = piece.place, TensorInfo(piece.shape, dtype)
    where = f"{shown(key)}, {place.file} at {place.offset:,}"
    try:
        _check(place, len(content))
    except CheckpointError as error:
        raise CheckpointError(f"{shown(key)}: {error}") from error
    found = torch_archive.read(content, where=where, start=place.offset, size=place.size)
    if type(found) is not Stored or found.info != expected:
        told = f"{list(found.info.shape)} {found.info.dtype}" if type(found) is Stored else type(found).__name__
        raise CheckpointError(f"{where}: expected {list(piece.shape)} {dtype}, found {told}")
    if found.pending:
        raise CheckpointError(f"{where}: {torch_archive.not_its_values(found)}")
    return found, _extents(file, found, piece.starts, where)


def _check(place: Place, size: int) -> None:
    """Raise unless a place lies in its file, as it was written."""
    if place.transforms:
        raise CheckpointError(
            f"its bytes in {place.file} were transformed ({', '.join(place.transforms)}); save the checkpoint without "
            "extensions"
        )
    if place.offset + place.size > size:
        raise CheckpointError(
            f"bytes {place.offset:,} to {place.offset + place.size:,} of {place.file} are promised, and it has {size:,}"
        )


def _extents(file: Path, found: Stored, starts: tuple[int, ...], where: str) -> Iterator[Extent]:
    """The extents of a box: one, where its elements lie row-major; else one for each part of it where they do."""
    shape, strides, width = found.info.shape, found.strides, ITEMSIZE[found.info.dtype]
    outer, run = len(shape), 1
    while outer and (shape[outer - 1] == 1 or strides[outer - 1] == run):
        outer -= 1
        run *= shape[outer]
    if prod(shape[:outer]) > _MOST_EXTENTS:
        raise CheckpointError(
            f"{where}: its elements lie in {prod(shape[:outer]):,} pieces; save it again as a contiguous tensor"
        )
    for index in itertools.product(*map(range, shape[:outer])):
        offset = found.offset + width * sum(i * stride for i, stride in zip(index, strides, strict=False))
        at = tuple(s + i for s, i in zip(starts, index, strict=False)) + starts[outer:]
        yield Extent(file, offset, at, (1,) * outer + shape[outer:])


def _mapped(folder: Path, name: str) -> tuple[mmap.mmap, Identity]:
    """A file of the folder, mapped, and which one it is.

    Raises:
        CheckpointError: Outside of the folder, missing, empty, or not to be read.
    """
    path = PurePosixPath(name)
    outside = path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts
    try:
        if outside:
            raise CheckpointError(f"the metadata names {shown(name)!r}, a file outside of its folder")
        check_inside(folder / path, folder)
        if (folder / path).is_fifo():
            raise OSError("a pipe, which would be waited for")
        with (folder / path).open("rb") as file:
            identity = Identity.of(file.fileno())
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), identity
    except FileNotFoundError as error:
        raise CheckpointError(f"the file {shown(name)} is missing") from error
    except (OSError, ValueError, RuntimeError) as error:  # an empty file cannot be mapped; links may lead in circles
        raise CheckpointError(f"the file {shown(name)} cannot be read ({shown(error)})") from error


def uncovered(boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], shape: tuple[int, ...]) -> str | None:
    """Why boxes (starts and shape) do not cover a tensor exactly once; None where they do."""
    for starts, sizes in boxes:
        if not len(starts) == len(sizes) == len(shape):
            return f"a box of {len(sizes)} dims in a tensor of {len(shape)}"
        if any(start + size > dim for start, size, dim in zip(starts, sizes, shape, strict=True)):
            return f"its box at {list(starts)} of {list(sizes)} leaves the tensor of {list(shape)}"
    held, whole = sum(prod(sizes) for _, sizes in boxes), prod(shape)
    if held < whole:
        return f"its boxes hold {held:,} of {whole:,} elements: they leave holes"
    budget = 1000 + 100 * len(boxes) * (1 + len(shape))

    def overlap(inside: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], dim: int) -> str | None:
        """What is wrong with boxes that agree before `dim`: each stretch between cuts is looked at alone."""
        nonlocal budget
        if len(inside) < 2:
            return None
        if dim == len(shape):
            return f"its boxes at {list(inside[0][0])} and {list(inside[1][0])} overlap"
        cuts = sorted({start for starts, sizes in inside for start in (starts[dim], starts[dim] + sizes[dim])})
        position = {cut: i for i, cut in enumerate(cuts)}
        stretches: list[list[tuple[tuple[int, ...], tuple[int, ...]]]] = [[] for _ in cuts]
        for box in inside:
            first, last = position[box[0][dim]], position[box[0][dim] + box[1][dim]]
            budget -= last - first
            if budget < 0:
                return "its boxes are cut too irregularly to be checked"
            for stretch in stretches[first:last]:
                stretch.append(box)
        return next(filter(None, (overlap(stretch, dim + 1) for stretch in stretches)), None)

    return overlap(boxes, 0)


def _no_weight(key: str, info: TensorInfo, prefix: str) -> str | None:
    """Under which name a tensor is left alone; None for a weight."""
    if _OPTIMIZER.match(key):
        return "optimizer state"
    if key.rpartition(".")[2].startswith("_extra_state"):
        return "_extra_state"
    if not key.startswith(prefix):
        return f"outside of {prefix!r}"
    return None if info.dtype in ITEMSIZE else f"tensors of dtype {shown(info.dtype)}"


def _group(key: str) -> str:
    return "optimizer state" if _OPTIMIZER.match(key) else shown(key.partition("/")[0].rpartition(".")[2])


def _amount(what: str, sizes: Sequence[int]) -> str:
    total, count = sum(sizes), f"{len(sizes):,} {what}{'s' * (len(sizes) != 1)}"
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if total >= scale:
            return f"{count}, {total / scale:,.1f} {unit}"
    return f"{count}, {total} bytes"


@dataclass(frozen=True, slots=True)
class _Rest:
    """The seal of a chunk: what follows its data in the archive."""

    archive: Archive
    at: int

    def __call__(self, crc: int) -> Sequence[tuple[int, bytes]]:
        return [(self.at + len(self.archive.before) + self.archive.nbytes, self.archive.after(crc))]


def lay_out(
    tensors: Mapping[str, TensorInfo],
    *,
    split: Mapping[str, int] | None = None,
    extra_states: Sequence[str] = (),
    objects: Mapping[str, bytes] | None = None,
) -> FolderLayout:
    """The folder of a DCP checkpoint: one file of data, and its metadata.

    Each archive begins at a multiple of 64 bytes, so that its data does too.

    Args:
        tensors: Shape and dtype of each tensor, in the order of their bytes.
        split: For stacked tensors, how many leading dims are cut into single indexes, each a box of its own: the
            layers, as Megatron-Core writes and reads them. Of others there is one box.
        extra_states: Keys of the empty states of layers (`...linear_qkv._extra_state/shard_0_16`).
        objects: Bytes of other objects, as `torch_archive.save` makes them.
    """
    at = 0
    fixed: list[tuple[int, bytes]] = []
    chunks: list[Chunk] = []
    places: dict[str, Place] = {}
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for key, content in {**dict.fromkeys(extra_states, EXTRA_STATE), **(objects or {})}.items():
        padding = -len(content) % ALIGNMENT
        fixed.append((at, content + bytes(padding)))
        places[key] = Place(str(FILE), at, len(content))
        at += len(content) + padding
    end = at
    for key, info in tensors.items():
        cut = (split or {}).get(key, 0)
        box = TensorInfo((1,) * cut + info.shape[cut:], info.dtype)
        archive = torch_archive.build(box)
        for index in itertools.product(*map(range, info.shape[:cut])):
            starts = (*index, *(0,) * (len(info.shape) - cut))
            fixed.append((end, bytes(at - end) + archive.before))
            extent = Extent(FILE, at + len(archive.before), starts, box.shape)
            chunks.append(Chunk(key, info, extent, _Rest(archive, at)))
            pieces[key].append(Piece(starts, box.shape, Place(str(FILE), at, archive.size)))
            end = at + archive.size
            at = end + -end % ALIGNMENT
    metadata = DcpMetadata(tensors=tensors, pieces=pieces, objects=places)
    return FolderLayout(
        sizes={FILE: end},
        fixed={FILE: fixed},
        chunks=chunks,
        small={Path(METADATA): dcp_metadata.write(metadata)},
    )
