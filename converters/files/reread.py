"""Chunks that an interrupted run says it has written: read again before a word of it is believed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from zlib_ng import zlib_ng

from converters.files import share
from converters.files.extents import Chunk
from converters.files.journal import Place, place_of
from converters.files.partial import write_all

if TYPE_CHECKING:
    from converters.files.stream import Written

BLOCK = 4 << 20


def still_there(
    folder: Path, chunks: Sequence[Chunk], noted: Mapping[Place, Written], *, seal: bool
) -> Iterator[Written]:
    """Of some chunks, those whose bytes have the checksum that was noted.

    Args:
        folder: Where their files are, all at full size.
        chunks: What to look at.
        noted: What a journal says of them.
        seal: Write their seals again, which no checksum covers.

    Raises:
        OSError: A file cannot be read, or the seal not be written.
    """

    def check(chunk: Chunk) -> Written | None:
        written, size = noted[place_of(chunk)], share.nbytes(chunk)
        handle = os.open(folder / chunk.extent.file, os.O_RDWR if seal else os.O_RDONLY)
        try:
            if written.nbytes != size or _crc(handle, chunk.extent.offset, size) != written.crc32:
                return None
            for offset, data in chunk.seal(written.crc32) if seal else ():
                write_all(handle, data, offset)
            return written
        finally:
            os.close(handle)

    with ThreadPoolExecutor(2) as pool:
        yield from (written for written in pool.map(check, chunks) if written is not None)


def _crc(handle: int, offset: int, count: int) -> int:
    """CRC-32 of bytes of a file; of fewer, where it is shorter."""
    block, crc, end = memoryview(bytearray(min(BLOCK, count))), 0, offset + count
    while offset < end:
        got = os.preadv(handle, [block[: end - offset]], offset)
        if not got:
            break
        crc, offset = zlib_ng.crc32(block[:got], crc), offset + got
    return crc
