"""How a key-value cache advances: bookkeeping and checks that hold for this package's managers and for Transformer
Engine's, which have the same attributes.

Transformer Engine's own `pre_step` advances a sequence that goes on by one token whatever is announced, overruns its
memory, and takes sequences in any order although keys and queries then belong to different ones. A manager that
inherits from one of these classes first does none of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from converters.errors import CacheError, listing


class ContiguousSteps:
    """`pre_step` of a manager with one row a sequence."""

    max_batch_size: int
    max_seqlen: int
    sequences: OrderedDict[int, int]
    batch_indices: Tensor
    need_reindex: bool

    def pre_step(self, step_dict: Mapping[int, int]) -> OrderedDict[int, int]:
        """Take in the lengths of a step; `step` then moves rows as `batch_indices` says."""
        lengths = _advanced(self, step_dict)
        row_of = {seq: row for row, seq in enumerate(self.sequences)}
        staying = [row_of[seq] for seq in lengths if seq in row_of]
        leaving = [row for seq, row in row_of.items() if seq not in lengths]
        order = staying + leaving + list(range(len(row_of), self.max_batch_size))
        self.batch_indices.copy_(torch.tensor(order, dtype=torch.int32))
        self.need_reindex = lengths.keys() != row_of.keys()
        self.sequences = lengths
        return lengths


class PagedSteps:
    """`pre_step` of a manager with pages."""

    max_batch_size: int
    max_seqlen: int
    page_size: int
    total_num_pages: int
    sequences: OrderedDict[int, int]
    page_table: Tensor

    def pre_step(self, step_dict: Mapping[int, int]) -> OrderedDict[int, int]:
        """Take in the lengths of a step: free the pages of finished sequences, give out new ones."""
        manager: Any = self  # the pages are the other base's
        lengths = _advanced(self, step_dict)
        pages = {seq: -(-held // self.page_size) for seq, held in lengths.items()}
        if (needed := sum(pages.values())) > self.total_num_pages:
            raise CacheError(
                f"{len(pages)} sequences need {needed} pages of {self.page_size} tokens, and the cache has "
                f"{self.total_num_pages}: allocate more pages, or finish a sequence by leaving it out of pre_step"
            )
        for seq in [seq for seq in self.sequences if seq not in lengths]:
            manager.deallocate_sequence(seq)
        for seq, count in pages.items():
            while manager.get_page_count(seq) < count:
                manager.allocate_page(seq)
        self.sequences = lengths
        self.page_table = manager.get_page_table(list(lengths)) if lengths else self.page_table
        return lengths


def _advanced(manager: ContiguousSteps | PagedSteps, step_dict: Mapping[int, int]) -> OrderedDict[int, int]:
    """The lengths of the sequences after this step, checked; nothing is changed."""
    held = manager.sequences
    if len(step_dict) > manager.max_batch_size:
        raise CacheError(
            f"the cache has room for {manager.max_batch_size} sequences (max_batch_size) and this step has "
            f"{len(step_dict)}: allocate it for the batch times num_beams or num_return_sequences"
            + (", and one sequence of padding for a quantised model" if any(seq < 0 for seq in step_dict) else "")
        )
    if negative := [f"sequence {seq}: {new}" for seq, new in step_dict.items() if new < 0]:
        raise CacheError(listing("a step adds tokens; negative lengths were given", negative))
    expected = [seq for seq in held if seq in step_dict] + [seq for seq in step_dict if seq not in held]
    if list(step_dict) != expected:
        raise CacheError(
            f"sequences of a step come in the order of the cache, new ones last: expected {expected}, found "
            f"{list(step_dict)}. Order the batch, and pre_step's lengths, so"
        )
    lengths = OrderedDict((seq, held.get(seq, 0) + new) for seq, new in step_dict.items())
    if long := [
        f"sequence {seq}: {held.get(seq, 0)} tokens held + {step_dict[seq]} new = {length}"
        for seq, length in lengths.items()
        if length > manager.max_seqlen
    ]:
        title = f"the cache has room for {manager.max_seqlen} tokens a sequence (max_sequence_length)"
        raise CacheError(listing(title, long) + "\nAllocate a longer cache, or generate fewer tokens")
    return lengths


def check_new_tokens(params: Any, layer_number: int, new_k: Tensor, new_v: Tensor, qkv_format: str) -> None:
    """Refuse keys and values that the cache was not allocated for, or that `pre_step` did not announce.

    Args:
        params: An `InferenceParams` of either kind that keeps `step_lengths`, the new tokens of each sequence, and
            `layers_stepped`, the layers that have stepped since `pre_step` (None before the first).
        layer_number: Which layer; it counts as stepped from here on.
        new_k: In `qkv_format`.
        new_v: In `qkv_format`.
        qkv_format: bshd, sbhd or thd.

    Raises:
        CacheError: Everything that is wrong, together.
    """
    allocated = params.cache_manager.cache
    if layer_number not in allocated:
        raise CacheError(
            f"layer {layer_number} has no memory in this cache (layers with memory: {sorted(allocated) or 'none'}): "
            f"call allocate_memory({layer_number}); layer numbers begin at 1"
        )
    if params.layers_stepped is None or layer_number in params.layers_stepped:
        before = "the first step" if params.layers_stepped is None else "this layer's second step"
        raise CacheError(
            f"layer {layer_number} steps, and pre_step was not called before {before}: call "
            "pre_step({sequence: new tokens}) once before each forward of the model"
        )
    if qkv_format not in ("bshd", "sbhd", "thd"):
        raise CacheError(f"qkv_format is {qkv_format!r}; expected bshd, sbhd or thd")
    wrong = []
    rank = 3 if qkv_format == "thd" else 4
    for name, new, width in (("keys", new_k, params.head_dim_k), ("values", new_v, params.head_dim_v)):
        if new.ndim != rank:
            raise CacheError(
                f"new {name} of layer {layer_number} have shape {tuple(new.shape)}; {qkv_format} has {rank} dimensions"
            )
        if tuple(new.shape[-2:]) != (params.num_heads_kv, width):
            wrong.append(
                f"{name} have {new.shape[-2]} heads of {new.shape[-1]}, the cache {params.num_heads_kv} of {width}"
            )
        if new.dtype != params.dtype:
            wrong.append(f"{name} are {new.dtype}, the cache {params.dtype}")
    if new_k.shape[:-2] != new_v.shape[:-2]:
        wrong.append(f"keys have tokens {tuple(new_k.shape[:-2])}, values {tuple(new_v.shape[:-2])}")
    if wrong:
        raise CacheError(
            listing(f"what layer {layer_number} stores does not fit the cache", wrong)
            + "\nAllocate it with the layer's own sizes and dtype; under tensor parallelism num_heads_kv is a rank's"
        )
    _check_counts(params, new_k, qkv_format)
    params.layers_stepped.add(layer_number)


def _check_counts(params: Any, new_k: Tensor, qkv_format: str) -> None:
    lengths: list[int] = params.step_lengths
    longest = max(lengths, default=0)
    if qkv_format == "thd":
        if new_k.shape[0] != sum(lengths):
            raise CacheError(
                f"pre_step announced {sum(lengths)} new tokens ({lengths}), and {new_k.shape[0]} came in thd: announce "
                "the lengths of the tokens given"
            )
        room = getattr(params, "max_ctx_len", None)
        if room is None or longest > room:
            raise CacheError(
                f"a sequence has {longest} new tokens in thd and the cache was made with max_ctx_len={room}: allocate "
                "with qkv_format='thd' and a larger max_ctx_len, or feed the prompt in parts"
            )
        return
    batch, width = new_k.shape[:2] if qkv_format == "bshd" else (new_k.shape[1], new_k.shape[0])
    if batch != len(lengths) or longest > width:
        raise CacheError(
            f"pre_step announced {len(lengths)} sequences of {lengths} new tokens, and {batch} of {width} came in "
            f"{qkv_format}: announce the lengths of the tokens given"
        )


def new_tokens(cu_new_seqlens: Tensor, cu_cached_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each new token's row of the batch, index among the row's new tokens, and position in the sequence, `[t]` each.

    Args:
        cu_new_seqlens: Cumulative counts of new tokens, `[b + 1]`.
        cu_cached_seqlens: Cumulative lengths with them, `[b + 1]`.
    """
    new, held = cu_new_seqlens.diff(), cu_cached_seqlens.diff()
    rows = torch.repeat_interleave(torch.arange(len(new), device=new.device), new)
    offsets = torch.arange(len(rows), device=new.device) - cu_new_seqlens[rows]
    return rows, offsets, (held - new)[rows] + offsets


def take_tokens(new: Tensor, rows: Tensor, offsets: Tensor, qkv_format: str) -> Tensor:
    """The new tokens of every sequence behind each other, `[t h d]`, out of bshd or sbhd with padding last, or thd."""
    if qkv_format == "thd":
        return new
    return new[rows, offsets] if qkv_format == "bshd" else new[offsets, rows]
