"""The key-value cache of the reference layers: Transformer Engine's `InferenceParams` and its two managers, in torch.

A cache holds, for each layer, the keys and values of several sequences at once, each of its own length, as rows of a
tensor (contiguous) or as lists of pages (paged). One step of the model is `pre_step`, which says how many tokens each
sequence gets, then a forward in which each layer calls `step` once with its new keys and values.

As in Transformer Engine, sequences that `pre_step` no longer names are finished, and those that go on move up to the
first rows, in their order; new ones follow. Where Transformer Engine would go on with wrong numbers, this cache says
what is wrong: see `CacheError`. Different on purpose: a sequence that goes on advances by as many tokens as `pre_step`
gives it (Transformer Engine's managers count one), so a prompt may be fed in parts.

Source: NVIDIA/TransformerEngine 2.20.2, transformer_engine/pytorch/attention/inference.py `InferenceParams`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from converters.errors import CacheError, listing
from converters.te.reference.cache_managers import (
    KVCacheManager,
    NonPagedKVCacheManager,
    Page,
    PagedKVCacheManager,
)
from converters.te.reference.cache_steps import check_new_tokens

__all__ = ["InferenceParams", "KVCacheManager", "NonPagedKVCacheManager", "Page", "PagedKVCacheManager"]


class InferenceParams:
    """The cache that a model's layers share during inference.

    Args:
        max_batch_size: Sequences at once.
        max_sequence_length: Tokens a sequence.
        num_heads_kv: Key-value heads of a layer, those of one tensor-parallel rank.
        head_dim_k: Width of a key head.
        dtype: Of keys and values.
        head_dim_v: Width of a value head; by default that of keys.
        is_paged: Pages, not rows.
        total_num_pages: Pages in all, `max_batch_size * max_sequence_length / page_size`.
        page_size: Tokens a page, a divisor of `max_sequence_length`.
        max_ctx_len: The most new tokens of a sequence in one step; thd needs it.
        qkv_format: Of the keys and values that come: bshd, sbhd or thd.
        custom_cache_manager: Another class of manager, with the constructor of the one that it replaces.
        device: Where the cache is; by default torch's default device. Transformer Engine's has no such argument.

    Raises:
        CacheError: A size is missing, or the sizes do not agree.
    """

    def __init__(
        self,
        max_batch_size: int,
        max_sequence_length: int,
        num_heads_kv: int | None = None,
        head_dim_k: int | None = None,
        dtype: torch.dtype | None = None,
        head_dim_v: int | None = None,
        is_paged: bool = False,
        total_num_pages: int | None = None,
        page_size: int | None = None,
        max_ctx_len: int | None = None,
        qkv_format: str = "bshd",
        custom_cache_manager: type[KVCacheManager] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        required = {"num_heads_kv": num_heads_kv, "head_dim_k": head_dim_k, "dtype": dtype}
        if missing := [name for name, value in required.items() if value is None]:
            raise CacheError(listing("a cache needs these sizes of the model's attention", missing))
        assert num_heads_kv is not None
        assert head_dim_k is not None
        assert dtype is not None
        if qkv_format not in ("bshd", "sbhd", "thd"):
            raise CacheError(f"qkv_format is {qkv_format!r}; expected bshd, sbhd or thd")
        self.max_batch_size = max_batch_size
        self.max_sequence_length = max_sequence_length
        self.num_heads_kv = num_heads_kv
        self.head_dim_k = head_dim_k
        self.dtype = dtype
        self.head_dim_v = head_dim_k if head_dim_v is None else head_dim_v
        self.is_paged = is_paged
        self.device = torch.get_default_device() if device is None else torch.device(device)
        sizes = {"num_heads": num_heads_kv, "head_dim_k": head_dim_k, "dtype": dtype, "head_dim_v": self.head_dim_v}
        sizes |= {"max_batch_size": max_batch_size, "max_seqlen": max_sequence_length}
        manager: type[KVCacheManager] = NonPagedKVCacheManager
        if is_paged:
            self.page_size, self.total_num_pages = _pages(
                max_batch_size, max_sequence_length, page_size, total_num_pages
            )
            sizes |= {"page_size": self.page_size, "total_num_pages": self.total_num_pages}
            manager = PagedKVCacheManager
        with self.device:
            self.cache_manager = (custom_cache_manager or manager)(**sizes)
            self.cu_seqlens_q = torch.zeros(max_batch_size + 1, dtype=torch.int32)
            self.cu_seqlens_kv = torch.zeros(max_batch_size + 1, dtype=torch.int32)
            self.pre_step_seqlens = torch.zeros(max_batch_size, dtype=torch.int32)
        if qkv_format == "thd":
            if max_ctx_len is None or not 1 <= max_ctx_len <= max_sequence_length:
                raise CacheError(
                    f"qkv_format thd needs max_ctx_len, the most new tokens of a sequence in one step, from 1 to "
                    f"max_sequence_length ({max_sequence_length}); found {max_ctx_len}"
                )
            self.max_ctx_len = max_ctx_len
        self.cache_qkv_format = "bshd"
        self._take_format(qkv_format)
        self.sequences_pre_step: OrderedDict[int, int] = OrderedDict()
        self.sequences: OrderedDict[int, int] = OrderedDict()
        self.batch_size = 0
        self.step_lengths: list[int] = []
        self.layers_stepped: set[int] | None = None

    def _take_format(self, qkv_format: str) -> None:
        self.input_qkv_format = qkv_format
        same = qkv_format == self.cache_qkv_format
        self.output_qkv_format = qkv_format if same else f"{qkv_format}_2{self.cache_qkv_format}"

    def __repr__(self) -> str:
        room = f"max_batch_size={self.max_batch_size}, max_seqlen={self.max_sequence_length}"
        if self.is_paged:
            room = f"total_pages={self.total_num_pages}, page_size={self.page_size}"
        heads = f"num_heads={self.num_heads_kv}, head_dim_k={self.head_dim_k}, head_dim_v={self.head_dim_v}"
        return f"dtype={self.dtype}, is_paged={self.is_paged}, {room}, {heads}"

    def reset(self) -> None:
        """Forget every sequence; memory stays."""
        self.sequences = OrderedDict()
        self.layers_stepped = None
        self.cache_manager.reset()

    def allocate_memory(self, layer_number: int) -> None:
        """Make room for one layer, keys and values: `[b s h d]`, or `[page token h d]` when paged."""
        with self.device:
            self.cache_manager.allocate_memory(layer_number)

    def pre_step(self, step_dict: Mapping[int, int]) -> None:
        """Begin a step: how many new tokens each sequence of the batch has, in the order of the batch.

        Args:
            step_dict: New tokens by sequence id: first those that go on, in their order, then new ones.

        Raises:
            CacheError: More sequences or longer ones than there is room for, or another order. Nothing has changed
                then.
        """
        self.sequences = self.cache_manager.pre_step(step_dict)
        self.batch_size = len(step_dict)
        self.step_lengths = list(step_dict.values())
        self.layers_stepped = set()
        self.sequences_pre_step = OrderedDict((seq, held - step_dict[seq]) for seq, held in self.sequences.items())
        _fill(self.pre_step_seqlens, list(self.sequences_pre_step.values()), 0)
        for cumulative, lengths in (
            (self.cu_seqlens_q, self.step_lengths),
            (self.cu_seqlens_kv, list(self.sequences.values())),
        ):
            ends = [sum(lengths[:count]) for count in range(len(lengths) + 1)]
            _fill(cumulative, ends, ends[-1])

    def get_seqlens_pre_step(self) -> Tensor:
        """Tokens that each sequence held before this step, `[max_batch_size]` int32: its next rotary position."""
        return self.pre_step_seqlens

    def convert_paged_to_nonpaged(self, layer_number: int) -> tuple[Tensor, Tensor]:
        """The keys and values of the batch as rows, copies `[b max_sequence_length h d]`; junk past the lengths."""
        if not self.is_paged:
            raise CacheError("this cache is not paged: step returns its keys and values as rows")
        manager: Any = self.cache_manager
        pages = manager.page_table[: self.batch_size].long()
        k_cache, v_cache = (one[pages].flatten(1, 2) for one in manager.cache[layer_number])
        return k_cache, v_cache

    def step(
        self, layer_number: int, new_k: Tensor, new_v: Tensor, qkv_format: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, int, str]:
        """Store the new keys and values of a layer.

        Args:
            layer_number: Which layer.
            new_k: New keys, rotated already, in `qkv_format`; bshd and sbhd have each sequence's padding last.
            new_v: New values.
            qkv_format: bshd, sbhd or thd.

        Returns:
            All keys and values of the layer (`[b s h d]`, or the pool of pages), cumulative lengths of queries and of
            keys (`[max_batch_size + 1]` int32), `max_sequence_length`, and the format from here on: queries come as
            they came, keys as bshd: `bshd`, `sbhd_2bshd` or `thd_2bshd`.

        Raises:
            CacheError: What comes is not what `pre_step` announced, or does not fit the memory allocated.
        """
        check_new_tokens(self, layer_number, new_k, new_v, qkv_format)
        self._take_format(qkv_format)
        k_cache, v_cache = self.cache_manager.step(
            layer_number, new_k, new_v, self.cu_seqlens_q, self.cu_seqlens_kv, qkv_format
        )
        return k_cache, v_cache, self.cu_seqlens_q, self.cu_seqlens_kv, self.max_sequence_length, self.output_qkv_format


def _pages(batch: int, length: int, page_size: int | None, total: int | None) -> tuple[int, int]:
    if page_size is None or page_size < 1 or length % page_size:
        raise CacheError(
            f"a paged cache needs page_size, a divisor of max_sequence_length ({length}); found {page_size}: "
            "round max_sequence_length up to whole pages"
        )
    if total != batch * (length // page_size):
        raise CacheError(
            f"a paged cache needs total_num_pages = max_batch_size * max_sequence_length / page_size = "
            f"{batch * (length // page_size)}; found {total}"
        )
    return page_size, total


def _fill(target: Tensor, values: list[int], rest: int) -> None:
    target.copy_(torch.tensor(values + [rest] * (len(target) - len(values)), dtype=target.dtype))
