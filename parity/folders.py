"""Two checkpoint folders, tensor by tensor, file by file and config field by field: what differs, and why."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from converters.artefacts import carried
from converters.errors import CheckpointError, listing
from converters.execute import bits
from converters.topology import Topology
from parity import coded
from parity.causes import Cause, field_name, shorts
from parity.diagnosis.diagnose import diagnose
from parity.diagnosis.provenance import Floats
from parity.difference_map import Worst, worst

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DIAGNOSED = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a comparison found.

    Args:
        count: Tensors and files compared.
        differing: What differs, a line each.
        causes: What explains it.
        worst: The tensor with the most wrong elements.
    """

    count: int
    differing: tuple[str, ...] = ()
    causes: tuple[Cause, ...] = ()
    worst: Worst | None = None


class Lazy(Mapping[str, Floats]):
    """Tensors as float32 arrays, each made when it is asked for; narrower dtypes are widened, which is exact."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], change: Callable[[str, Floats], Floats] | None = None):
        self._tensors, self._change = tensors, change

    def __getitem__(self, key: str) -> Floats:
        values: Floats = self._tensors[key].detach().cpu().to(torch.float32).numpy()
        return values if self._change is None else self._change(key, values)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Rounded(Mapping[str, torch.Tensor]):
    """Tensors in other dtypes, each rounded when it is asked for.

    Args:
        tensors: As they are stored.
        dtypes: By key; a tensor that has none here stays as it is.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
        self._tensors, self._dtypes = tensors, dtypes

    def __getitem__(self, key: str) -> torch.Tensor:
        tensor = self._tensors[key]
        return tensor.to(self._dtypes.get(key, tensor.dtype))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def compare_folders(
    folder: Path,
    target: Path,
    dtype: torch.dtype,
    topology: Topology,
    *,
    table: coded.Table | None = None,
) -> Found:
    """What differs between a checkpoint and its round trip; tensors are expected in `dtype`, rounded once.

    Args:
        folder: The source.
        target: The export.
        dtype: Of the model in between.
        topology: Its layout, for the diagnosis.
        table: Of a coded source, whose elements say where they are from.
    """
    source = read(folder)
    before: Mapping[str, torch.Tensor] = Rounded(source, dict.fromkeys(source, dtype))
    kept = all(tensor.dtype == dtype for tensor in source.values())
    after, unreadable = opened(target)
    causes = [Cause(kind="unreadable", what=(file,), detail=why) for file, why in unreadable]
    lines = [f"{file}: {why}" for file, why in unreadable]
    extra = [name for name in strays(target) if name not in strays(folder)]
    causes += [Cause(kind="files", what=(name,), detail="weights that no index names") for name in extra]
    lines += [f"{name}: weights that no index names, which a loader may take for the checkpoint" for name in extra]
    lines += [f"{key}: lost" for key in sorted(set(before) - set(after))]
    lines += [f"{key}: new" for key in sorted(set(after) - set(before))]
    for key in sorted(set(before) & set(after)):
        lines += differences(key, after[key], before[key], table)
    shown = None
    if lines:
        pairs = {key: (after[key], before[key]) for key in sorted(set(before) & set(after))}
        shown = worst(pairs, is_coded=table is not None)
        config = json.loads((folder / "config.json").read_text())
        # A file that cannot be read takes its tensors with it: that is one cause, not many.
        if unreadable:
            before = {key: tensor for key, tensor in before.items() if key in after}
        causes += tensor_causes(before, after, config, topology, table if dtype == torch.float32 else None)
    files = [Path("config.json"), *carried(folder)]
    for name in files:
        if not (target / name).is_file():
            lines.append(f"{name}: missing")
            causes.append(Cause(kind="files", what=(str(name),), detail="lost"))
        elif (folder / name).read_bytes() == (target / name).read_bytes():
            continue
        elif str(name) != "config.json":
            lines.append(f"{name}: not the same bytes")
            causes.append(Cause(kind="files", what=(str(name),), detail="changed"))
        else:
            said, why = _config_differences(folder / name, target / name, None if kept else dtype)
            lines += said
            causes += why
    return Found(count=len(source) + len(files), differing=tuple(lines), causes=tuple(causes), worst=shown)


def tensor_causes(
    expected: Mapping[str, torch.Tensor],
    actual: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    topology: Topology,
    table: coded.Table | None,
) -> list[Cause]:
    """The diagnosis of tensors, those of another dtype apart: their contents are not looked at."""
    causes = []
    other = [key for key in expected if key in actual and expected[key].dtype != actual[key].dtype]
    other += [key for key in expected if key not in other and expected[key].dtype not in DIAGNOSED]
    if other:
        found = sorted({str(actual[key].dtype).removeprefix("torch.") for key in other})
        causes.append(Cause(kind="dtype", what=shorts(other), detail=f"found {', '.join(found)}"))
    left = {key: tensor for key, tensor in expected.items() if key not in other}
    right = {key: tensor for key, tensor in actual.items() if key not in other}
    return causes + diagnose(Lazy(left), Lazy(right), config, topology, table=table)


