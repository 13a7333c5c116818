"""Which checkpoint of a folder of Megatron checkpoints: what its trackers say, and what is there.

Source: NVIDIA/Megatron-LM core_v0.16.1, megatron/training/checkpointing.py `get_checkpoint_name`, `read_metadata`;
    NVIDIA-NeMo/Megatron-Bridge 2026-08, src/megatron/bridge/training/checkpointing.py `_resolve_checkpoint_iteration`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from converters.errors import CheckpointError, listing
from converters.files import legacy, megatron_state
from converters.files.links import check_inside

Iteration = int | Literal["release"]
ASK = "name the iteration (--iteration)"


def resolve(path: Path, iteration: Iteration | None = None) -> Path:
    """The folder of the iteration that `path` leads to.

    Raises:
        CheckpointError: There is none, or nothing says which; a number that no iteration has.
    """
    if iteration not in (None, "release") and (type(iteration) is not int or iteration < 0):
        raise CheckpointError(f"iteration {iteration!r}: expected a number from 0 on, or 'release'")
    if not path.is_dir():
        raise CheckpointError(f"{path}: expected the folder of a Megatron checkpoint, found {contents(path)}")
    inside = iterations(path)
    if _is_iteration(path):
        if inside:
            raise CheckpointError(
                f"{path}: is a checkpoint, and holds others ({_named(inside)}): give one of the folders"
            )
        own = iteration_of(path)
        if iteration is not None and own != iteration:
            raise CheckpointError(f"{path}: is the folder of {own}, and {folder_name(iteration)} was asked for")
        return path
    if iteration is None:
        iteration = _tracked(path, inside)
    if iteration not in inside:
        raise CheckpointError(
            f"{path}: has no {folder_name(iteration)}; it has {_named(inside)}. "
            f"The checkpoint is unfinished or was moved: {ASK}"
        )
    return inside[iteration]


def iterations(folder: Path) -> dict[Iteration, Path]:
    """The checkpoints in a folder, by their iteration.

    Raises:
        CheckpointError: One is a link out of the folder.
    """
    found = {iteration_of(path): path for path in sorted(folder.iterdir()) if path.is_dir()}
    inside = {iteration: path for iteration, path in found.items() if iteration is not None}
    for path in inside.values():
        check_inside(path, folder)
    return inside


def _tracked(path: Path, inside: Mapping[Iteration, Path]) -> Iteration:
    """The iteration that the trackers name, or the only one."""
    said: dict[Path, Iteration | None] = {
        megatron_state.TRACKER: megatron_state.tracked(path),  # type: ignore[dict-item]  # an int, `release` or None
        megatron_state.STATE_TRACKER: megatron_state.tracked_step(path),
    }
    named = {file: iteration for file, iteration in said.items() if iteration is not None}
    if len(set(named.values())) > 1:
        lines = [f"{file}: {iteration}" for file, iteration in named.items()]
        raise CheckpointError(
            listing(f"{path}: its trackers name different iterations", lines) + f"\nIt has {_named(inside)}: {ASK}"
        )
    if named:
        return next(iter(named.values()))
    if len(inside) == 1:
        return next(iter(inside))
    if inside:
        raise CheckpointError(f"{path}: has no tracker and several checkpoints ({_named(inside)}): {ASK}")
    hint = ". It is a Hugging Face model" if (path / "config.json").is_file() else ""
    raise CheckpointError(
        f"{path}: no Megatron checkpoint: expected {megatron_state.TRACKER}, iter_*, or {megatron_state.METADATA}, "
        f"found {contents(path)}{hint}"
    )


def _is_iteration(path: Path) -> bool:
    names = (megatron_state.METADATA, megatron_state.COMMON, megatron_state.RUN_CONFIG, Path(".metadata"))
    return (
        any((path / name).is_file() for name in names) or any(path.glob("*.distcp")) or bool(legacy.rank_folders(path))
    )


def iteration_of(path: Path) -> Iteration | None:
    """The iteration that the name of a folder tells."""
    if path.name == "release":
        return "release"
    match = re.fullmatch(r"iter_([0-9]{7,18})", path.name)
    return int(match[1]) if match else None


def folder_name(iteration: Iteration) -> str:
    """The name of the folder of an iteration."""
    return iteration if isinstance(iteration, str) else f"iter_{iteration:07}"


def _named(inside: Mapping[Iteration, Path]) -> str:
    return ", ".join(path.name for path in inside.values()) or "no checkpoint"


def contents(path: Path) -> str:
    """What is at a path, for messages."""
    if not path.exists():
        return "nothing"
    if not path.is_dir():
        return "a file"
    names = sorted(entry.name for entry in path.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "an empty folder"
