"""Which chunks of an unfinished folder are written: a line each, with a checksum of its own, only ever appended to."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from converters.files.extents import Chunk

if TYPE_CHECKING:
    from converters.files.stream import Written

Place = tuple[str, int, str]
"""Which chunk: its file, its offset there, and its key, since an empty tensor may lie where another one begins."""


def place_of(what: Chunk | Written) -> Place:
    """The place of a chunk to be written, or of one that was."""
    at = what.extent if isinstance(what, Chunk) else what
    return str(at.file), at.offset, what.key


class Journal:
    """The chunks that one process has finished.

    A process that is killed leaves all lines but perhaps a torn last one. Lines are not forced to the disk, and need
    not be: after a power cut a line may stand for bytes that never arrived, which is why no line is trusted without
    reading them again.

    Args:
        path: Appended to where it exists.
    """

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        if os.fstat(self._handle).st_size:
            self._append(b"\n")  # so that a torn last line stays the only one lost

    def note(self, written: Written) -> None:
        """Add a chunk whose bytes, seal included, are all in the file.

        Raises:
            OSError: It cannot be written, as on a full disk.
        """
        text = json.dumps(vars(written), default=str, separators=(",", ":")).encode()
        self._append(b"%s %08x\n" % (text, zlib.crc32(text)))

    def close(self) -> None:
        """No more lines."""
        os.close(self._handle)

    def _append(self, line: bytes) -> None:
        while line:  # a disk that is nearly full takes a part, and then raises
            line = line[os.write(self._handle, line) :]


def read(journals: Iterable[Path]) -> dict[Place, Written]:
    """What the intact lines of some journals say; a line that is not intact says nothing, and costs its chunk again."""
    from converters.files.stream import Written

    found: dict[Place, Written] = {}
    for path in journals:
        for line in path.read_bytes().split(b"\n"):
            text, _, checksum = line.rpartition(b" ")
            if checksum == b"%08x" % zlib.crc32(text):
                fields = json.loads(text)
                written = Written(**{**fields, "file": Path(fields["file"])})
                found[place_of(written)] = written
    return found
