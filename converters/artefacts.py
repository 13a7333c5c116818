"""The files of a checkpoint folder that are not weights, and folders that appear complete or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, listing
from converters.files import place
from converters.files.links import outside

NOT_CARRIED = ("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")
"""Weights in any format, and pickles."""
NOT_TRUE_OF_COPIES = ("parity-certificate.json", "parity-certificate.md")
"""A verification card holds digests of the very folder that it is in."""
NOT_ENTERED = ("original", "onnx")
"""Folders with the same weights in another format."""


def carried(folder: Path, *, code: bool = False) -> list[Path]:
    """The files that an export takes over byte for byte: tokenizer, generation config, chat templates, licence, ...

    That is every file but weights, pickles, code, hidden files, verification cards, and the config, which is written by
    itself.

    Args:
        folder: The source checkpoint.
        code: Take Python files too (the user trusts them).

    Returns:
        Paths relative to `folder`.

    Raises:
        CheckpointError: Links that lead out of the folder: who wrote it may not choose what is read here.
    """
    patterns = NOT_CARRIED if code else (*NOT_CARRIED, "*.py")
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    kept = [
        path
        for path in found
        if path != Path("config.json")
        and path.name not in NOT_TRUE_OF_COPIES
        and not any(fnmatch(path.name, pattern) for pattern in patterns)
        and not any(part.startswith(".") or part in NOT_ENTERED for part in path.parts)
    ]
    astray = [f"{path} -> {there}" for path in kept if (there := outside(folder / path, folder))]
    if astray:
        raise CheckpointError(
            listing(f"{folder}: links that lead out of it, to files that would be copied", astray)
            + "\nReplace them by the files, or remove them"
        )
    return kept


def patched(config: Mapping[str, Any], changes: Mapping[str, Any], spellings: Mapping[str, tuple[str, ...]]) -> str:
    """The text of `config` with fields changed, each wherever it stands already, or in the object that the config has.

    Args:
        config: A `config.json`, as read.
        changes: New values by field name.
        spellings: The paths at which each field may stand.
    """
    out = json.loads(json.dumps(config))
    for name, value in changes.items():
        present = [path for path in spellings[name] if path.rpartition(".")[2] in (_parent(out, path) or ())]
        # Not `rope_parameters` in a config that spells it `rope_scaling`: its transformers would not read it.
        rooted = [path for path in spellings[name] if "." not in path or path.partition(".")[0] in out]
        for path in present or (rooted or spellings[name])[:1]:
            *parents, last = path.split(".")
            at = out
            for step in parents:
                if not isinstance(at.get(step), dict):
                    at[step] = {}
                at = at[step]
            at[last] = value
    return json.dumps(out, indent=2) + "\n"


def _parent(config: dict[str, Any], path: str) -> dict[str, Any] | None:
    """The object that a path ends in, or `None` where there is none."""
    at: Any = config
    for step in path.split(".")[:-1]:
        at = at.get(step)
        if not isinstance(at, dict):
            return None
    return at  # type: ignore[no-any-return]


def begin(target: Path, *, overwrite: bool = False) -> Path:
    """An empty folder beside `target`, on its file system, to be written and then put in its place.

    Raises:
        CheckpointError: `target` exists and may not be replaced, or its parent cannot be written.
    """
    place.check_target(target, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write beside {target}: {error}") from error


def commit(partial: Path, target: Path) -> None:
    """Put a finished folder in its place: its files and itself on disk first, the rename last."""
    partial.chmod(0o755)
    place.sync_tree(partial)
    old = place.put(partial, target, partial.with_suffix(".replaced"))
    if old is not None:
        shutil.rmtree(old)