def differences(name: str, actual: torch.Tensor, expected: torch.Tensor, table: coded.Table | None) -> list[str]:
    """What differs between two tensors, at most one line."""
    if actual.shape != expected.shape:
        return [f"{name}: expected shape {list(expected.shape)}, found {list(actual.shape)}"]
    if actual.dtype != expected.dtype:
        return [f"{name}: expected {expected.dtype}, found {actual.dtype}"]
    wrong = bits(actual.contiguous()) != bits(expected.contiguous())
    count = int(wrong.sum())
    if not count:
        return []
    at = tuple(int(i) for i in torch.nonzero(wrong)[0])
    left, right = float(expected[at]), float(actual[at])
    if table is not None and actual.dtype == torch.float32:
        shown = f"should be {coded.where_from(table, left)}, is {coded.where_from(table, right)}"
    else:
        shown = f"should be {left!r}, is {right!r}"
    return [f"{name}: {count:,} of {wrong.numel():,} elements differ; the first, {list(at)}, {shown}"]


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, mapped: of the files that its index names, or of its one file.

    Raises:
        CheckpointError: Files that cannot be read, or that disagree with their index.
    """
    tensors, problems = opened(folder)
    if problems:
        raise CheckpointError(listing(f"{folder}: files that cannot be read", [": ".join(pair) for pair in problems]))
    return tensors


def opened(folder: Path) -> tuple[dict[str, torch.Tensor], list[tuple[str, str]]]:
    """The tensors of a checkpoint that can be read, mapped, and each file that cannot, with the reason."""
    out: dict[str, torch.Tensor] = {}
    problems: list[tuple[str, str]] = []
    promised: dict[str, set[str]] = {SINGLE: set()}
    if indexed := (folder / INDEX).is_file():
        try:
            promised = {}
            for key, name in json.loads((folder / INDEX).read_text())["weight_map"].items():
                promised.setdefault(name, set()).add(key)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return {}, [(INDEX, f"no index with a weight_map: {error!r}")]
    for name, keys in sorted(promised.items()):
        try:
            handle = safe_open(folder / name, framework="pt")
            held = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118  # not a mapping
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            problems.append((name, f"{error}"))
            continue
        out |= held
        if indexed and (lacking := keys - set(held)):
            problems.append((INDEX, f"promises what {name} lacks: {', '.join(sorted(lacking)[:3])}"))
        if indexed and (beyond := set(held) - keys):
            problems.append((INDEX, f"lacks what {name} holds: {', '.join(sorted(beyond)[:3])}"))
    return out, problems


def strays(folder: Path) -> list[str]:
    """Weight files that are no part of the checkpoint, and that a loader may take in its place.

    transformers prefers one `model.safetensors` to an index, whichever is newer.
    """
    index = folder / INDEX
    named = {SINGLE}
    if index.is_file():
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # which `opened` reports
            named = set(json.loads(index.read_text())["weight_map"].values())
    return sorted(path.name for path in folder.iterdir() if path.suffix in WEIGHTS and path.name not in named)


def _config_differences(before: Path, after: Path, dtype: torch.dtype | None) -> tuple[list[str], list[Cause]]:
    """The fields of two configs that differ; with `dtype`, the one that records it must say so."""
    old = json.loads(before.read_text())
    try:
        new = json.loads(after.read_text())
    except ValueError as error:
        return [f"config.json: no JSON: {error}"], [Cause(kind="unreadable", what=("config.json",), detail=str(error))]
    if dtype is not None:
        said = {new.pop(name) for name in ("dtype", "torch_dtype") if name in new}
        for name in ("dtype", "torch_dtype"):
            old.pop(name, None)
        if said != {str(dtype).removeprefix("torch.")}:
            detail = f"the tensors are {dtype}, its dtype says {said or 'nothing'}"
            return [f"config.json: {detail}"], [Cause(kind="config", what=("dtype",), detail=detail)]
        if old == new:
            return [], []
    names = [name for name in sorted(set(old) | set(new)) if old.get(name) != new.get(name)]
    lines = [f"config.json: {name} was {old.get(name)!r} and is {new.get(name)!r}" for name in names]
    causes = []
    for name in names:
        left, right = (_leaves(name, side[name]) if name in side else {} for side in (old, new))
        if not left or not right:  # an object that is gone is one field
            left, right = {name: old.get(name)}, {name: new.get(name)}
        for path in sorted(set(left) | set(right)):
            if left.get(path) != right.get(path):
                detail = f"was {left.get(path)!r} and is {right.get(path)!r}"
                what = "rope_scaling" if path == "rope_parameters" else field_name(path)
                causes.append(Cause(kind="config", what=(what,), detail=detail))
    changed = Cause(kind="files", what=("config.json",), detail="other bytes of the same fields")
    return (lines, causes) if lines else (["config.json: not the same bytes"], [changed])


def _leaves(path: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {f"{path}.{name}": inner for name, inner in value.items()}


def widened(values: torch.Tensor) -> Floats:
    """A tensor's values in float32, flat."""
    return np.ascontiguousarray(values.detach().cpu().to(torch.float32).numpy()).ravel()
