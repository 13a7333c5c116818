"""The zigzag order of a sequence under context parallelism.

A causal model gives rank `r` of `n` the chunks `r` and `2n - 1 - r` of a sequence cut into `2n`, so that every rank has
the same amount of unmasked attention to do. Of packed sequences, each is cut for itself.

Source: NVIDIA/Megatron-LM core_v0.16.1, megatron/core/utils.py `get_batch_on_this_cp_rank` and
    models/common/embeddings/rope_utils.py `get_pos_emb_on_this_cp_rank`; NVIDIA/TransformerEngine v2.20.2,
    pytorch/attention/dot_product_attention/context_parallel.py `attn_forward_func_with_cp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from converters.errors import ConfigError


def zigzag_positions(length: int, size: int, rank: int) -> torch.Tensor:
    """Positions, `[length / size]` int64, that rank `rank` of a context-parallel group of `size` holds.

    Raises:
        ConfigError: `length` does not divide into `2 * size` chunks.
    """
    if length % (2 * size):
        raise ConfigError(
            f"a sequence of {length} tokens does not divide into 2 x cp = {2 * size} chunks: "
            f"pad it to {-(-length // (2 * size)) * 2 * size}"
        )
    chunks = torch.arange(length).chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def zigzag_split(tensor: torch.Tensor, size: int, rank: int, dim: int = 1) -> torch.Tensor:
    """The part of `tensor`, whole along its sequence dim `dim`, that CP rank `rank` of `size` holds (a copy)."""
    if size == 1:
        return tensor
    return tensor.index_select(dim, zigzag_positions(tensor.size(dim), size, rank).to(tensor.device))


def zigzag_order(length: int, size: int) -> torch.Tensor:
    """Positions, `[length]` int64, in the order that concatenating every rank's part gives."""
    return torch.cat([zigzag_positions(length, size, rank) for rank in range(size)])


def zigzag_unsplit(gathered: torch.Tensor, size: int, dim: int = 1) -> torch.Tensor:
    """The ranks' parts, concatenated in rank order along `dim`, put back into sequence order (a copy)."""
    if size == 1:
        return gathered
    return gathered.index_select(dim, zigzag_order(gathered.size(dim), size).argsort().to(gathered.device))


def packed_positions(starts: Sequence[int], size: int, rank: int) -> torch.Tensor:
    """Tokens of a packed batch, `[t / size]` int64, that CP rank `rank` of `size` holds: its part of each sequence.

    Args:
        starts: Where each sequence begins and the last one ends, padding included.
        size: Ranks that share each sequence.
        rank: Which of them.

    Raises:
        ConfigError: A sequence with its padding does not divide into `2 * size` chunks.
    """
    parts = [zigzag_positions(after - before, size, rank) + before for before, after in pairwise(starts)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def packed_order(starts: Sequence[int], size: int) -> torch.Tensor:
    """Tokens of a packed batch, `[t]` int64, in the order that concatenating every rank's part gives."""
    return torch.cat([packed_positions(starts, size, rank) for rank in range(size)])
