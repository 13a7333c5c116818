"""Attention under context parallelism: this rank's queries over the keys of all ranks that share the sequences.

Keys and values are gathered, their gradients added up and cut again; what Transformer Engine sends round a ring gives
the same. Each rank holds of every sequence the chunks `r` and `2 n - 1 - r` of `2 n`, in a packed batch of every
sequence with its padding; a sequence may end anywhere in its room, in any rank's part.

Source: TransformerEngine 2.20.2, transformer_engine/pytorch/attention/dot_product_attention/context_parallel.py,
`attn_forward_func_with_cp`, `AttnFuncWithCPAndKVAllGather`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from converters.errors import ConversionError
from converters.te.reference import distributed
from converters.te.reference.attention import attend
from converters.te.reference.sequences import packed_spans
from converters.zigzag import packed_order, packed_positions, zigzag_order, zigzag_positions


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: distributed.Group,
    qkv_format: str,
    attn_mask_type: str,
    softmax_scale: float,
    dropout: float = 0.0,
    attention_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    cu_seqlens_q_padded: Tensor | None = None,
    cu_seqlens_kv_padded: Tensor | None = None,
    pad_between_seqs: bool | None = None,
    inference_params: Any = None,
) -> Tensor:
    """Attend.

    Args:
        q: `[s/cp b h d]`, `[b s/cp h d]` or `[t/cp h d]`, rotated; this rank's part in zigzag order.
        k: As `q` with `g` heads, rotated.
        v: As `k`.
        group: The ranks that share the sequences.
        qkv_format: `sbhd`, `bshd` or `thd`.
        attn_mask_type: `causal` or `no_mask`; packed, `padding_causal` or `padding`.
        softmax_scale: Of the scores.
        dropout: Must be 0: each rank would drop others.
        attention_mask: Must mask nothing.
        cu_seqlens_q: `[n + 1]`, int32, packed only: sums of the whole sequences' lengths, without padding.
        cu_seqlens_kv: The same; the sequences of keys are those of queries.
        cu_seqlens_q_padded: `[n + 1]`, int32, packed only: where the whole sequences begin, with padding; without
            padding `cu_seqlens_q`.
        cu_seqlens_kv_padded: The same.
        pad_between_seqs: Whether there is padding between packed sequences.
        inference_params: Must be `None`.

    Returns:
        `[... (h d)]` in the format of `q`; zero at padding.

    Raises:
        ConversionError: An option that context parallelism does not have, or sequences that do not divide.
    """
    refused = {
        "a key-value cache (generate with cp_size 1)": inference_params is not None,
        f"attention_dropout={dropout} (each rank would drop others)": dropout > 0,
        f"self_attn_mask_type={attn_mask_type!r} in {qkv_format} (in thd 'padding_causal' or 'padding', else 'causal' "
        "or 'no_mask'; a batch with padding at the end of its rows needs only 'causal', any other is packed)": (
            attn_mask_type not in (("padding_causal", "padding") if qkv_format == "thd" else ("causal", "no_mask"))
        ),
        "an attention_mask that masks tokens": attention_mask is not None and bool(attention_mask.any()),
    }
    if any(refused.values()):
        asked = "; ".join(name for name, on in refused.items() if on)
        raise ConversionError(f"attention under context parallelism does not do {asked}")
    causal = "causal" in attn_mask_type
    if qkv_format == "thd":
        for one, other in ((cu_seqlens_q, cu_seqlens_kv), (cu_seqlens_q_padded, cu_seqlens_kv_padded)):
            if one is not other and (one is None or other is None or not torch.equal(one, other)):
                raise ConversionError("context parallelism is of self-attention: cu_seqlens_q and _kv must be equal")
        spans = packed_spans(
            len(q) * group.size(), cu_seqlens_q, cu_seqlens_q_padded, pad_between_seqs=pad_between_seqs
        ).spans
        padded = cu_seqlens_q if cu_seqlens_q_padded is None else cu_seqlens_q_padded
        assert padded is not None  # `packed_spans` refuses it
        return _packed(q, k, v, group, padded.tolist(), spans, causal, softmax_scale)
    if qkv_format == "bshd":
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out = _batch(q, k, v, group, causal, softmax_scale)
    return out if qkv_format == "bshd" else out.transpose(0, 1)


def _batch(q: Tensor, k: Tensor, v: Tensor, group: distributed.Group, causal: bool, scale: float) -> Tensor:
    """`[s/cp b h d]` to `[b s/cp (h d)]`: rows without padding."""
    size, length = group.size(), len(q) * group.size()
    order = zigzag_order(length, size).argsort().to(q.device)
    k, v = (distributed.gather(x, group)[order] for x in (k, v))
    masked = _after(zigzag_positions(length, size, group.rank()), length, q.device) if causal else None
    return attend(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), masked, scale=scale)


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: distributed.Group,
    starts: list[int],
    spans: tuple[tuple[int, int], ...],
    causal: bool,
    scale: float,
) -> Tensor:
    """`[t/cp h d]` to `[t/cp (h d)]`: each sequence's queries here, over its keys everywhere."""
    size, rank = group.size(), group.rank()
    if starts[-1] != len(q) * size:
        raise ConversionError(
            f"context parallelism cuts all {len(q) * size} tokens of {size} ranks by sequence: cu_seqlens_q_padded "
            f"must end there, found {starts[-1]}; count tokens after the last sequence to its padding"
        )
    mine = packed_positions(starts, size, rank)
    order = packed_order(starts, size).argsort().to(q.device)
    k, v = (distributed.gather(x, group)[order] for x in (k, v))
    out, here = [], 0
    for (begin, length), (room, after) in zip(spans, pairwise(starts), strict=True):
        rows = slice(here, here + (after - room) // size)
        here = rows.stop
        positions = mine[rows] - begin
        inside = positions < length
        keys, values = k[begin : begin + length], v[begin : begin + length]
        masked = _after(positions, length, q.device) if causal else None
        one = attend(q[rows][None], keys[None], values[None], masked, scale=scale)[0]
        out.append(one.masked_fill(~inside.to(q.device)[:, None], 0))
    return torch.cat(out) if out else q.flatten(1)


def _after(queries: Tensor, keys: int, device: torch.device) -> Tensor:
    """`[s t]`, True where a key comes after its query."""
    return (torch.arange(keys) > queries[:, None]).to(device)
