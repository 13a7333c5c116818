"""Zip archives as torch writes them: records in one folder, stored as they are, their data aligned.

Source: PKWARE APPNOTE.TXT 6.3 (sections 4.3 and 4.5.3); pytorch 2.13.0, caffe2/serialize/inline_container.cc
    (`getPadding`); miniz 3.0, `mz_zip_writer_add_mem_ex_v2` (when it writes zip64, and what).
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import NoReturn

from converters.errors import CheckpointError
from converters.pickle_names import shown

ALIGNMENT = 64
"""Of the data of a record, from the start of its archive."""
_LARGE = 0xFFFFFFFF
_LOCAL = Struct("<4s5H3I2H")  # signature, version, flags, method, time, date, CRC, sizes, lengths of name and extra
_ENTRY = Struct("<4s6H3I5H2I")  # the same, with two versions; lengths of name, extra, comment; disk, attributes, offset
_END = Struct("<4s4H2IH")
_END64 = Struct("<4sQ2H2I4Q")
_LOCATOR = Struct("<4sIQI")
_UTF8, _FOLLOWS = 0x0800, 0x0808  # names are UTF-8; and sizes and CRC follow the data, unless there is none


@dataclass(frozen=True, slots=True)
class Record:
    """A record of an archive: where its bytes lie in what was read."""

    offset: int
    size: int
    crc: int


def records(view: memoryview, start: int, end: int, where: str) -> tuple[str, dict[str, Record]]:
    """The records of the archive between two bytes, and the folder that all of them are in.

    Raises:
        CheckpointError: No archive there, one whose records are compressed, or a directory that does not fit.
    """

    def refuse(why: str) -> NoReturn:
        raise CheckpointError(f"{where}: not an archive of torch.save, or a damaged one: {why}")

    at = end - _END.size
    if at < start or bytes(view[at : at + 4]) != b"PK\x05\x06":
        if bytes(view[start : start + 2]) == b"\x80\x02" or bytes(view[start : start + 4]) != b"PK\x03\x04":
            refuse("it is no zip archive (torch before 1.6 wrote none: load and save it once with a later release)")
        refuse("its end is missing")
    _, _, _, _, count, length, offset, _ = _END.unpack_from(view, at)
    locator = at - _LOCATOR.size
    if locator >= start and bytes(view[locator : locator + 4]) == b"PK\x06\x07":
        position = start + _LOCATOR.unpack_from(view, locator)[2]
        if position + _END64.size > locator or bytes(view[position : position + 4]) != b"PK\x06\x06":
            refuse("its zip64 end record is not where it should be")
        *_, count, length, offset = _END64.unpack_from(view, position)
        at = position
    at_entry, last = start + offset, start + offset + length
    if last > at or count * _ENTRY.size > length:
        refuse("its directory does not lie in it")
    found: dict[str, Record] = {}
    for _ in range(count):
        if at_entry + _ENTRY.size > last or bytes(view[at_entry : at_entry + 4]) != b"PK\x01\x02":
            refuse("its directory ends early")
        entry = _ENTRY.unpack_from(view, at_entry)
        flags, method, crc, packed, plain = entry[3], entry[4], entry[7], entry[8], entry[9]
        names, extras, remarks, local = entry[10], entry[11], entry[12], entry[16]
        at_entry += _ENTRY.size
        if at_entry + names + extras + remarks > last:
            refuse("its directory ends early")
        raw = bytes(view[at_entry : at_entry + names])
        name = raw.decode("utf-8", "replace")
        plain, packed, local = _wide(bytes(view[at_entry + names : at_entry + names + extras]), plain, packed, local)
        at_entry += names + extras + remarks
        if method != 0 or packed != plain or flags & 1:
            refuse(f"{shown(name)} is compressed or encrypted; torch stores records as they are")
        begin = start + local
        if begin + _LOCAL.size > start + offset or bytes(view[begin : begin + 4]) != b"PK\x03\x04":
            refuse(f"{shown(name)} is not where its directory says")
        header = _LOCAL.unpack_from(view, begin)
        data = begin + _LOCAL.size + header[9] + header[10]
        if bytes(view[begin + _LOCAL.size : begin + _LOCAL.size + header[9]]) != raw or data + plain > start + offset:
            refuse(f"{shown(name)} is not where its directory says")
        if name in found:
            refuse(f"{shown(name)} is there twice")
        found[name] = Record(data, plain, crc)
    folders = {name.partition("/")[0] for name in found}
    if len(folders) != 1:
        refuse(f"its records are in {len(folders)} folders, expected one")
    return folders.pop(), found


def _wide(extra: bytes, plain: int, packed: int, local: int) -> tuple[int, int, int]:
    """Sizes and offset of an entry; those that need more than 32 bits are in its zip64 field."""
    at = 0
    while _LARGE in (plain, packed, local) and at + 4 <= len(extra):
        kind, length = int.from_bytes(extra[at : at + 2], "little"), int.from_bytes(extra[at + 2 : at + 4], "little")
        if kind == 1:
            values = [int.from_bytes(extra[i : i + 8], "little") for i in range(at + 4, at + 4 + length, 8)]
            wide = iter(values)
            plain, packed, local = (
                next(wide, _LARGE) if value == _LARGE else value for value in (plain, packed, local)
            )
            break
        at += 4 + length
    return plain, packed, local


@dataclass(frozen=True, slots=True)
class Entry:
    """A record to be: where it begins in the archive, how many bytes it has, and their CRC-32."""

    name: str
    at: int
    size: int
    crc: int


def header(name: str, at: int, size: int) -> bytes:
    """What precedes the data of a record that begins at `at`, padded so that the data is aligned."""
    zip64 = _zip64([size, 0] * (size >= _LARGE) + [at] * (at >= _LARGE))
    bare = at + _LOCAL.size + len(name) + len(zip64) + 4
    padding = -bare % ALIGNMENT
    extra = zip64 + b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    flags = _FOLLOWS if size else _UTF8
    return _LOCAL.pack(b"PK\x03\x04", 0, flags, 0, 0, 0, 0, 0, 0, len(name), len(extra)) + name.encode() + extra


def _zip64(values: list[int]) -> bytes:
    if not values:
        return b""
    content = b"".join(value.to_bytes(8, "little") for value in values)
    return b"\x01\x00" + len(content).to_bytes(2, "little") + content


def descriptor(entry: Entry) -> bytes:
    """What follows the data of a record."""
    if not entry.size:
        return b""
    width = 8 if entry.size >= _LARGE or entry.at >= _LARGE else 4
    size = entry.size.to_bytes(width, "little")
    return b"PK\x07\x08" + entry.crc.to_bytes(4, "little") + size + size


def _directory_entry(entry: Entry) -> bytes:
    size, at = min(entry.size, _LARGE), min(entry.at, _LARGE)
    extra = _zip64([entry.size, entry.size] * (size == _LARGE) + [entry.at] * (at == _LARGE))
    fixed = _ENTRY.pack(
        b"PK\x01\x02",
        0,
        0,
        _FOLLOWS if entry.size else _UTF8,
        0,
        0,
        0,
        entry.crc,
        size,
        size,
        len(entry.name),
        len(extra),
        0,
        0,
        0,
        0,
        at,
    )
    return fixed + entry.name.encode() + extra


def directory(entries: list[Entry], at: int) -> bytes:
    """The end of an archive, from `at` on: the directory of its records, and where that is."""
    listed, count = b"".join(map(_directory_entry, entries)), len(entries)
    return b"".join(
        [
            listed,
            _END64.pack(b"PK\x06\x06", _END64.size - 12, 0x031E, 45, 0, 0, count, count, len(listed), at),
            _LOCATOR.pack(b"PK\x06\x07", 0, at + len(listed), 1),
            _END.pack(b"PK\x05\x06", 0, 0, count, count, len(listed), min(at, _LARGE), 0),
        ]
    )
