"""What a test may leave behind: processes below this one, and files."""

from __future__ import annotations

from pathlib import Path


def descendants(pid: int) -> set[int]:
    """The pids of all processes below `pid`, zombies included."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found: set[int] = set()
    level = {pid}
    while level := {child for child, parent in parents.items() if parent in level} - found:
        found |= level
    return found


def files(folder: Path) -> set[Path]:
    """What lies in `folder`, but for the cache that an import of torch's compiler makes."""
    return {path for path in folder.rglob("*") if "torchinductor" not in str(path)}
