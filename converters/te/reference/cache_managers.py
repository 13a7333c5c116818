"""The managers of the key-value cache: rows of a tensor, or pages of a pool, with Transformer Engine's attributes.

Source: NVIDIA/TransformerEngine 2.20.2, transformer_engine/pytorch/attention/inference.py `KVCacheManager`,
`NonPagedKVCacheManager`, `PagedKVCacheManager`; transformer_engine/common/fused_attn/kv_cache.cu
`copy_to_kv_cache_kernel`, `reindex_kv_cache_kernel`.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from converters.errors import CacheError
from converters.te.reference.cache_steps import ContiguousSteps, PagedSteps, new_tokens, take_tokens

Lengths = Mapping[int, int]


class KVCacheManager:
    """Where keys and values are kept, and which sequences they belong to.

    Attributes:
        cache: By layer number, the keys and the values.
        sequences: Tokens held, new ones of this step included, by sequence id, in the order of the batch.
    """

    def __init__(self) -> None:
        self.cache: dict[int, tuple[Tensor, Tensor]] = {}
        self.sequences: OrderedDict[int, int] = OrderedDict()

    def reset(self) -> None:
        """Forget the sequences; memory stays."""
        self.sequences = OrderedDict()

    def allocate_memory(self, layer_number: int) -> None:
        """Make room for one layer."""
        raise NotImplementedError

    def pre_step(self, step_dict: Lengths) -> OrderedDict[int, int]:
        """Take in how many tokens each sequence of the batch gets; return `sequences`."""
        raise NotImplementedError

    def step(
        self,
        layer_number: int,
        new_k: Tensor,
        new_v: Tensor,
        cu_new_seqlens: Tensor,
        cu_cached_seqlens: Tensor,
        qkv_format: str,
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of one layer; return all that it holds."""
        raise NotImplementedError


class NonPagedKVCacheManager(ContiguousSteps, KVCacheManager):
    """One row of `max_seqlen` tokens a sequence: keys and values `[b s h d]`.

    Args:
        max_batch_size: Rows.
        max_seqlen: Tokens a row.
        num_heads: Key-value heads.
        head_dim_k: Width of a key head.
        dtype: Of keys and values.
        head_dim_v: Width of a value head; by default that of keys.
    """

    def __init__(
        self,
        max_batch_size: int,
        max_seqlen: int,
        num_heads: int,
        head_dim_k: int,
        dtype: torch.dtype,
        head_dim_v: int | None = None,
    ) -> None:
        super().__init__()
        self.max_batch_size = max_batch_size
        self.max_seqlen = max_seqlen
        self.num_heads = num_heads
        self.head_dim_k = head_dim_k
        self.dtype = dtype
        self.head_dim_v = head_dim_k if head_dim_v is None else head_dim_v
        self.batch_indices = torch.zeros(max_batch_size, dtype=torch.int32)
        self.batch_indices_post_step = torch.arange(max_batch_size, dtype=torch.int32)
        self.need_reindex = True

    def allocate_memory(self, layer_number: int) -> None:
        """Make room for one layer."""
        room = (self.max_batch_size, self.max_seqlen, self.num_heads)
        self.cache[layer_number] = (
            torch.zeros(*room, self.head_dim_k, dtype=self.dtype),
            torch.zeros(*room, self.head_dim_v, dtype=self.dtype),
        )

    @torch.no_grad()
    def step(
        self,
        layer_number: int,
        new_k: Tensor,
        new_v: Tensor,
        cu_new_seqlens: Tensor,
        cu_cached_seqlens: Tensor,
        qkv_format: str,
    ) -> tuple[Tensor, Tensor]:
        """Move rows up over finished sequences, and append the new tokens.

        Returns:
            Keys and values, views `[b max_seqlen h d]` of the cache; all rows for thd, else those of the batch.
        """
        if self.need_reindex:
            cached = (cu_cached_seqlens.diff() - cu_new_seqlens.diff()).tolist()
            for row, (source, length) in enumerate(zip(self.batch_indices.tolist(), cached, strict=True)):
                for one in self.cache[layer_number]:
                    if source != row and length:
                        one[row, :length] = one[source, :length].clone()
        rows, offsets, positions = new_tokens(cu_new_seqlens, cu_cached_seqlens)
        for one, new in zip(self.cache[layer_number], (new_k, new_v), strict=True):
            one[rows, positions] = take_tokens(new, rows, offsets, qkv_format)
        batch = {"bshd": new_k.shape[0], "sbhd": new_k.shape[1]}.get(qkv_format, self.max_batch_size)
        k_cache, v_cache = self.cache[layer_number]
        return k_cache[:batch], v_cache[:batch]


class Page:
    """One page of the pool."""

    def __init__(self, page_id: int) -> None:
        self.page_id = page_id
        self.allocated = False

    def allocate_page(self) -> None:
        """Mark as in use."""
        self.allocated = True

    def deallocate_page(self) -> None:
        """Mark as free."""
        self.allocated = False


