"""How the tokens of a call are given to the layers, and their results given back.

The layers know sequences that begin at their first token: rows with padding on the right (bshd), or one sequence after
another (thd), and count positions from zero in each. What transformers passes is more: padding on any side, positions
of one's own, several sequences in a row. `arrange` moves tokens so that the layers compute just that, or refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from converters.errors import ConversionError

BOUNDARIES = ("cu_seq_lens_q_padded", "cu_seq_lens_k_padded", "cu_seq_lens_q", "cu_seq_lens_k")


class InputError(ConversionError, ValueError):
    """Inputs that the layers cannot compute as asked."""


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """Where each token goes, and what the layers are told.

    Attributes:
        rows, columns: The batch as it was given, `[rows columns h]`.
        positions: `[s]`, the position of the first, second, ... token of every sequence.
        options: Keyword arguments of `TransformerLayer.forward`.
        source: `[n]`, indices into `rows * columns` of the tokens that go in, or None where all do, as they are.
        slot: `[n]`, where each of them goes in the layers' input.
        shape: The layers' input without its last dimension.
        hidden: `[rows columns]`, where the results are to be zero though nothing is moved; or None.
    """

    rows: int
    columns: int
    positions: Tensor
    options: Mapping[str, Any]
    source: Tensor | None = None
    slot: Tensor | None = None
    shape: tuple[int, ...]
    hidden: Tensor | None = None

    def enter(self, given: Tensor) -> Tensor:
        """From `[rows columns h]` to what the layers take; slots that no token fills are zero."""
        if self.source is None or self.slot is None:
            return given.reshape(*self.shape, -1)
        flat = given.reshape(self.rows * self.columns, -1).index_select(0, self.source)
        slots = int(torch.Size(self.shape).numel())
        return flat.new_zeros(slots, flat.shape[-1]).index_copy(0, self.slot, flat).reshape(*self.shape, -1)

    def leave(self, made: Tensor) -> Tensor:
        """Back to `[rows columns h]`; zero where there was padding."""
        if self.source is None or self.slot is None:
            out = made.reshape(self.rows, self.columns, -1)
            return out if self.hidden is None else out.masked_fill(self.hidden[..., None], 0)
        flat = made.reshape(-1, made.shape[-1]).index_select(0, self.slot)
        out = flat.new_zeros(self.rows * self.columns, flat.shape[-1]).index_copy(0, self.source, flat)
        return out.reshape(self.rows, self.columns, -1)


def packed(
    tokens: int,
    device: torch.device,
    *,
    given: Mapping[str, Any],
    position_ids: Tensor | None,
    cp_size: int = 1,
) -> Arrangement:
    """Sequences that the caller packed one after another, `[1 t]`, thd.

    Args:
        tokens: `t`, of this rank.
        device: Of the tokens.
        given: `cu_seq_lens_q` and the rest, by BioNeMo's names.
        position_ids: `[1 t]` or `[t]`, from the start of each sequence; or None.
        cp_size: Ranks that share each sequence.

    Raises:
        InputError: Boundaries that do not cover the tokens, or positions that no table of angles serves.
    """
    starts = given.get("cu_seq_lens_q")
    if starts is None:
        raise InputError(f"packed sequences need cu_seq_lens_q, the boundaries of the sequences; found only {[*given]}")
    _check_boundaries(given, tokens * cp_size)
    starts_k = given.get("cu_seq_lens_k", starts)
    padded, padded_k = given.get("cu_seq_lens_q_padded"), given.get("cu_seq_lens_k_padded")
    padded_k = padded if padded_k is None else padded_k
    boundaries = starts if padded is None else padded
    between = given.get("pad_between_seqs")
    if padded is not None and between is None:
        between = True
    if cp_size > 1 and padded is None:  # which context parallelism always asks for
        starts = starts.to(device, torch.int32)
        padded, padded_k, between = starts, starts, False
    options = {
        "cu_seqlens_q": starts.to(device, torch.int32),
        "cu_seqlens_kv": starts_k.to(device, torch.int32),
        "cu_seqlens_q_padded": None if padded is None else padded.to(device, torch.int32),
        "cu_seqlens_kv_padded": None if padded_k is None else padded_k.to(device, torch.int32),
        "max_seqlen_q": given.get("max_length_q"),
        "max_seqlen_kv": given.get("max_length_k", given.get("max_length_q")),
        "pad_between_seqs": between,
    }
    positions = torch.arange(tokens * cp_size, device=device)
    if position_ids is not None:
        if cp_size > 1:
            raise InputError("position_ids under context parallelism: leave them out, the layers count by themselves")
        edges = boundaries.tolist()
        within = [position_ids.reshape(-1)[a:b] for a, b in pairwise(edges)]
        positions = _common(within, device)
    return Arrangement(rows=1, columns=tokens, positions=positions, options=_given(options), shape=(tokens,))


def arrange(
    rows: int,
    columns: int,
    device: torch.device,
    *,
    layout: str,
    mask_type: str,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    multiple: int = 1,
    cp_size: int = 1,
) -> Arrangement:
    """A batch `[rows columns]`, with or without padding.

    Args:
        rows: Its sequences, or rows of them.
        columns: Tokens of a row.
        device: Of the tokens.
        layout: `bshd` or `thd`: what the layers take.
        mask_type: The layers' own mask.
        attention_mask: `[rows columns]`, 1 for a token, 0 for padding, wherever it is.
        position_ids: `[rows columns]` or `[1 columns]`. Without an attention mask a row whose positions do not go up by
            one holds several sequences, which do not see each other, as in transformers.
        multiple: Tokens are padded to a multiple of this (FP8 GEMMs want it): in thd by a sequence of zeros, in bshd by
            longer rows. Context parallelism pads nothing.
        cp_size: Ranks that share each sequence.

    Raises:
        InputError: A mask of another shape, a row of padding alone, or positions that no table of angles serves.
    """
    mask = _mask(attention_mask, rows, columns, device)
    positions = None if position_ids is None else position_ids.to(device).expand(rows, columns)
    if cp_size > 1 and (positions is not None or mask is not None):
        raise InputError(
            "context parallelism takes no position_ids and no padding inside a batch: pack the sequences (thd, "
            "cu_seq_lens_q_padded), or leave out the mask where padding is on the right and its labels are -100"
        )
    plain = torch.arange(columns * cp_size, device=device)
    if cp_size > 1 and layout == "thd":  # this rank's part of each row, and boundaries of the whole rows
        starts = torch.arange(rows + 1, device=device) * columns * cp_size
        whole = {"cu_seq_lens_q": starts, "max_length_q": columns * cp_size}
        inside = packed(rows * columns, device, given=whole, position_ids=None, cp_size=cp_size)
        return replace(inside, rows=rows, columns=columns)
    if mask is None and (positions is None or _is_range(positions)):
        if positions is not None:
            plain = positions[0]
        if layout == "bshd" and (cp_size > 1 or rows * columns % multiple == 0):
            # No padding: the same mask without looking for any.
            unmasked = {
                "self_attn_mask_type": {"padding_causal": "causal", "padding": "no_mask"}.get(mask_type, mask_type)
            }
            return Arrangement(rows=rows, columns=columns, positions=plain, options=unmasked, shape=(rows, columns))
    keep = torch.ones(rows, columns, dtype=torch.bool, device=device) if mask is None else mask
    begins = torch.zeros(rows, columns, dtype=torch.bool, device=device)
    begins[:, 0] = True
    if attention_mask is None and positions is not None:
        begins[:, 1:] = positions.diff(dim=1) != 1
    where = begins.flatten().cumsum(0) - 1  # the sequence of each token
    source = keep.flatten().nonzero().flatten()
    sequence = where[source]
    lengths = torch.bincount(sequence, minlength=int(where[-1]) + 1)
    within = torch.arange(len(source), device=device) - (lengths.cumsum(0) - lengths)[sequence]
    counts = lengths.tolist()
    if positions is None:
        positions = plain.expand(rows, columns)
    table = _common(list(positions.flatten()[source].split(counts)), device)
    if layout == "thd":
        return packing(rows, columns, source, lengths, table, multiple)
    if not all(counts):
        raise InputError(f"rows {[i for i, n in enumerate(counts) if not n]} of attention_mask have no token at all")
    if mask_type == "no_mask" and mask is not None:
        raise InputError("self_attn_mask_type='no_mask' would attend to padding: build the model with 'padding'")
    width = columns if len(counts) == rows else max(counts)
    if len(counts) * width % multiple:
        width += -width % multiple
        mask_type = {"causal": "padding_causal", "no_mask": "padding"}.get(mask_type, mask_type)
    table = _reaching(table, width)
    padding = torch.arange(width, device=device) >= lengths[:, None]
    options: dict[str, Any] = {}
    if "padding" in mask_type:
        options = {"attention_mask": padding[:, None, None, :], "self_attn_mask_type": mask_type}
    if len(counts) == rows and width == columns and bool((source == (sequence * width + within)).all()):
        return Arrangement(
            rows=rows, columns=columns, positions=table, options=options, shape=(rows, columns), hidden=~keep
        )
    return Arrangement(
        rows=rows,
        columns=columns,
        positions=table,
        options=options,
        source=source,
        slot=sequence * width + within,
        shape=(len(counts), width),
    )


def packing(rows: int, columns: int, source: Tensor, lengths: Tensor, positions: Tensor, multiple: int) -> Arrangement:
    """The tokens `source` of a batch `[rows columns]`, one sequence of `lengths` after another (thd)."""
    tokens, counts = len(source), lengths.tolist()
    short = -tokens % multiple
    if short:
        lengths = functional.pad(lengths, (0, 1), value=short)
        positions = _reaching(positions, short)
    starts = functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = max([*counts, short])
    return Arrangement(
        rows=rows,
        columns=columns,
        positions=positions,
        options={
            "cu_seqlens_q": starts,
            "cu_seqlens_kv": starts,
            "max_seqlen_q": longest,
            "max_seqlen_kv": longest,
        },
        source=source,
        slot=torch.arange(tokens, device=source.device),
        shape=(tokens + short,),
    )


def _check_boundaries(given: Mapping[str, Any], tokens: int) -> None:
    """Hold the boundaries of packed sequences against the tokens of all ranks that share them.

    Raises:
        InputError: They do not begin at 0, decrease, leave tokens out, or make a sequence longer than its room.
    """
    wrong = []
    edges = {name: given[name].tolist() for name in BOUNDARIES if given.get(name) is not None}
    for name, found in edges.items():
        rooms = edges.get(f"{name}_padded")
        covers = rooms is not None or found[-1:] == [tokens]
        if found[:1] != [0] or not covers or any(b < a for a, b in pairwise(found)):
            end = "" if rooms is not None else f" and end at {tokens}, the tokens"
            wrong.append(f"  {name} must start at 0, not decrease{end}: found {_short(found)}")
        elif rooms is not None and (
            len(rooms) != len(found)
            or any(b - a > d - c for (a, b), (c, d) in zip(pairwise(found), pairwise(rooms), strict=True))
        ):
            wrong.append(f"  {name} {_short(found)} has sequences that do not fit in {name}_padded {_short(rooms)}")
    if wrong:
        raise InputError("\n".join(["boundaries that packed sequences cannot have:", *wrong]))


def _short(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:4]))}, ..., {numbers[-1]}]"


def _reaching(table: Tensor, length: int) -> Tensor:
    """`table`, at least `length` long: padding is rotated too, by whatever angle."""
    return functional.pad(table, (0, max(length - len(table), 0)))


def _common(sequences: list[Tensor], device: torch.device) -> Tensor:
    """The one table of positions that serves every sequence.

    The layers take one table and begin it anew in each sequence. Sequences of consecutive positions that begin at
    different ones are all counted from zero: queries and keys meet by the difference of their positions alone.
    """
    longest = max(sequences, key=len)
    if all(torch.equal(one, longest[: len(one)]) for one in sequences):
        return longest.to(device)
    if all(bool((one.diff() == 1).all()) for one in sequences):
        return torch.arange(len(longest), device=device)
    raise InputError(
        "position_ids: the layers take one table of angles for all sequences, and these have gaps in different "
        "places. Pass each sequence in a call of its own, or positions that go up by one"
    )


def _is_range(positions: Tensor) -> bool:
    """Whether all rows have the same positions, which go up by one."""
    return bool((positions.diff(dim=1) == 1).all()) and bool((positions == positions[:1]).all())


def _mask(mask: Tensor | None, rows: int, columns: int, device: torch.device) -> Tensor | None:
    """`mask` as booleans, True for a token; None where it hides nothing."""
    if mask is None:
        return None
    if tuple(mask.shape) != (rows, columns):
        raise InputError(
            f"attention_mask of shape {tuple(mask.shape)}: expected [{rows} {columns}], 1 for a token and 0 for padding"
        )
    mask = mask.to(device).bool()
    return None if bool(mask.all()) else mask


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
