"""Where sequences lie in a batch: in rows with padding at the end, or packed, with or without padding between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from converters.errors import ConversionError


@dataclass(frozen=True, kw_only=True)
class Spans:
    """The sequences of one tensor, `[t ...]` (packed) or `[b s ...]`.

    Attributes:
        spans: First token and length of each, within the packed tensor or its own row.
        room: Tokens in all of the packed tensor, or in one row.
        packed: Which of the two.
    """

    spans: tuple[tuple[int, int], ...]
    room: int
    packed: bool

    def take(self, x: Tensor) -> list[Tensor]:
        """Views of the sequences, `[length ...]`."""
        rows: Sequence[Tensor] = [x] * len(self.spans) if self.packed else x.unbind(0)
        return [row[start : start + length] for row, (start, length) in zip(rows, self.spans, strict=True)]

    def put(self, sequences: Sequence[Tensor]) -> Tensor:
        """`[length ...]` each to `[t ...]` or `[b s ...]`: the inverse of `take`, with zeros at padding."""
        if not self.packed:
            return torch.stack([_longer(one, self.room) for one in sequences])
        starts = [start for start, _ in self.spans]
        slots = [after - start for start, after in pairwise([*starts, self.room])]
        return torch.cat([_longer(one, slot) for one, slot in zip(sequences, slots, strict=True)])


def _longer(sequence: Tensor, length: int) -> Tensor:
    return functional.pad(sequence, (0, 0, 0, length - len(sequence)))


def packed_spans(
    total: int,
    cu_seqlens: Tensor | None,
    padded: Tensor | None,
    longest: int | None = None,
    pad_between_seqs: bool | None = None,
) -> Spans:
    """The sequences of a packed tensor.

    Args:
        total: Tokens, padding included.
        cu_seqlens: `[n + 1]`, int32: sums of lengths without padding.
        padded: `[n + 1]`, int32: where sequences begin; `cu_seqlens` where None.
        longest: What the caller takes for the longest sequence's length; nothing is checked where None.
        pad_between_seqs: What the caller says of padding between sequences.

    Raises:
        ConversionError: Lengths that do not fit each other, or padding between sequences that was not said to be there:
            Transformer Engine would give the tokens after it wrong positions.
    """
    if cu_seqlens is None or cu_seqlens.dtype != torch.int32 or (padded is not None and padded.dtype != torch.int32):
        found = ["none" if one is None else str(one.dtype) for one in (cu_seqlens, padded)]
        raise ConversionError(
            "packed (thd) sequences need int32 cu_seqlens_q and cu_seqlens_kv, and their _padded ones where there "
            f"is padding; found {found[0]}, padded {found[1]}"
        )
    ends = cu_seqlens.tolist()
    lengths = [after - before for before, after in pairwise(ends)]
    starts = (cu_seqlens if padded is None else padded).tolist()
    gaps = starts[:-1] != ends[:-1]
    if gaps and not pad_between_seqs:
        raise ConversionError(
            "cu_seqlens_q_padded has sequences begin elsewhere than cu_seqlens_q, so there is padding between them: "
            f"pass pad_between_seqs=True (found {pad_between_seqs})"
        )
    if pad_between_seqs and padded is None:
        raise ConversionError("pad_between_seqs=True needs cu_seqlens_q_padded and cu_seqlens_kv_padded, found none")
    if len(starts) != len(ends) or ends[0] != 0 or starts[0] != 0 or starts[-1] > total:
        raise ConversionError(
            f"expected cumulative lengths from 0 to at most {total} tokens, found {ends} and, with padding, {starts}"
        )
    slots = [after - before for before, after in pairwise(starts)]
    if any(not 0 <= length <= slot for length, slot in zip(lengths, slots, strict=True)):
        raise ConversionError(f"expected lengths of at least 0 within their room {slots}, found {lengths}")
    if longest is not None and lengths and max(lengths) > longest:
        raise ConversionError(f"expected max_seqlen to be at least the longest length {max(lengths)}, found {longest}")
    return Spans(spans=tuple(zip(starts[:-1], lengths, strict=True)), room=total, packed=True)


def padded_spans(rows: int, room: int, cu_seqlens: Tensor) -> Spans:
    """The sequences of `[b s ...]`, each at the start of its row.

    Raises:
        ConversionError: Other than one length a row, or one that its row cannot hold.
    """
    lengths = cu_seqlens.diff().tolist()
    if len(lengths) != rows or any(not 0 <= length <= room for length in lengths):
        raise ConversionError(f"expected {rows} lengths of 0 to {room} tokens, found {lengths}")
    return Spans(spans=tuple((0, length) for length in lengths), room=room, packed=False)


def spans_of(attention_mask: Tensor | None, cu_seqlens: Tensor | None, x: Tensor) -> Spans:
    """The sequences of `x`, `[b s ...]`, by their lengths or by a mask `[b 1 1 s]` that is True at padding.

    Raises:
        ConversionError: Neither is given, or padding elsewhere than at the end: Transformer Engine's fused attention
            takes only the lengths from a mask.
    """
    if cu_seqlens is not None:
        return padded_spans(x.shape[0], x.shape[1], cu_seqlens)
    if attention_mask is None:
        raise ConversionError(
            "self_attn_mask_type with padding needs attention_mask (bool, [b 1 1 s], True at padding) or cu_seqlens_q, "
            "found neither; without padding use 'causal' or 'no_mask'"
        )
    expected = (x.shape[0], 1, 1, x.shape[1])
    if attention_mask.dtype != torch.bool or tuple(attention_mask.shape) != expected:
        raise ConversionError(
            f"expected a bool attention_mask of shape {expected}, True at padding; found {attention_mask.dtype}, "
            f"{tuple(attention_mask.shape)}"
        )
    mask = attention_mask[:, 0, 0]
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ConversionError(
            "attention_mask has padding before tokens: Transformer Engine's fused attention takes only lengths from a "
            "mask, and so would attend to the wrong ones; move padding to the end of each row, or pack the batch (thd)"
        )
    lengths = mask.logical_not().sum(1).tolist()
    return Spans(spans=tuple((0, length) for length in lengths), room=x.shape[1], packed=False)
