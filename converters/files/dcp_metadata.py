"""`.metadata` of torch.distributed.checkpoint: which tensors and objects there are, and in which bytes of which files.

Source: pytorch 2.0 to 2.13, torch/distributed/checkpoint/metadata.py (`Metadata` and its parts),
    torch/distributed/checkpoint/filesystem.py (`_StorageInfo`, `_FileSystemWriter.finish`); Megatron-LM core_v0.16 and
    core_v0.19, megatron/core/dist_checkpointing/strategies/torch.py and state_dict_saver.py (`all_local_plans`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters import pickled
from converters.errors import CheckpointError, listing
from converters.files.links import check_inside
from converters.files.torch_archive import TENSORS
from converters.pickled import Named, Names, Symbol, shown
from converters.tensors import TensorInfo

METADATA = ".metadata"
_MODULE = "torch.distributed.checkpoint.metadata"
_OTHER_DTYPES = ("complex32", "complex64", "complex128", "quint8", "qint8", "qint32", "quint4x2", "quint2x4")
NAMES = TENSORS | Names(
    objects=frozenset(
        [
            "torch.distributed.checkpoint.*",
            "torch.distributed._shard.*",  # TensorProperties, before 2.3
            "megatron.core.dist_checkpointing.*",
            "nvidia_resiliency_ext.checkpointing.*",
            "pathlib.*",
            "torch.serialization._get_layout",
            *(f"torch.{name}" for name in _OTHER_DTYPES),
            "builtins.getattr",  # how Python 3.11 writes members of enumerations at first
            "__builtin__.getattr",
        ]
    )
)


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of a file, which are an archive of `torch.save`.

    Attributes:
        file: Relative to the checkpoint's folder, as it was found: not checked.
        offset: Of the first byte.
        size: In bytes.
        transforms: What was done to the bytes (compression), by name.
    """

    file: str
    offset: int
    size: int
    transforms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor, and its bytes."""

    starts: tuple[int, ...]
    shape: tuple[int, ...]
    place: Place


@dataclass(frozen=True, kw_only=True)
class DcpMetadata:
    """All that `.metadata` says of where things are.

    Attributes:
        tensors: Shape and dtype by key; the dtype may be one that no weight has, such as `complex64`.
        pieces: The boxes of each tensor; not checked against its shape.
        objects: What else was saved.
    """

    tensors: Mapping[str, TensorInfo]
    pieces: Mapping[str, Sequence[Piece]]
    objects: Mapping[str, Place]


def read(folder: Path) -> DcpMetadata:
    """The metadata of a checkpoint folder.

    Raises:
        CheckpointError: None there, a link out of the folder, no pickle, one that is too large or names what no
            metadata needs, or metadata with parts missing.
    """
    path = folder / METADATA
    check_inside(path, folder)
    try:
        if path.stat().st_size > pickled.MAX_BYTES:
            raise CheckpointError(
                f"{path}: {path.stat().st_size:,} bytes, expected no more than {pickled.MAX_BYTES:,}: it is damaged"
            )
        content = path.read_bytes()
    except OSError as error:
        found = ", ".join(sorted(each.name for each in folder.glob("*"))[:8]) or "nothing"
        raise CheckpointError(f"{folder}: expected {METADATA}, found {found} ({error.strerror})") from error
    return parse(content, where=str(path))


def parse(content: bytes, *, where: str) -> DcpMetadata:
    """The metadata in the bytes of a `.metadata`. Raises `CheckpointError` as `read`."""
    found = pickled.parse(content, names=NAMES, where=where)
    problems: list[str] = []
    if not _is(found, "Metadata"):
        raise CheckpointError(f"{where} holds a {_kind(found)}, expected the Metadata of torch.distributed.checkpoint")
    places = _places(found.fields.get("storage_data"), problems)
    tensors: dict[str, TensorInfo] = {}
    pieces: dict[str, Sequence[Piece]] = {}
    objects: dict[str, Place] = {}
    entries = found.fields.get("state_dict_metadata")
    if type(entries) is not dict:
        raise CheckpointError(f"{where} has no state_dict_metadata")
    for key, entry in entries.items():
        if type(key) is not str:
            problems.append(f"a key that is a {_kind(key)}")
        elif _is(entry, "BytesStorageMetadata"):
            if (key, None) in places:
                objects[key] = places[key, None]
            else:
                problems.append(f"{shown(key)}: no bytes are recorded for this object")
        else:
            try:
                tensors[key] = _info(entry)
                pieces[key] = _pieces(key, entry, places, problems)
            except ValueError as error:
                problems.append(f"{shown(key)}: {error}")
    if problems:
        raise CheckpointError(listing(f"{where}: entries that cannot be trusted", problems))
    return DcpMetadata(tensors=tensors, pieces=pieces, objects=objects)


_Places = Mapping[tuple[str, tuple[int, ...] | None], Place]


def _places(data: Any, problems: list[str]) -> _Places:
    out: dict[tuple[str, tuple[int, ...] | None], Place] = {}
    if type(data) is not dict:
        problems.append(f"storage_data is a {_kind(data)}, expected a dict")
        return out
    for index, info in data.items():
        fields = info.fields if _is(info, "_StorageInfo") else {}
        key = index.fields.get("fqn") if _is(index, "MetadataIndex") else None
        match key, fields.get("relative_path"), fields.get("offset"), fields.get("length"):
            case str(), str(file), int(offset), int(size) if offset >= 0 and size >= 0:
                transforms = fields.get("transform_descriptors") or ()
                names = tuple(map(shown, transforms[:8])) if isinstance(transforms, list | tuple) else ("unknown",)
                starts = index.fields.get("offset")
                place = Place(file, offset, size, names)
                if out.setdefault((key, None if starts is None else _sizes(starts)), place) != place:
                    problems.append(f"{shown(key)}: bytes are recorded twice for its box at {starts}")
            case _:
                problems.append(f"{shown(key)}: its record in storage_data is not one")
    return out


def _info(entry: Any) -> TensorInfo:
    if not _is(entry, "TensorStorageMetadata"):
        raise ValueError(f"a {_kind(entry)}, expected TensorStorageMetadata or BytesStorageMetadata")
    properties = entry.fields.get("properties")
    if not _is(properties, "TensorProperties"):
        raise ValueError("it has no properties")
    state = properties.state
    dtype = state[0] if type(state) is tuple and state else properties.fields.get("dtype")
    if type(dtype) is not Symbol or dtype.module != "torch":
        raise ValueError("it has no dtype")
    return TensorInfo(_sizes(entry.fields.get("size")), dtype.name)


def _pieces(key: str, entry: Any, places: _Places, problems: list[str]) -> list[Piece]:
    chunks = entry.fields.get("chunks")
    out = []
    for chunk in chunks if type(chunks) is list else ():
        if not _is(chunk, "ChunkStorageMetadata"):
            raise ValueError("one of its chunks is none")
        starts, shape = _sizes(chunk.fields.get("offsets")), _sizes(chunk.fields.get("sizes"))
        place = places.get((key, starts))
        if place is None:
            problems.append(f"{shown(key)}: no bytes are recorded for its box at {list(starts)}")
        else:
            out.append(Piece(starts, shape, place))
    return out


def _sizes(value: Any) -> tuple[int, ...]:
    """A `torch.Size`, which the reader of archives has checked; older releases write lists in places."""
    values = tuple(value) if type(value) is list else value
    if type(values) is not tuple or len(values) > 64 or not all(type(v) is int and 0 <= v < 2**63 for v in values):
        raise ValueError("sizes or offsets that are none")
    return values


def _is(value: Any, name: str) -> bool:
    return type(value) is Named and value.symbol.name == name


def _kind(value: Any) -> str:
    return shown(value.symbol) if type(value) is Named else type(value).__name__


def write(metadata: DcpMetadata) -> bytes:
    """The bytes of a `.metadata` of torch 2.13, which earlier releases and Megatron-Core read as well."""
    state: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for key, info in metadata.tensors.items():
        chunks = [
            _new("ChunkStorageMetadata", offsets=_size(p.starts), sizes=_size(p.shape)) for p in metadata.pieces[key]
        ]
        state[key] = _new(
            "TensorStorageMetadata", properties=_properties(info.dtype), size=_size(info.shape), chunks=chunks
        )
        for index, piece in enumerate(metadata.pieces[key]):
            storage[_new("MetadataIndex", fqn=key, index=index, offset=_size(piece.starts))] = _storage(piece.place)
    for key, place in metadata.objects.items():
        state[key] = _new("BytesStorageMetadata")
        storage[_new("MetadataIndex", fqn=key, index=None)] = _storage(place)
    return pickled.write(
        _new(
            "Metadata",
            state_dict_metadata=state,
            planner_data={key: (key,) for key in state},  # by which torch undoes the flattening of a state dict
            storage_data=storage,
            storage_meta=_new("StorageMeta", checkpoint_id=None, save_id=None, load_id=None, modules=[]),
            version="1.0.0",
        )
    )


def _new(name: str, **fields: Any) -> Named:
    return Named(Symbol(_MODULE, name), (), fields or None, new=True)


def _storage(place: Place) -> Named:
    fields = {"relative_path": place.file, "offset": place.offset, "length": place.size}
    return Named(Symbol("torch.distributed.checkpoint.filesystem", "_StorageInfo"), (), fields, new=True)


def _size(values: tuple[int, ...]) -> Named:
    return Named(Symbol("torch", "Size"), (values,))


def _properties(dtype: str) -> Named:
    layout = Named(Symbol("torch.serialization", "_get_layout"), ("torch.strided",))
    memory = Named(Symbol(_MODULE, "_MEM_FORMAT_ENCODING"), (0,))
    state = (Symbol("torch", dtype), layout, False, memory, False)
    return Named(Symbol(_MODULE, "TensorProperties"), (), state, new=True)