class PagedKVCacheManager(PagedSteps, KVCacheManager):
    """A pool of pages of `page_size` tokens, some of them each sequence's: keys and values `[page token h d]`.

    Args:
        total_num_pages: Pages in the pool.
        page_size: Tokens a page.
        num_heads: Key-value heads.
        head_dim_k: Width of a key head.
        dtype: Of keys and values.
        max_batch_size: Sequences at once.
        max_seqlen: Tokens a sequence.
        head_dim_v: Width of a value head; by default that of keys.
    """

    def __init__(
        self,
        total_num_pages: int,
        page_size: int,
        num_heads: int,
        head_dim_k: int,
        dtype: torch.dtype,
        max_batch_size: int,
        max_seqlen: int,
        head_dim_v: int | None = None,
    ) -> None:
        super().__init__()
        self.total_num_pages = total_num_pages
        self.page_size = page_size
        self.num_heads = num_heads
        self.head_dim_k = head_dim_k
        self.dtype = dtype
        self.max_batch_size = max_batch_size
        self.max_seqlen = max_seqlen
        self.max_pages_per_seq = max_seqlen // page_size
        self.head_dim_v = head_dim_k if head_dim_v is None else head_dim_v
        self.page_table = torch.zeros(max_batch_size, self.max_pages_per_seq, dtype=torch.int32)
        self.reset()

    def reset(self) -> None:
        """Forget the sequences and free every page."""
        super().reset()
        self.free_pages = [Page(index) for index in range(self.total_num_pages)]
        self.allocated_pages: defaultdict[int, list[Page]] = defaultdict(list)
        self.page_table.zero_()

    def allocate_memory(self, layer_number: int) -> None:
        """Make room for one layer."""
        room = (self.total_num_pages, self.page_size, self.num_heads)
        self.cache[layer_number] = (
            torch.zeros(*room, self.head_dim_k, dtype=self.dtype),
            torch.zeros(*room, self.head_dim_v, dtype=self.dtype),
        )

    def get_sequence_count(self) -> int:
        """Sequences held."""
        return len(self.sequences)

    def get_sequence_lengths(self) -> list[int]:
        """Tokens held of each sequence."""
        return list(self.sequences.values())

    def has_free_page(self) -> bool:
        """Whether the pool has a page left."""
        return bool(self.free_pages)

    def get_page_count(self, seq: int) -> int:
        """Pages of a sequence."""
        return len(self.allocated_pages[seq])

    def get_page_list(self, seq: int) -> list[int]:
        """Ids of a sequence's pages, in the order of its tokens."""
        return [page.page_id for page in self.allocated_pages[seq]]

    def get_page_table(self, sequences: Sequence[int]) -> Tensor:
        """The page table `[b pages]`, its first rows filled in for `sequences`; 0 where a sequence has no page."""
        for row, seq in enumerate(sequences):
            pages = self.get_page_list(seq)
            self.page_table[row] = torch.tensor(pages + [0] * (self.max_pages_per_seq - len(pages)), dtype=torch.int32)
        return self.page_table

    def allocate_page(self, seq: int) -> None:
        """Give a sequence one more page.

        Raises:
            CacheError: None is left.
        """
        if not self.has_free_page():
            raise CacheError(
                f"all {self.total_num_pages} pages of {self.page_size} tokens are in use, and sequence {seq} needs one "
                "more: allocate more pages, or finish a sequence by leaving it out of pre_step"
            )
        page = self.free_pages.pop(0)
        page.allocate_page()
        self.allocated_pages[seq].append(page)

    def allocate_sequence(self, seq: int, context_len: int) -> None:
        """Give a sequence the pages that `context_len` more tokens fill."""
        for _ in range(-(-context_len // self.page_size)):
            self.allocate_page(seq)

    def deallocate_sequence(self, seq: int) -> None:
        """Take back the pages of a sequence."""
        for page in self.allocated_pages.pop(seq, []):
            page.deallocate_page()
            self.free_pages.append(page)

    @torch.no_grad()
    def step(
        self,
        layer_number: int,
        new_k: Tensor,
        new_v: Tensor,
        cu_new_seqlens: Tensor,
        cu_cached_seqlens: Tensor,
        qkv_format: str,
    ) -> tuple[Tensor, Tensor]:
        """Write the new tokens to their pages.

        Returns:
            Keys and values, the whole pool `[page token h d]`.
        """
        rows, offsets, positions = new_tokens(cu_new_seqlens, cu_cached_seqlens)
        pages = self.page_table[rows, positions // self.page_size]
        for one, new in zip(self.cache[layer_number], (new_k, new_v), strict=True):
            one[pages, positions % self.page_size] = take_tokens(new, rows, offsets, qkv_format)
        return self.cache[layer_number]
