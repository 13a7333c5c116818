"""Folders that appear whole or not at all: what may be a target, and the rename that comes last."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

from converters.errors import CheckpointError

CHECKPOINTS = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    ".metadata",
    "*.distcp",
    "latest_checkpointed_iteration.txt",
    "latest_train_state.pt",
    "iter_*",
    "mp_rank_*",
)
"""What a folder of weights has at least one of."""

AT_FDCWD = -100
RENAME_EXCHANGE = 2
"""Source: linux/fs.h, `renameat2(2)`: two names change places in one step, of which no kill sees the half."""


def settled(target: Path) -> Path:
    """`target` from the root, with links resolved in its parents only: a target that is a link is to be refused.

    Raises:
        CheckpointError: No file can have this name.
    """
    try:
        found = target.resolve() if target.name in ("", "..") else target.parent.resolve() / target.name
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found.lstat()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL is a ValueError, links in a circle a RuntimeError
        raise CheckpointError(f"{shortened(target)} cannot be a folder: {_why(error)}") from error
    return found


def expanded(path: str | Path) -> str:
    """A path as it was typed, with `~` as the shell would have it; a shell leaves that of `--hf=~/model` alone."""
    text = str(path)
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:  # no such user
        return text


def shortened(path: str | Path) -> str:
    """A path for messages: whole, unless nobody would read it."""
    text = str(path)
    return repr(text) if len(text) <= 300 else f"{text[:200]!r}... ({len(text):,} characters)"


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def check_target(target: Path, *, overwrite: bool = False, sources: Iterable[Path] = ()) -> None:
    """Refuse a folder that must not be made, before any work.

    Args:
        target: The folder to make.
        overwrite: It may be replaced.
        sources: Folders or files that are read meanwhile.

    Raises:
        CheckpointError: It is a link or a file, exists and may not be replaced, is no checkpoint or a training run, or
            is, holds or lies in a source.
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
    if target.exists():
        _check_replaceable(target)


def _check_replaceable(target: Path) -> None:
    """To be replaced is to be deleted: refuse what a conversion cannot have made.

    Raises:
        CheckpointError: It is neither empty nor a checkpoint, or it holds several iterations, or a repository.
    """
    try:
        names = sorted(path.name for path in target.iterdir())
        alike = any(any(target.glob(pattern)) for pattern in CHECKPOINTS)
        iterations = sorted(path.name for path in target.glob("iter_*") if path.is_dir())
    except OSError as error:
        raise CheckpointError(f"{target} exists and cannot be looked into ({error}): it is not replaced") from error
    if names and not alike:
        found = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise CheckpointError(
            f"{target} does not look like a checkpoint, and only one is replaced: expected config.json, *.safetensors, "
            f".metadata, a tracker, iter_* or mp_rank_*, found {found}. Remove it yourself, or choose another folder"
        )
    if ".git" in names:
        raise CheckpointError(
            f"{target} holds .git, whose history would go with it. Remove the folder yourself, or choose another one"
        )
    if len(iterations) > 1:
        raise CheckpointError(
            f"{target} holds {len(iterations)} iterations ({iterations[0]} to {iterations[-1]}) of a training run, and "
            "one would take the place of all. Remove it yourself, or choose another folder"
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
