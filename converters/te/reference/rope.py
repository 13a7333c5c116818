"""Rotary position embedding as Transformer Engine's fused kernel applies it: in float32 inside, rounded once.

The layers are handed the angles of all positions at once, `[s 1 1 d]`, and choose: positions count from zero in every
row of a batch and at every sequence of a packed one, from what is cached where there is a cache, and follow the zigzag
under context parallelism, where a rank holds the chunks `r` and `2 n - 1 - r` of the `2 n` of each sequence.

Source: TransformerEngine 2.20.2, transformer_engine/common/fused_rope/fused_rope.cu, `fused_rope_block_forward` and
`fused_rope_forward_kernel`; transformer_engine/pytorch/attention/rope.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from converters.errors import ConversionError
from converters.te.reference.norm import compute_dtype


def angles(inv_freq: Tensor, length: int) -> Tensor:
    """What the layers take as `rotary_pos_emb`, for halves that rotate against each other.

    Args:
        inv_freq: `[d/2]`, radians a position, such as HF's own.
        length: Positions, from zero.

    Returns:
        `[length 1 1 d]`, float32: both halves have the same angles.
    """
    turns = torch.outer(torch.arange(length, dtype=torch.float32, device=inv_freq.device), inv_freq.float())
    return torch.cat((turns, turns), dim=-1)[:, None, None, :]


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    tensor_format: str = "sbhd",
    start_positions: Tensor | None = None,
    interleaved: bool = False,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    """Rotate queries or keys by the angles of their positions.

    Args:
        t: `[s b h d]`, `[b s h d]` or `[t h d]`.
        freqs: Angles `[s2 1 1 d2]`; dims beyond `d2` stay as they are.
        tensor_format: `sbhd`, `bshd` or `thd`.
        start_positions: Position of each sequence's first token, `[b]` or longer; zero where None.
        interleaved: Neighbours rotate against each other, not halves.
        cu_seqlens: Where sequences begin and the last one ends, over all ranks, `[b + 1]`; for `thd`.
        cp_size: Ranks that share each sequence.
        cp_rank: Which of them this is.

    Returns:
        As `t`.

    Raises:
        ConversionError: Angles of another shape, or positions beyond them.
    """
    if freqs.dim() != 4 or freqs.shape[1:3] != (1, 1):
        raise ConversionError(f"expected rotary_pos_emb of shape [s 1 1 d], found {tuple(freqs.shape)}")
    if cp_size > 1 and start_positions is not None:
        raise ConversionError("a key-value cache is not possible under context parallelism; generate with cp_size 1")
    if tensor_format == "thd":
        if cu_seqlens is None:
            raise ConversionError("packed (thd) sequences need cu_seqlens_q, found none: positions restart there")
        positions = _packed_positions(t.shape[0], cu_seqlens // cp_size, start_positions, cp_size, cp_rank)[:, None]
    else:
        length = t.shape[0 if tensor_format == "sbhd" else 1]
        local = torch.arange(length, device=t.device)
        positions = _global_position(local, torch.full_like(local, length), cp_size, cp_rank)[:, None]
        if start_positions is not None:
            positions = positions + start_positions[None, : t.shape[1 if tensor_format == "sbhd" else 0]].to(t.device)
        positions = (positions if tensor_format == "sbhd" else positions.transpose(0, 1))[..., None]
    last = int(positions.max()) if positions.numel() else 0
    if last >= freqs.shape[0]:
        raise ConversionError(
            f"rotary_pos_emb has the angles of {freqs.shape[0]} positions, found a token at {last}; make it longer"
        )
    return rotate(t, freqs[:, 0, 0][positions], interleaved=interleaved)


def rotate(t: Tensor, angle: Tensor, *, interleaved: bool) -> Tensor:
    """`t` turned by `angle`, which broadcasts against it but for the last dimension, of `d2` angles."""
    wide, rest = t[..., : angle.shape[-1]].to(compute_dtype(t.dtype)), t[..., angle.shape[-1] :]
    if interleaved:
        turned = torch.stack((-wide[..., 1::2], wide[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = wide.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    angle = angle.float()
    rotated = (wide * angle.cos() + turned * angle.sin()).to(t.dtype)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def _packed_positions(total: int, starts: Tensor, offsets: Tensor | None, cp_size: int, cp_rank: int) -> Tensor:
    """`[t]`: each token's place in its own sequence; tokens after the last sequence are at zero."""
    token = torch.arange(total, device=starts.device)
    sequence = torch.searchsorted(starts[1:].contiguous(), token, right=True)
    inside = sequence < len(starts) - 1
    sequence = sequence.clamp(max=len(starts) - 2)
    position = _global_position(token - starts[sequence], starts.diff()[sequence], cp_size, cp_rank)
    if offsets is not None:
        position = position + offsets.to(position.device)[sequence]
    return torch.where(inside, position, 0)


def _global_position(local: Tensor, length: Tensor, cp_size: int, cp_rank: int) -> Tensor:
    """The place in the whole sequence of the token at `local` among the `length` that this rank holds of it."""
    if cp_size == 1:
        return local
    chunk = length // 2
    return torch.where(local < chunk, local + cp_rank * chunk, local + (2 * (cp_size - 1) - cp_rank) * chunk)
