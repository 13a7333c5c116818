"""From columns of a padded batch, which transformers counts, to tokens of each sequence, which a cache holds."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from converters.errors import CacheError


@dataclass(frozen=True, kw_only=True)
class CacheStep:
    """How one forward's columns of a padded batch go through layers that hold a cache.

    Attributes:
        lengths: New tokens of each row.
        cu_seqlens: Their cumulative sum, `[b + 1]` int32.
        tokens: Which columns are tokens, `[b s]` bool; None where all are.
    """

    lengths: list[int]
    cu_seqlens: Tensor
    tokens: Tensor | None

    @property
    def longest(self) -> int:
        """New tokens of the longest row."""
        return max(self.lengths)

    def pack(self, hidden: Tensor, qkv_format: str) -> Tensor:
        """`[b s h]` as the layers take it: thd `[t h]`; bshd with each row's padding last."""
        if qkv_format == "thd":
            return hidden.flatten(0, 1) if self.tokens is None else hidden[self.tokens]
        if self.tokens is None:
            return hidden
        packed = hidden.new_zeros(len(hidden), self.longest, hidden.shape[-1])
        packed[self._front()] = hidden[self.tokens]
        return packed

    def unpack(self, packed: Tensor, width: int, qkv_format: str) -> Tensor:
        """The inverse: `[b s h]`, zero where there is no token."""
        if self.tokens is None:
            return packed.unflatten(0, (-1, width)) if qkv_format == "thd" else packed
        hidden = packed.new_zeros(*self.tokens.shape, packed.shape[-1])
        hidden[self.tokens] = packed if qkv_format == "thd" else packed[self._front()]
        return hidden

    def _front(self) -> Tensor:
        counts = self.cu_seqlens.diff()[:, None]
        return torch.arange(self.longest, device=counts.device) < counts


def begin_step(
    cache: Any, batch: int, width: int, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
) -> CacheStep:
    """Announce a forward's new tokens to a cache (`pre_step`), rows being sequences 0 to b - 1.

    Args:
        cache: An `InferenceParams` of either kind.
        batch: Rows.
        width: New columns.
        attention_mask: `[b s]`, of all columns so far or of the new ones; by default every new column is a token.
        position_ids: `[b s]`, checked only: the layers count each sequence's positions themselves.

    Raises:
        CacheError: A mask that does not fit the columns, positions other than the cache's own, or no room.
    """
    past: int | None = getattr(cache, "columns", None)
    held = [cache.sequences.get(row, 0) for row in range(batch)]
    tokens: Tensor | None = None
    lengths = [width] * batch
    if attention_mask is not None:
        if attention_mask.ndim != 2 or len(attention_mask) != batch or attention_mask.shape[1] < width:
            raise CacheError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; with a cache of {past or 0} columns and "
                f"{width} new ones of {batch} rows it is [{batch} {(past or 0) + width}], 1 for tokens, 0 for padding"
            )
        if past is not None and attention_mask.shape[1] not in (width, past + width):
            raise CacheError(
                f"attention_mask has {attention_mask.shape[1]} columns; the cache holds {past} and {width} are new: "
                f"expected {past + width} in all, or the {width} new ones. Call reset() before an unrelated prompt"
            )
        tokens = attention_mask[:, -width:].bool()
        lengths = tokens.sum(1).tolist()
        if sum(lengths) == batch * width:
            tokens = None
    if position_ids is not None:
        _check_positions(position_ids, held, lengths, tokens)
    cache.pre_step(OrderedDict(enumerate(lengths)))
    if past is not None:
        cache.columns = past + width
    ends = torch.tensor([sum(lengths[:row]) for row in range(batch + 1)], dtype=torch.int32)
    return CacheStep(lengths=lengths, cu_seqlens=ends.to(cache.cu_seqlens_q.device), tokens=tokens)


def _check_positions(position_ids: Tensor, held: list[int], lengths: list[int], tokens: Tensor | None) -> None:
    rows = position_ids.expand(len(held), -1)
    for row, (start, count) in enumerate(zip(held, lengths, strict=True)):
        found = rows[row] if tokens is None else rows[row][tokens[row]]
        if found.tolist() != list(range(start, start + count)):
            raise CacheError(
                f"position_ids of row {row} are {found.tolist()}; the cache holds {start} tokens of it, so its next "
                f"are {start} to {start + count - 1}. Leave position_ids out, or reset() the cache"
            )
