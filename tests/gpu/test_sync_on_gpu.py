"""Weights from one mesh of GPUs to another, over NCCL: the ranks' side is the one that runs without GPUs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from converters.topology import Topology
from parity.devices import gpus
from parity.ranks import Zygote
from parity.tiny import odd_config

sys.path.append(str(Path(__file__).parents[1] / "distributed"))

import sync_ranks

CONFIG = odd_config() | {"hidden_size": 840, "intermediate_size": 432, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as running:
        yield running


@pytest.mark.parametrize(
    ("here", "there", "backend"),
    [
        (Topology(), Topology(), "nccl"),
        (Topology(), Topology(), "gloo"),
        (Topology(pp=2), Topology(tp=2), "nccl"),
        (Topology(pp=2), Topology(tp=2), "cpu:gloo,cuda:nccl"),
        (Topology(tp=2, pp=2), Topology(tp=2, dp=2), "nccl"),
    ],
    ids=str,
)
def test_tensors_on_gpus(here: Topology, there: Topology, backend: str, zygote: Zygote) -> None:
    world = max(here.world_size, there.world_size)
    if gpus() < world:
        pytest.skip(f"{here} to {there} needs {world} NVIDIA GPUs, this machine has {gpus()}")
    arguments = CONFIG, here, there, "cuda", 1 << 20
    found = zygote.run(sync_ranks.of_tensors, *arguments, world=world, timeout=120, backend=backend)
    assert found == [[]] * world
