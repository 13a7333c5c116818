"""`AutoBridge` in real ranks with the real Megatron-Core: in, out, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bridged
import pytest
import torch
from safetensors.torch import load_file

from converters.topology import Topology
from parity.ranks import Zygote

Run = Callable[..., list[Any]]
Changed = Callable[..., Path]
TP2, PP2 = Topology(tp=2), Topology(pp=2)
EMBEDDING = "model.embed_tokens.weight"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def beside(target: Path) -> list[str]:
    """What lies where `target` should be: it, or what an export that failed has left."""
    return sorted(path.name for path in target.parent.iterdir() if target.name in path.name)


@pytest.mark.parametrize(
    ("name", "topology", "fields"),
    [
        ("odd", Topology(tp=3), {}),  # five groups over three ranks: a ghost group; 509 rows in 510
        ("odd", Topology(tp=3, sp=True), {"make_vocab_size_divisible_by": 64}),
        ("odd", Topology(pp=3, dp=2), {}),
        ("odd", Topology(cp=2), {}),
        ("odd", Topology(pp=2, first_stage_layers=1), {}),
        ("odd", Topology(pp=3, last_stage_layers=0), {}),
        ("odd", Topology(pp=2, vpp=2, count_embedding=True, count_loss=True), {}),
        ("odd", Topology(pp=2, vpp=3), {}),
        ("attention-biased", TP2, {}),
        ("mlp-biased", TP2, {}),
        ("tied", Topology(tp=2, pp=2), {}),
        ("tied", Topology(tp=4), {}),
        ("tied", Topology(pp=2, vpp=2), {}),
    ],
    ids=str,
)
def test_there_and_back(
    name: str, topology: Topology, fields: dict[str, Any], checkpoints: dict[str, Path], in_ranks: Run, tmp_path: Path
) -> None:
    """Each rank holds what the statement says, streams out every tensor, and the folder comes back byte for byte."""
    folder, target = checkpoints[name], tmp_path / "exported"
    for rank in in_ranks(bridged.there_and_back, folder, topology, target, **fields):
        assert rank["imported"] == []
        assert rank["exported"] == []
        assert set(rank["keys"]) == set(bridged.source(folder))
    assert contents(target) == contents(folder)
    assert beside(target) == ["exported"]
