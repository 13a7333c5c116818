"""Folders that appear whole or not at all: what may be a target, and the rename that comes last."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from converters.errors import CheckpointError

AT_FDCWD = -100
RENAME_EXCHANGE = 2
"""Source: linux/fs.h, `renameat2(2)`: two names change places in one step, of which no kill sees the half."""


def settled(target: Path) -> Path:
    """`target` from the root, with links resolved in its parents only: a target that is a link is to be refused."""
    return target.resolve() if target.name in ("", "..") else target.parent.resolve() / target.name


def check_target(target: Path, *, overwrite: bool = False, sources: Iterable[Path] = ()) -> None:
    """Refuse a folder that must not be made, before any work.

    Args:
        target: The folder to make.
        overwrite: It may be replaced.
        sources: Folders or files that are read meanwhile.

    Raises:
        CheckpointError: It is a link or a file, exists and may not be replaced, or is, holds or lies in a source.
    """
    target = settled(target)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        kind = "link" if target.is_symlink() else "file"
        raise CheckpointError(f"{target} is a {kind}, expected a folder or nothing")
    for source in (path.resolve() for path in sources):
        if target == source:
            raise CheckpointError(f"{target} is the source itself; choose another folder for the result")
        if source.is_relative_to(target):
            raise CheckpointError(f"{target} holds the source {source}; choose another folder for the result")
        if target.is_relative_to(source):
            raise CheckpointError(f"{target} lies inside the source {source}; choose another folder for the result")
    if target.exists() and not overwrite:
        raise CheckpointError(
            f"{target} exists already; choose another folder, or allow it to be replaced (--overwrite, in Python "
            "overwrite=True)"
        )


def sync(path: Path) -> None:
    """Have a file or a folder's names on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Have all of a folder on disk: its files first, each folder after what it names."""
    for path in sorted(folder.rglob("*"), key=lambda path: len(path.parts), reverse=True):
        sync(path)
    sync(folder)


def put(folder: Path, target: Path, aside: Path, *, overwrite: bool = True) -> Path | None:
    """Give a finished folder its name. What stood there is still whole afterwards, somewhere.

    Where the kernel and the file system can, an old folder and the new one change places in one step. Elsewhere the old
    one is renamed to `aside` first, and put back if its place cannot be taken.

    Args:
        folder: On disk, all of it.
        target: Its name to be, on the same file system.
        aside: A free name on the same file system.
        overwrite: `target` may exist.

    Returns:
        Where the old folder is now, to be removed; `None` where there was none.

    Raises:
        CheckpointError: `target` exists and may not be replaced.
        OSError: A rename failed; `folder` and `target` are as they were.
    """
    old: Path | None = None
    if os.path.lexists(target):
        check_target(target, overwrite=overwrite)
        if exchange(folder, target):
            old = folder
        else:
            target.rename(aside)
            old = aside
    if old is not folder:
        try:
            folder.rename(target)
        except BaseException:
            if old is not None:
                aside.rename(target)
            raise
    sync(target.parent)
    if folder.parent != target.parent:
        sync(folder.parent)
    return old


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; `False` where the kernel or the file system has no such call.

    Raises:
        OSError: It has, and refused.
    """
    import ctypes

    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))
