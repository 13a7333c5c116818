"""Two checkpoints, tensor by tensor: read from mapped files, one pair in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from converters.execute import bits
from parity.findings import Measurement
from parity.folders import differences as _differences
from parity.folders import read as _read

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

Tensors = Mapping[str, torch.Tensor]


def tensors(first: Path, second: Path) -> list[Measurement]:
    """Hold every tensor of one folder against the same of another.

    A tensor in another dtype must be what rounding the first's numbers once gives, which is said in the unit. A tied
    head that only one of them stores must be its embedding.
    """
    before, after = _read(first), _read(second)
    differing = [f"{key}: not in the second" for key in sorted(before.keys() - after.keys()) if not _tied(key, before)]
    differing += [f"{key}: not in the first" for key in sorted(after.keys() - before.keys()) if not _tied(key, after)]
    casts: dict[str, int] = {}
    shared = sorted(before.keys() & after.keys())
    for key in shared:
        expected, actual = before[key], after[key]
        if expected.dtype != actual.dtype:
            change = f"{_name(expected.dtype)} -> {_name(actual.dtype)}"
            casts[change] = casts.get(change, 0) + 1
            expected = expected.to(actual.dtype)
        differing += _differences(key, actual, expected, None)
    cast = "".join(f", {count} rounded once {change}" for change, count in casts.items())
    return [Measurement.equal("tensors", count=len(shared), unit=f"tensors{cast}", differing=differing)]


def _tied(key: str, tensors: Tensors) -> bool:
    """Whether a tensor is a stored copy of the embedding, which a tied model does not need."""
    if key != HEAD or EMBEDDING not in tensors or tensors[key].shape != tensors[EMBEDDING].shape:
        return False
    return torch.equal(bits(tensors[key]), bits(tensors[EMBEDDING]))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
