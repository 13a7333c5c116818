"""The header of a safetensors file: read without trust, and written as the safetensors library writes it.

Source: huggingface/safetensors 0.8.0, README "Format" and safetensors/src/tensor.rs (`SafeTensors::read_metadata`,
`Metadata::validate`, `prepare`): eight bytes of length (little-endian), then JSON of at most 100 MB that begins with
`{` and may end in spaces: `{key: {dtype, shape, data_offsets}}` and the strings of `__metadata__`. Offsets count from
the header's end; tensors cover the rest of the file without holes or overlaps.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from converters.errors import near
from converters.files.identity import Identity
from converters.tensors import CODE_OF, CODES, TensorInfo

LONGEST = 100_000_000
"""Bytes of the longest header that the library reads."""
METADATA = "__metadata__"
FIELDS = {"dtype", "shape", "data_offsets"}
LARGEST = 2**63 - 1
MOST_DIMS = 64
POINTER = b"version "
PACKED = "float4_e2m1fn_x2"  # two numbers in an element; headers count the numbers
RANK = {name: place for place, name in enumerate(CODES.values())}


@dataclass(frozen=True, kw_only=True)
class Header:
    """What precedes the tensors of a file.

    Attributes:
        preamble: Its bytes, the length and the padding included.
        tensors: In the order of their bytes.
        offsets: Where each tensor begins in the file.
        metadata: The strings that whoever wrote the file put there; `None` where they put none.
        problems: Why the file cannot be trusted. Where there are any, the rest may be missing.
        identity: Of the file that it was read from.
    """

    preamble: bytes = b""
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    offsets: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, str] | None = None
    problems: tuple[str, ...] = ()
    identity: Identity | None = field(default=None, compare=False)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.preamble) + sum(info.nbytes for info in self.tensors.values())

    @classmethod
    def of(cls, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None) -> Header:
        """The header of a file that holds `tensors`: the widest dtypes first, so that every tensor starts aligned."""
        ordered = dict(sorted(tensors.items(), key=lambda item: (RANK[item[1].dtype], item[0])))
        fields: dict[str, Any] = {} if metadata is None else {METADATA: dict(metadata)}
        starts, at = {}, 0
        for key, info in ordered.items():
            shape = [*info.shape[:-1], 2 * info.shape[-1]] if info.dtype == PACKED else list(info.shape)
            starts[key], end = at, at + info.nbytes
            fields[key] = {"dtype": CODE_OF[info.dtype], "shape": shape, "data_offsets": [at, end]}
            at = end
        text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        preamble = len(text).to_bytes(8, "little") + text
        offsets = {key: len(preamble) + start for key, start in starts.items()}
        return cls(preamble=preamble, tensors=ordered, offsets=offsets, metadata=metadata)

    @classmethod
    def read(cls, path: Path) -> Header:
        """The header of the file at `path`, held against the file's size. Never raises: see `problems`."""
        try:
            with path.open("rb") as file:
                identity = Identity.of(file.fileno())
                first = file.read(8)
                length = int.from_bytes(first, "little")
                if fault := _length_fault(first, length, identity.size):
                    return cls(problems=(fault,))
                preamble = first + file.read(length)
        except OSError as error:
            return cls(problems=(f"cannot be read: {error.strerror or error}",))
        return replace(cls.parse(preamble, identity.size), identity=identity)

    @classmethod
    def parse(cls, preamble: bytes, size: int | None = None) -> Header:
        """A header from its bytes. Never raises: see `problems`.

        Args:
            preamble: The length and the JSON.
            size: Bytes of the whole file; `None` for a header without one.
        """
        problems: list[str] = []
        fields = parsed(preamble[8:], problems)
        if fields is None:
            return cls(preamble=preamble, problems=tuple(problems))
        metadata = fields.pop(METADATA, None)
        if metadata is not None and not (
            isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
        ):
            problems.append(f"{METADATA} is not an object of strings")
            metadata = None
        found = []
        for key, entry in fields.items():
            fault, info, start, stop = _entry(entry)
            if fault:
                problems.append(f"{key!r}{fault}")
            if not key.isprintable():
                problems.append(f"{key!r}: a name with characters that cannot be printed")
            if stop >= 0:
                found.append((start, stop, key, info))
        found.sort(key=lambda item: item[:2])
        room = None if size is None else size - len(preamble)
        problems += _coverage([item[:3] for item in found], room, complete=len(found) == len(fields))
        return cls(
            preamble=preamble,
            tensors={key: info for _, _, key, info in found if info is not None},
            offsets={key: len(preamble) + start for start, _, key, info in found if info is not None},
            metadata=metadata,
            problems=tuple(problems),
        )


