"""Folders and Megatron-Core models to and from models on Transformer Engine's layers, cut over real ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import te_conversion_ranks

from converters.convert import convert_folder
from converters.topology import Topology

Run = Callable[..., list[Any]]


@pytest.mark.parametrize(("name", "tp"), [("mlp-biased", 3), ("tied", 2)])
def test_each_rank_loads_and_saves_its_own(
    in_ranks: Run, checkpoints: dict[str, Path], tmp_path: Path, name: str, tp: int
) -> None:
    """Three ranks for five groups and 509 rows: both are padded, and no folder holds the padding."""
    te, out = tmp_path / "te", tmp_path / "out"
    out.mkdir()
    convert_folder(checkpoints[name], te, target_column="te")
    found = in_ranks(te_conversion_ranks.load_and_save, checkpoints[name], Topology(tp=tp), te, out)
    assert found == [[]] * tp


@pytest.mark.parametrize(
    ("name", "topology", "fields"),
    [
        ("attention-biased", Topology(), {}),
        ("mlp-biased", Topology(tp=3), {"layer_spec": "local"}),
        ("tied", Topology(tp=2), {"layernorm_zero_centered_gamma": True}),
    ],
    ids=["alone", "tp3-ghosts", "tp2-centred"],
)
def test_te_to_megatron_and_back(
    in_ranks: Run, checkpoints: dict[str, Path], name: str, topology: Topology, fields: dict[str, Any]
) -> None:
    found = in_ranks(te_conversion_ranks.to_megatron_and_back, checkpoints[name], topology, **fields)
    assert found == [[]] * topology.world_size


def test_models_that_stand_otherwise_are_refused(in_ranks: Run, checkpoints: dict[str, Path]) -> None:
    (stages, *_) = in_ranks(te_conversion_ranks.refused, checkpoints["tied"], Topology(pp=2), 1)
    assert "spread over pp=2 stages" in stages
    (ranks, *_) = in_ranks(te_conversion_ranks.refused, checkpoints["tied"], Topology(tp=2), 1)
    assert "tp=1 of the TE model, tp=2 of Megatron's" in ranks
    (rows,) = in_ranks(
        te_conversion_ranks.refused,
        checkpoints["tied"],
        Topology(),
        1,
        make_vocab_size_divisible_by=64,
        should_pad_vocab=True,
    )
    assert "padded_vocab_size=331 of the TE model, 384 of Megatron's" in rows
    (other,) = in_ranks(te_conversion_ranks.refused, checkpoints["tied"], Topology(), 1, rotary_base=777)
    assert "rope_theta is" in other
    assert "777" in other
