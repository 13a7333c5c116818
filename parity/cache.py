"""A folder that is made once: aside, under a lock, and renamed into place when it is complete.

Several processes may ask for the same folder at once (test workers do). One makes it, the others wait and take it. A
process that dies half-way leaves nothing that looks complete, and its leavings go when the folder is made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = ".complete.json"
_DIGEST_UP_TO = 1 << 20  # bytes: larger files are checked by size alone, so that the check stays cheap


def cache_root(cache: Path | None = None) -> Path:
    """Where prepared models live: `cache`, or `PARITY_CACHE`, or `llama-parity` in the user's cache folder."""
    if cache is not None:
        return cache
    if own := os.environ.get("PARITY_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llama-parity"


def digest_of(what: Any) -> str:
    """Twelve hex digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def complete(folder: Path) -> bool:
    """Whether `folder` holds what was put there: every file of its size, and small ones of their digest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return bool(manifest) and all(_entry(folder / name) == entry for name, entry in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, made by `make` unless it is already complete.

    Args:
        folder: Where it shall be. A damaged one there is made again.
        make: Fills the empty folder that it is given, which lies beside `folder` on the same file system.
    """
    if complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if complete(folder):  # another process made it while this one waited
            return folder
        aside = folder.with_name(f"{folder.name}.part")
        for leavings in (aside, folder):
            if leavings.exists():
                shutil.rmtree(leavings)
        aside.mkdir()
        try:
            make(aside)
            made = sorted(path for path in aside.rglob("*") if path.is_file())
            assert made, "a folder that is made must hold a file"
            manifest = {str(path.relative_to(aside)): _entry(path) for path in made}
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
            aside.rename(folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    return folder


def _entry(path: Path) -> list[Any]:
    size = path.stat().st_size
    return [size, hashlib.sha256(path.read_bytes()).hexdigest() if size <= _DIGEST_UP_TO else None]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process to make {path.with_suffix('')}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
