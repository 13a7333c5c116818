"""Weights from live model to live model in real ranks: the bits that a load puts there, no byte more than must be."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sync_ranks
from bridged import source
from sync_ranks import Side

from converters.topology import Topology
from parity.ranks import Zygote
from parity.tiny import odd_config

Run = Callable[..., list[Any]]
TP2PP2 = Side(topology=Topology(tp=2, pp=2))
TP3 = Side(topology=Topology(tp=3), fields={"make_vocab_size_divisible_by": 64})
TP2 = Topology(tp=2)


def pair(topology: Topology, ranks: tuple[int, ...], part: Topology, **of: Any) -> Side:
    """A side of which only some ranks take part."""
    return Side(topology=topology, part=part, ranks=ranks, **of)


@pytest.mark.parametrize(
    ("name", "here", "there", "bucket"),
    [
        ("tied", TP2PP2, Side(topology=Topology(tp=4)), 50_000),
        ("tied", TP2PP2, pair(Topology(dp=4), (0,), Topology()), 1 << 26),
        ("tied", pair(Topology(tp=2, dp=2), (0, 1), TP2), pair(Topology(tp=2, dp=2), (2, 3), TP2, te=True), 4_000),
        ("tied", Side(topology=Topology(pp=2, vpp=2)), Side(topology=Topology(dp=2)), 50_000),
        ("tied", Side(topology=Topology(dp=2)), Side(topology=Topology(pp=2, vpp=2)), 50_000),
        ("odd", Side(topology=Topology(pp=3)), TP3, 50_000),  # a ghost group and other padding on one side
        ("mlp-biased", TP3, Side(topology=Topology(tp=3), te=True), 50_000),
    ],
    ids=["tp2pp2-tp4", "tp2pp2-one", "disjoint-te", "vpp-none", "none-vpp", "ghosts", "biases-te"],
)
def test_a_model_gets_the_bits_that_a_load_gives_it(
    name: str, here: Side, there: Side, bucket: int, checkpoints: dict[str, Path], in_ranks: Run
) -> None:
    found = in_ranks(sync_ranks.moved, checkpoints[name], here.topology, here, there, bucket)
    assert [rank["faults"] for rank in found] == [[]] * len(found)
    assert [rank["proof"] for rank in found] == [()] * len(found)
    assert [rank["count"]["bytes"] for rank in found] == [rank["sent"] for rank in found]
    assert {rank["bytes"] for rank in found} == {sum(rank["sent"] for rank in found)}
    assert max(rank["count"]["largest"] for rank in found) <= bucket
    assert {rank["count"]["clashes"] for rank in found} == {0}


def test_what_is_rounded_travels_narrow(checkpoints: dict[str, Path], in_ranks: Run) -> None:
    """And from zero-centred norms to others, which takes arithmetic."""
    centred = Side(topology=TP2, fields={"layernorm_zero_centered_gamma": True})
    plain = [Side(topology=Topology(pp=2), precision=precision) for precision in ("fp32", "bf16")]
    te = Side(topology=Topology(tp=2), te=True)
    wide, narrow = (
        in_ranks(sync_ranks.moved, checkpoints["tied"], TP2, Side(topology=TP2), p, 50_000, True) for p in plain
    )
    shifted = in_ranks(sync_ranks.moved, checkpoints["tied"], TP2, centred, te, 50_000)
    assert [rank["faults"] for rank in wide + narrow + shifted] == [[]] * 6
    assert wide[0]["bytes"] == 2 * narrow[0]["bytes"]
    assert shifted[0]["bytes"] == 0  # every rank holds already what it needs


@pytest.mark.parametrize("bucket", [30_000, 1 << 26])
def test_serving_ranks_stream_whole_tensors(bucket: int, checkpoints: dict[str, Path], in_ranks: Run) -> None:
    """The others get none; what travels is what the two serving ranks lack, no more."""
    found = in_ranks(sync_ranks.streamed, checkpoints["tied"], TP2PP2.topology, TP2PP2, (1, 2), bucket)
    assert [rank["faults"] for rank in found] == [[]] * 4
    every = sorted(source(checkpoints["tied"]))
    assert [sorted(rank["names"]) for rank in found] == [[], every, every, []]
    assert sum(rank["sent"] for rank in found) == found[0]["schedule"] * 3 // 2  # whole, and again in half the bytes


def test_nothing_moves_where_any_rank_finds_a_fault(checkpoints: dict[str, Path], in_ranks: Run) -> None:
    found = in_ranks(sync_ranks.refused, checkpoints["tied"], TP2PP2.topology)
    expected = {
        "missing": r"rank 2: the source at tp=0 pp=1.*missing \(1\):\s+decoder\.layers\.1\.mlp\.linear_fc2\.weight",
        "shape": r"rank 3: the target at tp=3 pp=0.*final_layernorm\.weight: expected \[72\], found \[2, 3\]",
        "dtype": r"float32 -> bfloat16, and a cast must be asked for \(cast=True\)",
        "integers": r"float32 -> int32, and a cast rounds floats to floats only",
        "strided": r"rank 0: the target at tp=0 pp=0: decoder\.final_layernorm\.weight is not contiguous",
        "chunks": r"rank 1: CheckpointError: expected 1 chunks of the source \(tp=1 pp=0\), found 2",
        "bucket": r"bucket_bytes is \d+ on rank 0 and 4096 on rank 1",
        "padding": r"padding is drop on rank 0 and verify on rank 1",
        "anything": r"rank 0: AttributeError: 'NoneType'",
        "tie": r"tied tensors differ: .*embedding\.word_embeddings\.weight at tp=1 pp=0.* from "
        r".*output_layer\.weight at tp=1 pp=1|tied tensors differ: .*output_layer.* from .*embedding",
    }
    for rank in found:
        assert rank.keys() == expected.keys()
        for name, (message, sent, untouched) in rank.items():
            assert re.search(expected[name], message, re.DOTALL), f"{name}: {message}"
            assert (sent, untouched) == (0, True), name
        assert rank == found[0]


def test_padding_that_training_changed(checkpoints: dict[str, Path], in_ranks: Run) -> None:
    for message, differing, shared in in_ranks(sync_ranks.loosened, checkpoints["odd"], Topology(pp=2)):
        assert re.search(r"rank 1: output_layer\.weight: \d+ of [\d,]+ elements that must be 0 are not", message)
        assert "padding='drop' lets go of it" in message
        assert differing == []
        assert "of the target lies in the memory of" in shared


def test_a_group_of_some_ranks(checkpoints: dict[str, Path], in_ranks: Run) -> None:
    found = in_ranks(sync_ranks.in_a_group, checkpoints["tied"], Topology(dp=3))
    assert [differing for differing, _ in found] == [[]] * 3
    assert "rank 1 is not in the process group, whose ranks are" in found[1][1]


def test_dtypes_that_differ_between_tensors(zygote: Zygote) -> None:
    """Large matrices, of an odd number of elements, by themselves, and norms that are wider packed together."""
    config = odd_config() | {"hidden_size": 841, "intermediate_size": 432, "num_hidden_layers": 2}
    arguments = config, Topology(tp=2, pp=2), Topology(tp=2, dp=2), "cpu", 1 << 20
    assert zygote.run(sync_ranks.of_tensors, *arguments, world=4, timeout=60) == [[]] * 4
