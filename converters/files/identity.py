"""Which file it was whose header was read: offsets in a header hold for those bytes and for no others."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from converters.errors import CheckpointError
from converters.files.extents import TensorFiles


class Identity(NamedTuple):
    """What changes when another file takes a path, or a file is written to.

    Attributes:
        device: `st_dev`.
        inode: `st_ino`.
        size: In bytes.
        modified: `st_mtime_ns`.
        changed: `st_ctime_ns`, which no program can set back.
    """

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, file: int | Path) -> Identity:
        """That of an open file, or of the one that a path leads to.

        Raises:
            OSError: There is none.
        """
        status = os.fstat(file) if isinstance(file, int) else file.stat()
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def known(sources: Iterable[TensorFiles]) -> dict[Path, Identity]:
    """The files of several sources."""
    return {path: found for files in sources for path, found in files.identities.items()}


def check(identities: Mapping[Path, Identity]) -> None:
    """Hold the files that paths lead to now against those whose headers were read.

    Raises:
        CheckpointError: Others, or the same with other bytes; all of them.
    """
    faults = [path for path, expected in identities.items() if _now(path) != expected]
    if faults:
        raise changed(*faults)


def changed(*files: Path) -> CheckpointError:
    """What to say of files that are no longer those whose headers were read."""
    return CheckpointError(
        f"{', '.join(map(str, sorted(files)))} changed while it was read; nothing was written; start again"
    )


def _now(path: Path) -> Identity | None:
    try:
        return Identity.of(path)
    except OSError:
        return None
