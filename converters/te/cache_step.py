"""New tokens of sequences that a key-value cache holds the beginning of: what layers are given, what it is told."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from converters.te.arrangement import Arrangement, InputError, packing


def cached(
    rows: int,
    columns: int,
    device: torch.device,
    cache: Any,
    *,
    layout: str,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    multiple: int = 1,
) -> Arrangement:
    """New tokens `[rows columns]`, which the cache is told of (`pre_step`); rows are its sequences 0 to `rows - 1`.

    Args:
        rows: Sequences.
        columns: New tokens of each, padding among them.
        device: Of the tokens.
        cache: An `InferenceParams` of either kind of layers.
        layout: `bshd` or `thd`.
        attention_mask: `[rows columns]` of the new tokens, or `[rows total]` of all.
        position_ids: `[rows columns]`, from the first token of each sequence; only checked, the cache counts by itself.
        multiple: Of which tokens are to be (FP8 GEMMs want it). In thd a sequence of padding fills them up, which the
            cache has to have room for; it lives for this step alone. In bshd rows become longer.

    Raises:
        InputError: A mask or positions that contradict what the cache holds.
    """
    held = [cache.sequences.get(row, 0) for row in range(rows)]
    seen = getattr(cache, "columns", None)
    keep = torch.ones(rows, columns, dtype=torch.bool, device=device)
    if attention_mask is not None:
        keep = _new(attention_mask.to(device), rows, columns, held)
    lengths = keep.sum(1)
    counts = lengths.tolist()
    if position_ids is not None:
        expected = torch.tensor(held, device=device)[:, None] + keep.long().cumsum(1) - 1
        if bool(((position_ids.to(device).expand(rows, columns) != expected) & keep).any()):
            raise InputError(
                f"position_ids that are not the number of tokens before each: the cache holds {held} tokens, and its "
                "sequences begin at position 0. Leave position_ids out, or reset() the cache"
            )
    announced = OrderedDict(enumerate(counts))
    if layout == "thd" and sum(counts) % multiple:
        announced[-2 if -1 in cache.sequences else -1] = -sum(counts) % multiple  # new each time
    cache.pre_step(announced)
    if seen is not None:
        cache.columns = seen + columns
    wide = columns if rows * columns % multiple == 0 else columns + -columns % multiple
    table = torch.arange(max(map(sum, zip(held, counts, strict=True))) + wide, device=device)
    source = keep.flatten().nonzero().flatten()
    options = {"self_attn_mask_type": "padding_causal", "inference_params": cache}
    if layout == "thd":
        made = packing(rows, columns, source, lengths, table, multiple)
        return replace(made, options={**made.options, **options})
    row = source // columns
    within = torch.arange(len(source), device=device) - (lengths.cumsum(0) - lengths)[row]
    return Arrangement(
        rows=rows,
        columns=columns,
        positions=table,
        options=options,
        source=source,
        slot=row * wide + within,
        shape=(rows, wide),
    )


def _new(mask: Tensor, rows: int, columns: int, held: list[int]) -> Tensor:
    """Which of the new columns are tokens, `[rows columns]` bool."""
    if mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] < columns:
        raise InputError(
            f"attention_mask of shape {tuple(mask.shape)}: expected [{rows} {columns}] or, with the tokens in the "
            f"cache, [{rows} total]"
        )
    before = mask[:, : mask.shape[1] - columns].bool().sum(1).tolist()
    if mask.shape[1] > columns and before != held:
        raise InputError(
            f"attention_mask has {before} tokens before the new ones, and the cache holds {held}: reset() it for new "
            "sequences, or pass the mask of these"
        )
    return mask[:, mask.shape[1] - columns :].bool()
