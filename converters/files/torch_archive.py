"""Files of `torch.save`, as byte ranges: what they hold is found, and what they will hold is laid out, without torch.

Such a file is a zip archive whose records are stored as they are: a pickle that names storages, and their bytes,
aligned to 64. Reading gives each tensor its place in the file. Writing gives the bytes before a tensor's data, and
those after, which are known but for the checksum of the data: byte for byte what torch itself writes.

Source: pytorch 2.13.0, caffe2/serialize/inline_container.cc (`PyTorchStreamWriter`, `getPadding`,
    `writeSerializationId`), torch/_utils.py (`_rebuild_*`), torch/serialization.py (`_save`).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from mmap import mmap
from typing import Any

from converters import pickled
from converters.errors import CheckpointError
from converters.files.zip_records import Entry, Record, descriptor, directory, header
from converters.files.zip_records import records as records_in
from converters.pickled import Named, Names, Outside, Symbol
from converters.tensors import ITEMSIZE, STORAGE_OF, STORAGES, TensorInfo


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of an archive.

    Attributes:
        info: Shape and dtype.
        strides: In elements.
        offset: Of its first element, in the bytes that were read.
        crc: Of the record that its storage is; 0 where torch was told to compute none.
        record: First byte and size of that record.
        pending: What torch does to each element when it reads it (`neg`, `conj`): the bytes are not the values.
    """

    info: TensorInfo
    strides: tuple[int, ...]
    offset: int
    crc: int
    record: tuple[int, int]
    pending: tuple[str, ...] = ()

    @property
    def contiguous(self) -> bool:
        """Whether its elements lie row-major and without gaps."""
        if not self.info.elements:
            return True
        expected = 1
        for size, stride in zip(reversed(self.info.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str | None
    record: Record


def read(
    content: bytes | memoryview | mmap,
    *,
    where: str,
    start: int = 0,
    size: int | None = None,
    names: Names | None = None,
) -> Any:
    """The object that was saved: plain values, `Named` objects, and `Stored` in place of tensors.

    Args:
        content: A file, as it is mapped; nothing of a tensor's data is touched.
        where: What it is, for messages.
        start: Where the archive begins.
        size: Its bytes; to the end, by default.
        names: Names that its pickle may use besides those of tensors.

    Raises:
        CheckpointError: No archive of `torch.save`, a pickle that names what nothing here needs, or tensors that do
            not lie in their storages.
    """
    view = memoryview(content)
    end = len(view) if size is None else start + size
    if not 0 <= start <= end <= len(view):
        raise CheckpointError(f"{where}: bytes {start:,} to {end:,} are promised, and there are {len(view):,}")
    folder, records = records_in(view, start, end, where)
    if f"{folder}/data.pkl" not in records:
        raise CheckpointError(f"{where}: a zip archive without data.pkl is none of torch.save")
    order = records.get(f"{folder}/byteorder")
    if order is not None and bytes(view[order.offset : order.offset + order.size][:16]) != b"little":
        raise CheckpointError(f"{where}: written on a big-endian machine; save it again on a little-endian one")
    found = records[f"{folder}/data.pkl"]
    pickle = view[found.offset : found.offset + found.size]
    if found.crc and zlib.crc32(pickle) != found.crc:
        raise CheckpointError(f"{where}: data.pkl is damaged: its CRC-32 is not the one in the archive's directory")

    def persistent(identity: Any) -> _Storage:
        return _storage(identity, folder, records, where)

    known = TENSORS if names is None else TENSORS | names
    return pickled.parse(pickle, names=known, where=f"{where}: data.pkl", persistent=persistent)


def _storage(identity: Any, folder: str, records: Mapping[str, Record], where: str) -> _Storage:
    match identity:
        case ("storage", Symbol() as kind, str() as key, str(), int() as count):
            untyped = str(kind) == "torch.storage.UntypedStorage"
            dtype = None if untyped else STORAGES.get(kind.name)
            record = records.get(f"{folder}/data/{key}")
            if dtype is None and not untyped:
                raise CheckpointError(f"{where}: a storage of the kind {pickled.shown(kind)}, which is not known")
            if record is None:
                raise CheckpointError(f"{where}: the data of storage {pickled.shown(key)} is missing")
            if record.size != count * (1 if dtype is None else ITEMSIZE[dtype]):
                raise CheckpointError(
                    f"{where}: storage {pickled.shown(key)} has {record.size:,} bytes, expected "
                    f"{count:,} elements of {dtype or 'one byte'}"
                )
            return _Storage(dtype, record)
    raise CheckpointError(f"{where}: data.pkl names an object outside of it that is no storage")


def _tensor(
    storage: Any,
    offset: Any,
    size: Any,
    strides: Any,
    grad: Any,
    hooks: Any,
    metadata: Any = None,
    *,
    dtype: str | None = None,
) -> Stored:
    shape, steps = _numbers(size), _numbers(strides)
    if type(storage) is not _Storage or type(offset) is not int or offset < 0 or len(shape) != len(steps):
        raise ValueError("no storage with a place in it")
    kind = dtype or storage.dtype
    if kind is None or (storage.dtype is not None and dtype is not None):
        raise ValueError("a storage without a dtype")
    if metadata is not None and type(metadata) is not dict:
        raise ValueError("metadata of a tensor that is no dict")
    width, record = ITEMSIZE[kind], storage.record
    reach = offset + sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) + 1 if 0 not in shape else offset
    if reach * width > record.size:
        raise CheckpointError(f"a tensor of {list(shape)} {kind} does not lie in its storage of {record.size:,} bytes")
    info = TensorInfo(shape, kind)
    pending, place = tuple(pickled.shown(name) for name in metadata or ()), record.offset + offset * width
    return Stored(info, steps, place, record.crc, (record.offset, record.size), pending)


def _tensor_of(
    storage: Any, offset: Any, size: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> Stored:
    return _tensor(storage, offset, size, strides, grad, hooks, metadata, dtype=dtype_of(dtype))


def _numbers(values: Any) -> tuple[int, ...]:
    if type(values) is not tuple or len(values) > 64 or not all(type(v) is int and 0 <= v < 2**63 for v in values):
        raise ValueError("sizes that are none")
    return values


def dtype_of(symbol: Any) -> str:
    """The dtype that a name in a pickle stands for.

    Raises:
        ValueError: None that is known.
    """
    if type(symbol) is Symbol and symbol.module == "torch" and symbol.name in ITEMSIZE:
        return symbol.name
    raise ValueError(f"{pickled.shown(symbol) if type(symbol) is Symbol else type(symbol).__name__} is no known dtype")


def not_its_values(tensor: Stored) -> str:
    """Why the bytes of a tensor with something `pending` cannot be taken over."""
    return (
        f"was saved with {', '.join(tensor.pending)} still to be done (a lazy view), so its bytes are not its values; "
        "save it again after resolve_neg() and resolve_conj()"
    )


def _same(data: Any, *_: object) -> Any:
    if type(data) is not Stored:
        raise ValueError("a parameter without a tensor")
    return data


TENSORS = Names(
    calls={
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_tensor_v3": _tensor_of,
        "torch._utils._rebuild_parameter": _same,
        "torch._utils._rebuild_parameter_with_state": _same,
        "torch.Size": _numbers,
    },
    objects=frozenset(
        ["torch.storage.UntypedStorage"] + [f"torch.{name}" for name in (*STORAGES, *ITEMSIZE, "device", "complex64")]
    ),
)
"""What tensors are made of in a pickle of torch."""


@dataclass(frozen=True, slots=True)
class Archive:
    """The file of one tensor to be.

    Attributes:
        before: All bytes before the data.
        nbytes: Of the data.
        size: Of the whole.
        entries: The records, that of the data last.
    """

    before: bytes
    nbytes: int
    size: int
    entries: tuple[Entry, ...]

    def after(self, crc: int) -> bytes:
        """All bytes after the data, whose CRC-32 is `crc`."""
        return _finish(list(self.entries), len(self.before) + self.nbytes, crc)


def build(info: TensorInfo) -> Archive:
    """The archive that `torch.save(tensor)` writes for a contiguous tensor that owns its memory."""
    plain = STORAGE_OF.get(info.dtype)
    strides = tuple(prod(info.shape[i + 1 :]) for i in range(len(info.shape))) if info.elements else _empty(info.shape)
    kind = Symbol("torch", plain) if plain else Symbol("torch.storage", "UntypedStorage")
    count = info.elements if plain else info.nbytes
    hooks = Named(Symbol("collections", "OrderedDict"))
    arguments = (Outside(("storage", kind, "0", "cpu", count)), 0, info.shape, strides, False, hooks)
    version = "_rebuild_tensor_v2" if plain else "_rebuild_tensor_v3"
    tensor = Named(Symbol("torch._utils", version), arguments if plain else (*arguments, Symbol("torch", info.dtype)))
    content, entries = _start(pickled.write(tensor))
    before = content + header("archive/data/0", len(content), info.nbytes)
    entries.append(Entry("archive/data/0", len(content), info.nbytes, 0))
    size = len(before) + info.nbytes + len(_finish(entries, len(before) + info.nbytes, 0))
    return Archive(before, info.nbytes, size, tuple(entries))


def save(value: Any) -> bytes:
    """The file that `torch.save` writes for plain values, `Symbol` and `Named`: no tensors."""
    content, entries = _start(pickled.write(value))
    return content + _finish(entries, len(content), None)


def _empty(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor without elements: sizes of zero count as one."""
    return tuple(prod(max(size, 1) for size in shape[i + 1 :]) for i in range(len(shape)))


def _start(pickle: bytes) -> tuple[bytes, list[Entry]]:
    content, entries = b"", list[Entry]()
    records = {"data.pkl": pickle, ".format_version": b"1", ".storage_alignment": b"64", "byteorder": b"little"}
    for name, record in records.items():
        content += _record(entries, name, record, len(content))
    return content, entries


def _record(entries: list[Entry], name: str, content: bytes, at: int) -> bytes:
    crc = zlib.crc32(content)
    entries.append(Entry(f"archive/{name}", at, len(content), crc))
    return header(f"archive/{name}", at, len(content)) + content + descriptor(entries[-1])


def _finish(entries: list[Entry], at: int, crc: int | None) -> bytes:
    """The rest of an archive from `at`, which is the end of the data, if there is any."""
    content = b""
    if crc is not None:
        *before, data = entries
        entries = [*before, Entry(data.name, data.at, data.size, crc)]
        content = descriptor(entries[-1])
    content += _record(entries, "version", b"3\n", at + len(content))
    identity = f"{_NAMES_WITHOUT_DATA if crc is None else _NAMES_WITH_DATA:020}{_combined(entries):020}".encode()
    content += _record(entries, ".data/serialization_id", identity, at + len(content))
    return content + directory(entries, at + len(content))


_NAMES_WITH_DATA, _NAMES_WITHOUT_DATA = 15728199511854643026, 2908468677762923104
"""Hashes that torch makes of the names of the records: of an archive of one tensor, and of one of none."""


def _combined(entries: list[Entry]) -> int:
    """The hash that torch makes of the checksums of the records."""
    combined = 0
    for entry in entries:
        if not entry.size:
            continue
        combined ^= (entry.crc + 0x9E3779B9 + (combined << 6) + (combined >> 2)) & (2**64 - 1)
    return combined