def parsed(text: bytes, problems: list[str]) -> dict[str, Any] | None:
    """The JSON object in `text`, which must name nothing twice; `None`, and what is wrong, where it is none."""
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            twice.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return made

    if not text.startswith(b"{"):
        problems.append(f"expected JSON that begins with '{{', found {text[:8]!r}")
        return None
    try:
        found: dict[str, Any] = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        problems.append(f"no JSON: {error}")
        return None
    problems += [f"{name!r} is named twice" for name in twice]
    return found


def _length_fault(first: bytes, length: int, size: int) -> str:
    if first == POINTER:
        return "a pointer of Git LFS, not the file itself: run git lfs pull in the repository it is from"
    if len(first) < 8:
        return f"truncated: {size} bytes, and the first 8 say how long the header is"
    if length > LONGEST:
        return f"not a safetensors file: a header of {length:,} bytes, at most {LONGEST:,} are allowed"
    if 8 + length > size:
        return f"truncated: a header of {length:,} bytes in a file of {size:,}; fetch or write it again"
    return ""


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _entry(entry: Any) -> tuple[str, TensorInfo | None, int, int]:
    """What is wrong with the entry of a tensor, its shape and dtype, and its span; a `stop` of -1 for none."""
    if not isinstance(entry, dict) or entry.keys() != FIELDS:
        found = brief(sorted(entry) if isinstance(entry, dict) else entry)
        return f": expected an object of {', '.join(sorted(FIELDS))}, found {found}", None, 0, -1
    code, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(span, list) and len(span) == 2 and all(map(_count, span)) and span[0] <= span[1]):
        return f": data_offsets are {brief(span)}, expected two byte positions", None, 0, -1
    start, stop = span
    if not (isinstance(shape, list) and len(shape) <= MOST_DIMS and all(map(_count, shape))):
        return f": its shape is {brief(shape)}, expected a list of sizes", None, start, stop
    if not isinstance(code, str) or code not in CODES:
        hint = near(code, CODES) if isinstance(code, str) and len(code) < 20 else ""
        return f": dtype {brief(code)} is unknown{hint}", None, start, stop
    dtype = CODES[code]
    if dtype == PACKED:
        if not shape or shape[-1] % 2:
            return f": {brief(shape)} numbers of dtype {code} do not fill bytes", None, start, stop
        shape = [*shape[:-1], shape[-1] // 2]
    info = TensorInfo(tuple(shape), dtype)
    if info.nbytes != stop - start:
        said = f"{code} of shape {brief(entry['shape'])} is {info.nbytes:,} bytes"
        return f": {said}, its data_offsets span {stop - start:,}", None, start, stop
    return "", info, start, stop


def _coverage(spans: list[tuple[int, int, str]], room: int | None, *, complete: bool) -> list[str]:
    """Holes and overlaps between tensors, and what the file lacks or holds besides.

    Args:
        spans: In order.
        room: Bytes of the file after the header.
        complete: Whether the spans of all tensors are known, so that a hole is one.
    """
    problems, at, before = [], 0, ""
    for start, stop, key in spans:
        if start < at:
            problems.append(f"{key!r} begins at byte {start:,}, inside {before!r}, which ends at {at:,}")
        elif start > at and complete:
            problems.append(f"{key!r} begins at byte {start:,}, and the {start - at:,} before it belong to no tensor")
        if room is not None and stop > room:
            problems.append(f"{key!r} ends at byte {stop:,}, and the file has {room:,}: truncated, or not what it says")
        if stop >= at:
            at, before = stop, key
    if room is not None and at < room and complete:
        problems.append(f"the last {room - at:,} bytes belong to no tensor")
    return problems
