"""The zigzag order, and what the context-parallel core attention refuses."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_llama
import torch

from converters.errors import ConfigError
from converters.topology import Topology
from converters.zigzag import zigzag_order, zigzag_positions, zigzag_split, zigzag_unsplit
from parity.ranks import RankFailure, Zygote


def test_a_rank_has_a_chunk_from_each_end() -> None:
    assert zigzag_positions(12, 3, 0).tolist() == [0, 1, 10, 11]
    assert zigzag_positions(12, 3, 2).tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [0, 1])
def test_unsplit_puts_back_what_split_took(size: int, dim: int) -> None:
    whole = torch.arange(24 * 24).view(24, 24)
    parts = [zigzag_split(whole, size, rank, dim=dim) for rank in range(size)]
    assert all(part.size(dim) == 24 // size for part in parts)
    assert torch.equal(zigzag_unsplit(torch.cat(parts, dim=dim), size, dim=dim), whole)


def test_every_position_is_held_once() -> None:
    assert sorted(zigzag_order(24, 3).tolist()) == list(range(24))


def test_a_length_that_does_not_divide_names_one_that_does() -> None:
    with pytest.raises(ConfigError, match="10 tokens does not divide into 2 x cp = 4 chunks: pad it to 12"):
        zigzag_positions(10, 2, 0)


def with_changes(changes: dict[str, Any]) -> None:
    """In a rank: build under context parallelism."""
    from converters.megatron import runtime

    runtime.install()
    tiny_llama.provider(tiny_llama.SIZES, Topology(cp=2), **changes).provide_distributed_model()


def test_what_it_does_not_do_is_refused(zygote: Zygote) -> None:
    changes = {"attention_dropout": 0.1, "window_size": (4, 0)}
    with pytest.raises(RankFailure, match=r"attention_dropout=0\.1.*window_size=\(4, 0\)"):
        zygote.run(with_changes, changes, world=2, timeout=60)
