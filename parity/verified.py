"""What the verification of two checkpoints of any formats comes to, and two files held against each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from converters.files.safetensors import SafetensorsFiles
from converters.files.verify import Verification
from parity.findings import Measurement

PIECE = 8 << 20


def rows(found: Verification) -> tuple[Measurement, Measurement]:
    """The tensors, and the config, as they differ."""
    tensors = []
    for each in found.different:
        count = [f"{each.differing:,} of {each.elements:,} elements differ"] if each.differing else []
        at = [f"the first at {list(each.first[0].index)}"] if each.first else []
        tensors.append(f"{each.key}: " + "; ".join([*count, *at, *each.faults]))
    nonfinite = [f"{key}: {mine:,} and {theirs:,} NaN or Inf" for key, (mine, theirs) in found.nonfinite.items()]
    fields = [
        f"{name} is {mine!r} in the first and {theirs!r} in the second" for name, (mine, theirs) in found.config.items()
    ]
    unit = "tensors, of which a sample was read," if found.sampled else "tensors"
    return (
        Measurement.equal(
            "tensors",
            count=found.tensors or len(tensors),
            unit=unit,
            differing=tensors,
            detail="\n".join([*nonfinite, *found.remarks]),
        ),
        Measurement.equal("config", count=1, unit="configs", differing=fields),
    )


def difference(folder: Path, back: Path, path: Path) -> str:
    """In what a file differs, in a line; an empty string for equal bytes."""
    for one, which in ((folder, "not in the source"), (back, "lost")):
        if not (one / path).is_file():
            return f"{path}: {which}"
    left, right = ((one / path).stat().st_size for one in (folder, back))
    wrong, at, first, keys = 0, 0, None, dict[str, None]()
    starts = _starts(folder, path)
    with (folder / path).open("rb") as before, (back / path).open("rb") as after:
        while (old := before.read(PIECE)) and (new := after.read(PIECE)):
            if old != new:
                size = min(len(old), len(new))
                places = at + np.flatnonzero(np.frombuffer(old, np.uint8, size) != np.frombuffer(new, np.uint8, size))
                wrong += len(places)
                if len(places):
                    first = int(places[0]) if first is None else first
                    owners = np.unique(np.searchsorted([start for start, _ in starts], places, side="right") - 1)
                    keys |= dict.fromkeys(starts[owner][1] for owner in owners.tolist() if starts)
            at += len(old)
    if not wrong and left == right:
        return ""
    length = "" if left == right else f"{left:,} bytes became {right:,}; "
    within = f", in {', '.join(list(keys)[:4])}{' ...' * (len(keys) > 4)}" if keys else ""
    return f"{path}: {length}{wrong:,} bytes differ{'' if first is None else f', the first at {first:,}'}{within}"


def _starts(folder: Path, path: Path) -> list[tuple[int, str]]:
    """Where each tensor of a weight file begins, in order; before the first is the header."""
    if path.suffix != ".safetensors":
        return []
    files = SafetensorsFiles(folder)
    keys = files.shards().get(path.name, [])
    return [(0, "the header"), *sorted((files.extents(key)[0].offset, key) for key in keys if files.extents(key))]
