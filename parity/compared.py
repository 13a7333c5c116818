"""Two checkpoints, tensor by tensor: read from mapped files, one pair in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from converters.execute import bits
from converters.topology import Topology
from parity.causes import Cause
from parity.findings import Measurement
from parity.folders import Rounded, differences, opened, read, strays, tensor_causes

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

Tensors = Mapping[str, torch.Tensor]


def tensors(first: Path, second: Path) -> list[Measurement]:
    """Hold every tensor of one folder against the same of another.

    A tensor in another dtype must be what rounding the first's numbers once gives, which is said in the unit. A tied
    head that only one of them stores must be its embedding.
    """
    source = read(first)
    after, unreadable = opened(second)
    before = Rounded(source, {key: tensor.dtype for key, tensor in after.items()})
    causes = [Cause(kind="unreadable", what=(file,), detail=why) for file, why in unreadable]
    differing = [f"{file}: {why}" for file, why in unreadable]
    extra = [name for name in strays(second) if name not in strays(first)]
    causes += [Cause(kind="files", what=(name,), detail="weights that no index names") for name in extra]
    differing += [f"{name}: weights that no index names, which a loader may take for the checkpoint" for name in extra]
    copies = [key for key in source.keys() ^ after.keys() if _tied(key, source if key in source else after)]
    differing += [f"{key}: not in the second" for key in sorted(source.keys() - after.keys() - {*copies})]
    differing += [f"{key}: not in the first" for key in sorted(after.keys() - source.keys() - {*copies})]
    shared = sorted(source.keys() & after.keys())
    casts: dict[str, int] = {}
    for key in shared:
        if source[key].dtype != after[key].dtype:
            change = f"{_name(source[key].dtype)} -> {_name(after[key].dtype)}"
            casts[change] = casts.get(change, 0) + 1
        differing += differences(key, after[key], before[key], None)
    if differing:
        config = json.loads((first / "config.json").read_text())
        left, right = ({key: side[key] for key in side if key not in copies} for side in (before, after))
        causes += tensor_causes(left, right, config, Topology(), None)
    cast = "".join(f", {count} rounded once {change}" for change, count in casts.items())
    tied = f"; {' and '.join(copies)}, a copy of the embedding, is stored by one of them" if copies else ""
    return [
        Measurement.equal(
            "tensors",
            count=len(shared),
            unit=f"tensors{cast}{tied}",
            differing=differing,
            causes=causes,
        )
    ]


def narrower(first: Path, second: Path) -> str | None:
    """The half precision that all of the second's tensors have and the first's have not; `None` otherwise."""
    mine, theirs = ({tensor.dtype for tensor in read(folder).values()} for folder in (first, second))
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return next((name for dtype, name in names.items() if theirs == {dtype} and theirs != mine), None)


def _tied(key: str, tensors: Tensors) -> bool:
    """Whether a tensor is a stored copy of the embedding, which a tied model does not need."""
    if key != HEAD or EMBEDDING not in tensors or tensors[key].shape != tensors[EMBEDDING].shape:
        return False
    return torch.equal(bits(tensors[key]), bits(tensors[EMBEDDING]))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
