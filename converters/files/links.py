"""Whether a file of a checkpoint folder is in that folder: a link may lead to what is nobody else's to read."""

from __future__ import annotations

from pathlib import Path

from converters.errors import CheckpointError


def outside(path: Path, folder: Path) -> Path | None:
    """Where a file really is, if that is neither in `folder` nor where the hub's cache keeps the files of the folder.

    In that cache a revision is a folder of links: `models--ORG--NAME/snapshots/REVISION/config.json` leads to
    `models--ORG--NAME/blobs/DIGEST`. The folder itself may be reached by any links: the user named it.

    Raises:
        OSError: A link that leads in a circle.

    Source: huggingface/huggingface_hub, file_download.py, `_create_symlink`.
    """
    root, found = folder.resolve(), path.resolve()
    allowed = [root, *(parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots")]
    return None if any(found.is_relative_to(place) for place in allowed) else found


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a file or folder of a checkpoint that is a link out of it.

    Raises:
        CheckpointError: See `outside`; or a link that leads in a circle.
    """
    try:
        place = outside(path, folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle, before Python 3.13
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if place:
        raise CheckpointError(f"{path}: is a link out of its folder, to {place}: open that folder, or copy the file")
