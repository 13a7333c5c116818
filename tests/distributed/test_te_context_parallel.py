"""The Transformer Engine model under context parallelism, in real ranks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import te_ranks
import torch
from te_ranks import Probe
from test_te_tensor_parallel import BIASED, TIED, assert_all_passed

from converters.errors import ConfigError
from converters.topology import Topology
from converters.zigzag import packed_order, packed_positions
from parity.ranks import Zygote
from parity.seeded import write_checkpoint

Run = Callable[..., list[Any]]
PROBES = [
    Probe(layout="bshd", lengths=(24, 24), room=(24, 24)),
    Probe(layout="thd", lengths=(24, 24), room=(24, 24)),
    Probe(layout="thd", lengths=(8, 32, 16), room=(8, 32, 16), packed=True),
    # Tails that reach over several ranks' parts, and one token of which most ranks have nothing.
    Probe(layout="thd", lengths=(13, 1, 17, 24), room=(16, 8, 32, 24), packed=True),
]
TOPOLOGIES = [Topology(cp=2), Topology(cp=4), Topology(tp=2, cp=2), Topology(tp=2, cp=2, sp=True)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("te")
    return {name: write_checkpoint(config, root / name) for name, config in (("biased", BIASED), ("tied", TIED))}


@pytest.fixture(scope="module")
def answered(folders: dict[str, Path], zygote: Zygote) -> dict[str, Any]:
    return {name: zygote.run(te_ranks.answers, folder, PROBES)[0] for name, folder in folders.items()}


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_logits_loss_and_every_gradient(
    topology: Topology, folders: dict[str, Path], answered: dict[str, Any], in_ranks: Run
) -> None:
    name = "tied" if topology.sp else "biased"
    assert_all_passed(in_ranks(te_ranks.compared, folders[name], topology, PROBES, answered[name]))


def test_labels_that_are_not_shifted_are_refused(folders: dict[str, Path], in_ranks: Run) -> None:
    labels = {"labels": torch.zeros(2, 8, dtype=torch.int64), "shift_labels": None}
    for said in in_ranks(te_ranks.refused, folders["tied"], Topology(cp=2), "bshd", (8, 8), **labels):
        assert "shift_labels" in said


def test_a_packed_batch_is_cut_by_sequence() -> None:
    starts = [0, 8, 12]  # the example in Transformer Engine's own documentation of context parallelism
    assert packed_positions(starts, 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert packed_positions(starts, 2, 1).tolist() == [2, 3, 4, 5, 9, 10]
    assert sorted(packed_order(starts, 2).tolist()) == list(range(12))


def test_a_sequence_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="pad it to 8"):
        packed_positions([0, *accumulate((8, 6))], 2, 0)
