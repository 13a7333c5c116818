"""Whether two runs are of the same conversion: digests of what is read, of options, and of what is to be written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from converters.files.extents import FolderLayout
from converters.files.identity import Identity

ENDS = 1 << 16
"""Bytes digested at both ends of a source file: the header of a safetensors file, the directory of an archive."""


def of_sources(files: Iterable[Path], **options: Any) -> str:
    """A digest of source files (name, size, time of change, both ends) and options (by their `repr`).

    It is the same on every machine that sees the same files, or exact copies of them; no weights are read, so other
    files may have it too: see `of_identities`.
    """
    digest = hashlib.sha256(repr(sorted(options.items())).encode())
    for path in sorted(files):
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            digest.update(repr((path.name, status.st_size, status.st_mtime_ns)).encode())
            digest.update(file.read(ENDS))
            file.seek(max(status.st_size - ENDS, 0))
            digest.update(file.read(ENDS))
    return digest.hexdigest()


def of_identities(identities: Mapping[Path, Identity]) -> str:
    """A digest of which files are read, as one machine knows them: it changes when one is written to or replaced."""
    found = sorted((str(path.resolve()), tuple(identity)) for path, identity in identities.items())
    return hashlib.sha256(repr(found).encode()).hexdigest()


def of_layout(layout: FolderLayout) -> str:
    """A digest of all that a folder will be but the weights."""
    digest = hashlib.sha256()
    for path, size in sorted(layout.sizes.items()):
        digest.update(repr((str(path), size)).encode())
    for path, pieces in sorted(layout.fixed.items()):
        for offset, data in pieces:
            digest.update(repr((str(path), offset, len(data))).encode())
            digest.update(data)
    for chunk in layout.chunks:
        at, info = chunk.extent, chunk.info
        digest.update(repr((chunk.key, info.dtype, info.shape, str(at.file), at.offset, at.starts, at.shape)).encode())
    for path, data in sorted(layout.small.items()):
        digest.update(repr((str(path), len(data))).encode())
        digest.update(data)
    for path, source in sorted(layout.copied.items()):
        status = source.stat()
        digest.update(repr((str(path), status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()
