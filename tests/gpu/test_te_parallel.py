"""The model on Transformer Engine's own layers under tensor, sequence and context parallelism, over NCCL."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from converters.topology import Topology
from parity.devices import gpus
from parity.ranks import Zygote
from parity.seeded import write_checkpoint
from parity.tiny import odd_config, with_layers

sys.path.append(str(Path(__file__).parents[1] / "distributed"))  # the ranks' side is the one that runs without GPUs

import te_ranks
from te_ranks import Compared, Probe

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="transformer-engine is not installed"
)
# Nine heads in three groups, which no tp here divides; head_dim is what attention kernels take.
CONFIG = with_layers(
    odd_config()
    | {
        "hidden_size": 144,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 176,
    },
    2,
)
CUT_WEIGHTS = [
    Probe(layout="bshd", lengths=(33, 33, 33, 33), room=(33, 33, 33, 33)),
    Probe(layout="thd", lengths=(33, 11, 5, 13), room=(33, 33, 33, 33), left=(2,)),
    Probe(layout="thd", lengths=(13, 2, 43, 6), room=(13, 2, 43, 6), packed=True),
]
CUT_SEQUENCES = [
    Probe(layout="bshd", lengths=(32, 32), room=(32, 32)),
    Probe(layout="thd", lengths=(8, 32, 16), room=(8, 32, 16), packed=True),
    Probe(layout="thd", lengths=(13, 1, 17, 24), room=(16, 8, 32, 24), packed=True),
]
CASES = [
    (Topology(tp=2), CUT_WEIGHTS, "p2p"),
    (Topology(tp=2, sp=True), CUT_WEIGHTS, "p2p"),
    (Topology(tp=4, sp=True), CUT_WEIGHTS, "p2p"),
    (Topology(cp=2), CUT_SEQUENCES, "p2p"),
    (Topology(cp=2), CUT_SEQUENCES, "all_gather"),
    (Topology(cp=4), CUT_SEQUENCES, "p2p"),
    (Topology(tp=2, cp=2, sp=True), CUT_SEQUENCES, "p2p"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CONFIG, tmp_path_factory.mktemp("te") / "odd", dtype="bfloat16")


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as running:
        yield running


@pytest.mark.parametrize(("topology", "probes", "exchange"), CASES, ids=lambda value: str(value)[:20])
def test_logits_loss_and_every_gradient(
    topology: Topology, probes: list[Probe], exchange: str, folder: Path, zygote: Zygote
) -> None:
    if gpus() < topology.world_size:
        pytest.skip(f"{topology} needs {topology.world_size} NVIDIA GPUs, this machine has {gpus()}")
    (answered,) = zygote.run(te_ranks.answers, folder, probes, torch.bfloat16, env={"CUDA_VISIBLE_DEVICES": ""})
    results: list[list[Compared]] = zygote.run(
        te_ranks.compared,
        folder,
        topology,
        probes,
        answered,
        device="cuda",
        dtype=torch.bfloat16,
        cp_comm_type=exchange,
        world=topology.world_size,
        coords=topology.coords(),
        backend="nccl",
    )
    wrong = [f"rank {rank}: {one}" for rank, found in enumerate(results) for one in found if not one.passed]
    assert not wrong, "\n".join(wrong[:20])
