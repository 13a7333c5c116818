"""How a probe reaches Megatron-Core: micro-batches as a rank sees them, its positions and its segments."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parity.observation.feeding import hidden_from


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch: this rank's part under CP, but for what RoPE rotates by, which is whole."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    rotate_by: Tensor | None
    hidden: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Batches:
    """A whole probe `[rows s]`, and how it is dealt out."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    rotate: bool
    segments: Tensor | None
    count: int

    def of_this_rank(self, cp: int) -> Iterator[Batch]:
        """Micro-batches as this rank sees them."""
        from megatron.core import parallel_state

        from converters.zigzag import zigzag_split

        device, rank = torch.cuda.current_device(), parallel_state.get_context_parallel_rank()
        for part in torch.arange(len(self.tokens)).chunk(self.count):
            tokens, labels, positions = (
                zigzag_split(whole[part], cp, rank).to(device) for whole in (self.tokens, self.labels, self.positions)
            )
            hidden = None if self.segments is None else hidden_from(self.segments[part])
            yield Batch(
                tokens=tokens,
                labels=labels,
                positions=positions,
                rotate_by=self.positions[part].to(device) if self.rotate else None,
                hidden=None if hidden is None else zigzag_split(hidden, cp, rank, dim=2).to(device),
            )


@contextlib.contextmanager
def rotating_by(model: Any, positions: Tensor | None) -> Iterator[None]:
    """Let `model` rotate by `positions` `[b s]` (whole sequences): Megatron-Core's own RoPE counts from 0."""
    if positions is None:
        yield
        return
    from megatron.core.models.common.embeddings.rotary_pos_embedding import get_pos_emb_on_this_cp_rank

    embedding = model.rotary_pos_emb

    def angles(*_: Any, **__: Any) -> Tensor:
        table = embedding.get_emb(int(positions.max()) + 1)  # [positions 1 1 d]
        rotation: Tensor = table[:, 0][positions.t()]  # [s b 1 d]
        if embedding.cp_group is not None and embedding.cp_group.size() > 1:
            rotation = get_pos_emb_on_this_cp_rank(rotation, 0, embedding.cp_group)
        return rotation

    embedding.forward = angles
    try:
        yield
    finally:
        del embedding.forward


@contextlib.contextmanager
def masked_by(model: Any, hidden: Tensor | None) -> Iterator[None]:
    """Let the attention of `model` heed a mask: kernels that are told `causal` leave it unread."""
    from megatron.core.transformer.enums import AttnMaskType

    told = [module for module in model.modules() if isinstance(getattr(module, "attn_mask_type", None), AttnMaskType)]
    before = [module.attn_mask_type for module in told]
    for module in told if hidden is not None else []:
        module.attn_mask_type = AttnMaskType.arbitrary
    try:
        yield
    finally:
        for module, was in zip(told, before, strict=True):
            module.attn_mask_type = was
