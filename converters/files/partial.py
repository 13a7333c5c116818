"""What lies beside a target until it is complete: `.NAME.partial`, which no reader takes for a checkpoint.

lock        held by every process that writes here
state       whose conversion this is; the last to be written when it begins
journal-R   the chunks that rank R has finished
stopped     left by a rank that failed, for the others
small/      index, config, metadata, trackers: what makes a folder look like a checkpoint
folder/     the folder to be: all large files at full size; in the end the small ones, and then it is renamed
replaced    the folder that stood in the target's place, for the moment between two renames
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import filecmp
import hashlib
import json
import os
import platform
import re
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, listing
from converters.files import place
from converters.files.extents import FolderLayout

VERSION = 1
FAILED, INTERRUPTED = "failed", "interrupted"
FOLDERS = ("small", "folder", "replaced", "removed")
FILES = re.compile(r"lock|state|state\.new|journal-[0-9]+|stopped|stopped-[0-9]+")
"""All names that are ever in a partial folder; those of `FOLDERS` besides."""
LONGEST = 255
"""Bytes of a file's name. Source: linux/limits.h, `NAME_MAX`."""


class Partial:
    """The hidden folder beside one target, and the lock on it.

    Args:
        target: The folder to make.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.root = target.parent / _beside(target.name)
        self.folder, self.small, self.replaced = (self.root / name for name in ("folder", "small", "replaced"))
        self.state, self.stopped, self._lock = (self.root / name for name in ("state", "stopped", "lock"))
        self._handle: int | None = None

    @property
    def journals(self) -> list[Path]:
        """Of every rank that has written here."""
        return sorted(self.root.glob("journal-*"))

    def lock(self) -> bool:
        """Keep all others out, from here to `unlock`.

        Returns:
            Whether there was something here: left by a process that is no more.

        Raises:
            CheckpointError: A living process writes here, nobody can, or what is here no conversion has left.
        """
        try:
            while self._handle is None:
                if not os.path.lexists(self.root):
                    self.root.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):  # removed by another process meanwhile
                    self._check_own()
                    self._handle = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                    self._flock(fcntl.LOCK_EX)
                    if self._lock.stat().st_ino == os.fstat(self._handle).st_ino:
                        break
                self.unlock()
            os.ftruncate(self._handle, 0)
            write_all(self._handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)
            return any(path != self._lock for path in self.root.iterdir())
        except OSError as error:
            self.unlock()
            raise CheckpointError(f"cannot write beside {self.target}: {error}") from error

    def share(self) -> None:
        """Hold the lock together with other ranks: first the one that has it alone, then they.

        Raises:
            CheckpointError: Another process has it.
        """
        if self._handle is None:
            self._handle = os.open(self._lock, os.O_RDWR | os.O_NOFOLLOW)
        self._flock(fcntl.LOCK_SH)

    def unlock(self) -> None:
        """Let others in."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _check_own(self) -> None:
        """Refuse what is not a partial folder, before anything in it is touched: all of it may be removed later.

        Raises:
            CheckpointError: A link, a file, or other things than a conversion leaves.
            FileNotFoundError: It is gone.
        """
        ask = "It is left alone: move it away, or choose another target"
        if not stat.S_ISDIR(self.root.lstat().st_mode):
            kind = "link" if self.root.is_symlink() else "file"
            raise CheckpointError(f"{self.root} is a {kind}, and {self.target} is made in a folder of that name. {ask}")
        with os.scandir(self.root) as found:
            foreign = [
                f"{entry.name}{' (a link)' if entry.is_symlink() else ''}"
                for entry in found
                if not (
                    entry.name in FOLDERS
                    if entry.is_dir(follow_symlinks=False)
                    else FILES.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
                )
            ]
        if foreign:
            raise CheckpointError(
                listing(
                    f"{self.root}: {self.target} is made in a folder of that name, and this one holds what no "
                    "conversion leaves",
                    foreign,
                )
                + f"\n{ask}"
            )

    def _flock(self, kind: int) -> None:
        assert self._handle is not None
        try:
            fcntl.flock(self._handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            other = os.pread(self._handle, 200, 0).decode(errors="replace") or "another process"
            raise CheckpointError(
                f"{self.target} is being written by {other}; wait for it, or choose another folder"
            ) from None

    def put_back(self) -> bool:
        """After a kill between two renames, give the old folder its name again."""
        if not self.replaced.exists() or os.path.lexists(self.target):
            return False
        self.replaced.rename(self.target)
        place.sync(self.target.parent)
        return True

    def identity(self) -> dict[str, str]:
        """The identity that `prepare` was given, or nothing where it did not get to the end."""
        found: dict[str, str] = self._read().get("identity", {})
        return found

    def holds(self, folder: Path) -> bool:
        """Whether `folder` is the one that was prepared here: two names may have changed places since."""
        return folder.is_dir() and folder.stat().st_ino == self._read().get("inode")

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.state.read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and found.get("version") == VERSION else {}

    def prepare(self, layout: FolderLayout, identity: dict[str, str]) -> None:
        """Everything that can be written before the weights; or, of a prepared folder, whatever may have been lost.

        Raises:
            CheckpointError: The disk is full, or does not take so large a file.
        """
        at = self.root
        try:
            self.stopped.unlink(missing_ok=True)
            for at, size in layout.sizes.items():
                _reserve(self._inside(self.folder, at), size, layout.fixed.get(at, ()))
            for at, data in layout.small.items():
                self._inside(self.folder, at).unlink(missing_ok=True)
                self._inside(self.small, at).write_bytes(data)
            for at, source in layout.copied.items():
                self._inside(self.folder, at).unlink(missing_ok=True)
                shutil.copyfile(source, self._inside(self.small, at))
            self.folder.mkdir(exist_ok=True)
            state = {"version": VERSION, "identity": identity, "inode": self.folder.stat().st_ino}
            at = self.state.with_suffix(".new")
            at.write_text(json.dumps(state))
            at.replace(self.state)
        except OSError as error:
            total = sum(layout.sizes.values()) + sum(map(len, layout.small.values()))
            total += sum(path.stat().st_size for path in layout.copied.values())
            free = shutil.disk_usage(self.target.parent).free
            raise CheckpointError(
                f"cannot make room for {total:,} bytes beside {self.target}: {error.strerror or error}, at {at} "
                f"({free:,} bytes are free)"
            ) from error

    def _inside(self, folder: Path, path: Path) -> Path:
        if path.is_absolute() or ".." in path.parts:
            raise CheckpointError(f"{path} is not inside the folder to be written")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        return folder / path

    def stop(self, how: str) -> None:
        """Tell the other ranks that this one has ended."""
        with contextlib.suppress(OSError):
            whole = self.root / f"stopped-{os.getpid()}"
            whole.write_text(how)
            whole.replace(self.stopped)

    def heard(self) -> str:
        """How another rank has ended; nothing while all go on."""
        try:
            return self.stopped.read_text()
        except FileNotFoundError:
            return ""

    def complete(self, layout: FolderLayout) -> bool:
        """Whether the target has all files of a layout, the small ones byte for byte."""
        paths = {self.target / path: size for path, size in layout.sizes.items()}
        return (
            all(path.is_file() and path.stat().st_size == size for path, size in paths.items())
            and all(
                (self.target / path).is_file() and (self.target / path).read_bytes() == data
                for path, data in layout.small.items()
            )
            and all(
                (self.target / path).is_file() and filecmp.cmp(self.target / path, source, shallow=False)
                for path, source in layout.copied.items()
            )
        )

    def place(self, layout: FolderLayout, *, overwrite: bool) -> None:
        """Add the small files, and give the folder its name. The large ones are on disk already.

        Raises:
            CheckpointError: The target exists and may not be replaced.
            OSError: A rename failed; the target is as it was.
        """
        small = [*layout.small, *layout.copied]
        for path in small:
            (self.small / path).replace(self.folder / path)
        for path in small:
            place.sync(self.folder / path)
        for folder in sorted((path for path in self.folder.rglob("*") if path.is_dir()), reverse=True):
            place.sync(folder)
        place.sync(self.folder)
        place.put(self.folder, self.target, self.replaced, overwrite=overwrite)

    def clear(self) -> None:
        """Leave nothing but the lock. A target's old folder goes too: call it when the target is what it should be.

        What takes its time goes first, and the state after it: until then a resumed run finds out where this one stood.
        """
        if self.replaced.exists():  # half a folder must never be put back
            self.replaced.rename(self.root / "removed")
        for path in sorted(self.root.iterdir(), key=lambda path: (not path.is_dir(), path != self.state)):
            if path.is_dir():
                shutil.rmtree(path)
            elif path != self._lock:
                path.unlink()

    def remove(self) -> None:
        """Leave nothing, and let others in."""
        self.clear()
        self._lock.unlink()
        self.unlock()
        try:
            self.root.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):  # the next process is here already
                raise


def _beside(name: str) -> str:
    """The hidden name that belongs to a target's; where it would be too long, a digest stands for the end."""
    hidden = f".{name}.partial"
    if len(os.fsencode(hidden)) <= LONGEST:
        return hidden
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return f".{os.fsdecode(os.fsencode(name)[:200])}-{digest}.partial"


def _reserve(path: Path, size: int, fixed: Iterable[tuple[int, bytes]]) -> None:
    """A file at full size, with its place on disk where the file system can promise one, and its fixed bytes.

    Raises:
        OSError: No room.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if os.fstat(handle).st_size > size:
            os.ftruncate(handle, size)
        allocate(handle, size)
        for offset, data in fixed:
            write_all(handle, data, offset)
    finally:
        os.close(handle)


def allocate(handle: int, size: int) -> None:
    """Blocks for a whole file. A file system that promises none gives its size alone, and may still run full later."""
    if not size:
        return
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(handle, size)


def write_all(handle: int, data: bytes, offset: int) -> None:
    """All of `data`, however few bytes the system takes at a time."""
    view = memoryview(data)
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count
