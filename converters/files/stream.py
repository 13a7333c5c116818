"""Writing the tensors of plans into files whose every offset is known, once past each byte.

A chunk is one worker's: block by block its bytes are checksummed, digested, looked over for numbers that are none and
written, all while they are in the core's cache. What runs long goes from the mapped source to the kernel without a
copy in between. Checksums, writes and copies let other threads run, so two cores are two workers.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from zlib_ng import zlib_ng

from converters.errors import CheckpointError, listing
from converters.files.extents import Chunk
from converters.files.gather import Gather, Part
from converters.files.mapped import Bits
from converters.files.nonfinite import count_nonfinite
from converters.files.workers import Report, Worker, in_threads
from converters.tensors import ITEMSIZE

SEND = 1 << 28
"""Bytes written after which the disk is told to begin with them."""
SYNC_FILE_RANGE_WRITE = 2


@dataclass(frozen=True, kw_only=True)
class Written:
    """A chunk whose bytes, seal included, are all in its file.

    Attributes:
        key: The tensor.
        file: Relative to the folder.
        offset: Of the first byte of its elements.
        nbytes: Of its elements.
        crc32: Of those bytes.
        digest: XXH3-128 of those bytes, in hex.
        nonfinite: Elements that are NaN or infinite; they are kept.
        overflowed: Of those, the ones that were finite in the source, and too large for the dtype asked for.
    """

    key: str
    file: Path
    offset: int
    nbytes: int
    crc32: int
    digest: str
    nonfinite: int
    overflowed: int = 0


def stream(
    parts: Sequence[Part],
    chunks: Sequence[Chunk],
    folder: Path,
    *,
    cast: bool = False,
    workers: int = 2,
    report: Report | None = None,
) -> Iterator[Written]:
    """Write chunks into files that are there already, at full size.

    Args:
        parts: The plans and what they read; together they make every element of the chunks.
        chunks: What to write.
        folder: The chunks' files are relative to it.
        cast: Let dtypes change, rounding to nearest even.
        workers: Threads.
        report: Told of bytes as they are written, from the thread that iterates.

    Yields:
        Each chunk when it is written, in no particular order, but those whose second copies in the source do not hold.
        Constants that the source must hold are checked before the first.

    Raises:
        CheckpointError: The source is not what a plan reads; constants or second copies that do not hold, all of them.
        OSError: A file cannot be written.
    """
    gather = Gather(parts, cast=cast)
    _refuse(parts, [fault for _, fault in gather.constant_faults()])
    faults: list[str] = []
    with _Targets(folder) as targets:

        def write(chunk: Chunk, worker: Worker) -> Written | None:
            found: list[str] = []
            written = _written(gather, chunk, targets[chunk.extent.file], worker, found)
            faults.extend(found)
            return None if found else written  # a resumed run would trust what was once said to be written

        def told(nbytes: int) -> None:
            targets.start_sync(nbytes)
            if report is not None:
                report(nbytes)

        with closing(in_threads(_in_turn(chunks, workers), write, workers=workers, report=told)) as results:
            for written in results:
                if written is not None:
                    yield written
    _refuse(parts, faults)


def _refuse(parts: Sequence[Part], faults: Sequence[str]) -> None:
    if faults:
        roots = ", ".join(sorted({str(files.root) for _, files in parts}))
        raise CheckpointError(listing(f"{roots}: values that must be equal are not", set(faults)))


def _in_turn(chunks: Sequence[Chunk], workers: int) -> list[Chunk]:
    """What would keep one worker busy while the others have ended comes first, the rest in the order of the files."""
    nbytes = {id(chunk): math.prod(chunk.extent.shape) * ITEMSIZE[chunk.info.dtype] for chunk in chunks}
    much = sum(nbytes.values()) // (4 * max(1, workers))
    return sorted(chunks, key=lambda chunk: -nbytes[id(chunk)] if nbytes[id(chunk)] > much else 0)


class _Target:
    """A file that is written.

    A file system lets one thread at a time write to a file, and has the others burn their time until it is their turn
    (ext4: the inode's `i_rwsem`, on which a waiting writer spins). Here they sleep.
    """

    def __init__(self, path: Path) -> None:
        self.handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        self._turn = threading.Lock()

    def write(self, data: Bits, offset: int) -> None:
        """All of `data` at `offset`, however few bytes the system takes at a time.

        Raises:
            OSError: It takes none.
        """
        done = 0
        while done < data.nbytes:
            with self._turn:
                done += os.pwrite(self.handle, data[done:].data, offset + done)


class _Targets:
    """The files of a folder, each opened once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[Path, _Target] = {}
        self._lock = threading.Lock()
        self._unsent = 0

    def __enter__(self) -> _Targets:
        return self

    def __exit__(self, *_: object) -> None:
        for target in self._open.values():
            os.close(target.handle)

    def __getitem__(self, file: Path) -> _Target:
        with self._lock:
            if file not in self._open:
                self._open[file] = _Target(self._folder / file)
            return self._open[file]

    def start_sync(self, nbytes: int) -> None:
        """Now and then, send what was written on its way to the disk, so that a later fsync finds little to wait for.

        Args:
            nbytes: Bytes written since the last call.

        Source: `sync_file_range(2)`; a system without it has all to do in fsync.
        """
        self._unsent += nbytes
        if self._unsent < SEND:
            return
        self._unsent = 0
        import ctypes

        call = getattr(ctypes.CDLL(None), "sync_file_range", None)
        if call is None:
            return
        with self._lock:
            handles = [target.handle for target in self._open.values()]
        for handle in handles:
            call(handle, ctypes.c_int64(0), ctypes.c_int64(0), SYNC_FILE_RANGE_WRITE)


def _written(gather: Gather, chunk: Chunk, target: _Target, worker: Worker, faults: list[str]) -> Written:
    """Write one chunk, and past each block only once."""
    extent, digest = chunk.extent, xxhash.xxh3_128()
    crc, nonfinite, at = 0, 0, extent.offset
    overflows: list[int] = []
    for block in gather.blocks(chunk.key, chunk.info, extent, worker.stage, faults, overflows):
        crc = zlib_ng.crc32(block.data, crc)
        digest.update(block.data)
        nonfinite += count_nonfinite(block, chunk.info.dtype)
        target.write(block, at)
        at += block.nbytes
        worker.go_on(block.nbytes)
    for offset, data in chunk.seal(crc):
        target.write(np.frombuffer(data, np.uint8), offset)
    return Written(
        key=chunk.key,
        file=extent.file,
        offset=extent.offset,
        nbytes=at - extent.offset,
        crc32=crc,
        digest=digest.hexdigest(),
        nonfinite=nonfinite,
        overflowed=sum(overflows),
    )
