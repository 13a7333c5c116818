"""Whether bytes on disk are still those that were written: by the CRC-32 that archives of torch note of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from zlib_ng import zlib_ng

from converters.errors import CheckpointError, listing
from converters.files.extents import Record, Recorded, TensorFiles
from converters.files.gather import BLOCK
from converters.files.identity import Identity
from converters.files.mapped import Mapped
from converters.files.workers import Report, Worker, in_threads
from converters.progress import Progress


def noted(files: TensorFiles) -> list[Record]:
    """The records of a checkpoint that have a checksum, each once; none of a format that notes none."""
    found = files.records() if isinstance(files, Recorded) else ()
    return list({(record.file, record.offset): record for record in found if record.crc and record.nbytes}.values())


def broken(
    records: Sequence[Record], which: Mapping[Path, Identity], *, workers: int = 2, report: Report | None = None
) -> Iterator[str]:
    """Read records from end to end.

    Args:
        records: With their checksums.
        which: The files that they are in.
        workers: Threads.
        report: Told of bytes as they are read.

    Yields:
        For each record that does not hold what was noted: its tensor and file, and what was found.
    """
    mapped = Mapped(which)

    def look(record: Record, worker: Worker) -> str | None:
        crc, end, view = 0, record.offset + record.nbytes, memoryview(mapped[record.file])
        for at in range(record.offset, end, BLOCK):
            block = view[at : min(at + BLOCK, end)]
            crc = zlib_ng.crc32(block, crc)
            worker.go_on(len(block))
        if crc == record.crc:
            return None
        return (
            f"{record.key}: {record.nbytes:,} bytes at {record.offset:,} of {record.file} have the CRC-32 "
            f"{crc:#010x}, and were written with {record.crc:#010x}: damaged since"
        )

    for fault in in_threads(records, look, workers=workers, report=report):
        if fault is not None:
            yield fault


def check(files: TensorFiles, *, workers: int = 2, quiet: bool = True) -> int:
    """Hold a checkpoint against its checksums, all of them.

    Args:
        files: The checkpoint.
        workers: Threads.
        quiet: No progress bar.

    Returns:
        How many records held; none has one in formats that note no checksums.

    Raises:
        CheckpointError: Records that do not hold what was noted; all of them.
    """
    records = noted(files)
    with Progress("checking", sum(record.nbytes for record in records), quiet=quiet) as progress:
        faults = sorted(broken(records, files.identities, workers=workers, report=progress.advance))
    if faults:
        raise CheckpointError(
            listing(f"{files.root}: bytes that are not those that were written", faults)
            + "\nFetch these files again, or take an older iteration"
        )
    return len(records)
