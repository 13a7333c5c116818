"""Logits and loss of one model on one probe: from Megatron-Core through its pipeline, and from transformers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from converters.topology import Coord, Topology

Floats = npt.NDArray[np.float32]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a model says of every token of a probe.

    Args:
        logits: `[b s v]` float32, without vocabulary padding.
        loss: `[b s]` float32, the cross entropy of each token in nats; `None` without labels.
    """

    logits: Floats
    loss: Floats | None = None


def megatron_logits(
    chunks: Sequence[torch.nn.Module],
    tokens: Tensor,
    *,
    topology: Topology,
    vocab_size: int,
    positions: Tensor | None = None,
    labels: Tensor | None = None,
) -> Observation | None:
    """Run Megatron-Core's forward through its pipeline schedule, and gather what it says of every token. Collective.

    Each rank passes the same probe. Three things are added and taken off again, none of which an earlier token can see:

    - zeros at the end of each sequence, to a multiple of 2 x cp, and of cp x tp under sequence parallelism: masks are
      causal;
    - under interleaving, repeated sequences up to a multiple of the stages, since it needs a micro-batch for each;
    - the vocabulary's padding. In the loss its logits count as minus infinity: its zero rows would each add exp(0) to
      the denominator, which is a property of the padding, not of the model.

    Args:
        chunks: This rank's model chunks, wrapped or not.
        tokens: `[b s]` int64.
        topology: The layout that they were built for, on which Megatron-Core's parallel state is.
        vocab_size: Rows of the vocabulary without padding.
        positions: `[b s]` int64, what RoPE rotates by; by default 0 to s - 1. The mask is causal by order regardless.
        labels: `[b s]` int64, the label of each token (already shifted).

    Returns:
        The observation on the last stage's rank with tp, cp and dp index 0; `None` on every other rank.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from converters.megatron.parallel import current_coord
    from converters.megatron.provider import unwrap

    batch, length = tokens.shape
    tp, cp = topology.tp, topology.cp
    multiple = math.lcm(2 * cp if cp > 1 else 1, cp * tp if topology.sp else 1)
    missing = -length % multiple
    microbatches = topology.pp if topology.vpp > 1 else 1
    rows = torch.arange(-(-batch // microbatches) * microbatches) % batch
    probe = _Probe(
        tokens=_extend(tokens, missing)[rows],
        positions=_extend(_default_positions(tokens) if positions is None else positions, missing)[rows],
        labels=None if labels is None else _extend(labels, missing)[rows],
        microbatches=microbatches,
        rotate=positions is not None,
    )

    with _evaluating(chunks), torch.no_grad():
        gathered: list[tuple[Tensor, Tensor | None]] = get_forward_backward_func()(
            forward_step_func=lambda data, chunk: _forward(next(data), chunk, topology, vocab_size, unwrap(chunk)),
            data_iterator=[probe.iterator(cp) for _ in chunks],
            model=list(chunks),
            num_microbatches=microbatches,
            seq_length=length + missing,
            micro_batch_size=len(rows) // microbatches,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if current_coord() != Coord(pp=topology.pp - 1):
        return None
    losses = [loss for _, loss in gathered if loss is not None]
    return Observation(
        logits=_array(torch.cat([logits for logits, _ in gathered])[:batch, :length]),
        loss=_array(torch.cat(losses)[:batch, :length]) if losses else None,
    )


def hf_logits(
    folder: str | Path,
    tokens: Tensor,
    *,
    positions: Tensor | None = None,
    labels: Tensor | None = None,
    dtype: Literal["fp32", "bf16", "fp64"] = "fp32",
    attention: Literal["eager", "sdpa"] = "eager",
    oracle: bool = False,
) -> Observation:
    """Run transformers' `LlamaForCausalLM` on the checkpoint in `folder`.

    Safe in a process that has the CPU runtime installed: that redirects only what names a CUDA device. In fp64 the
    rotary angles are still float32, as transformers computes them.

    Args:
        folder: `config.json` and safetensors.
        tokens: `[b s]` int64.
        positions: `[b s]` int64; by default 0 to s - 1.
        labels: `[b s]` int64, the label of each token (already shifted).
        dtype: Of weights and activations.
        attention: transformers' attention implementation.
        oracle: Compute in float32 with the weights of `dtype`, so that only the weights are rounded.
    """
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], attn_implementation=attention)
    model.eval()
    if oracle:
        model.float()
    with torch.no_grad():
        logits = model(
            input_ids=tokens,
            position_ids=_default_positions(tokens) if positions is None else positions,
            # Without a mask, transformers reads positions that jump as the seams of packed sequences.
            attention_mask=torch.ones_like(tokens),
            use_cache=False,
        ).logits
    if labels is None:
        return Observation(logits=_array(logits))
    wide = logits if dtype == "fp64" else logits.float()
    loss = torch.nn.functional.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="none")
    return Observation(logits=_array(logits), loss=_array(loss.view_as(labels)))


@dataclass(frozen=True, kw_only=True)
class _Probe:
    """A whole probe `[rows s]`, and how it is dealt out."""

    tokens: Tensor
    positions: Tensor
    labels: Tensor | None
    microbatches: int
    rotate: bool

    def iterator(self, cp: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
        """Micro-batches as this rank sees them: tokens, positions, labels (its part under CP), and whole positions."""
        from megatron.core import parallel_state

        from converters.megatron.attention import zigzag_split

        device, rank = torch.cuda.current_device(), parallel_state.get_context_parallel_rank()
        for part in torch.arange(len(self.tokens)).chunk(self.microbatches):
            mine = [
                None if whole is None else zigzag_split(whole[part], cp, rank).to(device)
                for whole in (self.tokens, self.positions, self.labels)
            ]
            yield mine[0], mine[1], mine[2], self.positions[part].to(device) if self.rotate else None  # type: ignore[misc]


def _forward(
    data: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    chunk: torch.nn.Module,
    topology: Topology,
    vocab_size: int,
    model: Any,
) -> tuple[Tensor, Any]:
    """One micro-batch through one chunk; the second value turns the last chunk's output into logits and loss."""
    tokens, positions, labels, rotate_by = data
    with _rotating_by(model, rotate_by):
        output = chunk(tokens, positions, None)

    def observe(logits: Tensor, non_loss_data: bool = True) -> tuple[Tensor, Tensor | None]:
        return _gather(logits, topology, vocab_size, model, labels)

    return output, observe


def _gather(
    logits: Tensor, topology: Topology, vocab_size: int, model: Any, labels: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Whole logits `[b s v]`, and loss `[b s]`, from this rank's part `[b s/cp v/tp]`."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    cp, rank = topology.cp, parallel_state.get_tensor_model_parallel_rank()
    share = logits.size(-1) // (1 if model.parallel_output else topology.tp)
    mine = slice(rank * share, (rank + 1) * share)
    part = logits if model.parallel_output else logits[..., mine]
    loss = None
    if labels is not None:
        padding = torch.arange(mine.start, mine.stop, device=part.device) >= vocab_size
        # In float32, in which Megatron-Core's cross entropy computes anyway, and a copy, which it overwrites.
        masked = part.float().masked_fill(padding, float("-inf")).transpose(0, 1).contiguous()
        loss = _over_context(model.compute_language_model_loss(labels, masked), cp)
    whole = gather_from_tensor_model_parallel_region(part)[..., :vocab_size]
    return _over_context(whole.contiguous(), cp), loss


def _over_context(part: Tensor, size: int) -> Tensor:
    """This rank's part `[b s/cp ...]` of the sequence, with the other ranks' put into order: `[b s ...]`."""
    from megatron.core import parallel_state

    from converters.megatron.attention import zigzag_unsplit

    if size == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(size)]
    torch.distributed.all_gather(parts, part, group=parallel_state.get_context_parallel_group())
    return zigzag_unsplit(torch.cat(parts, dim=1), size)


@contextlib.contextmanager
def _rotating_by(model: Any, positions: Tensor | None) -> Iterator[None]:
    """Let `model` rotate by `positions` `[b s]` (whole sequences): Megatron-Core's own RoPE knows only 0 to s - 1."""
    if positions is None:
        yield
        return
    from megatron.core.models.common.embeddings.rotary_pos_embedding import get_pos_emb_on_this_cp_rank

    embedding = model.rotary_pos_emb

    def angles(*_: Any, **__: Any) -> Tensor:
        frequencies = positions.t().float()[..., None] * embedding.inv_freq  # [s b d/2]
        rotation = torch.cat([frequencies, frequencies], dim=-1)[:, :, None]  # [s b 1 d]
        if embedding.cp_group is not None and embedding.cp_group.size() > 1:
            rotation = get_pos_emb_on_this_cp_rank(rotation, 0, embedding.cp_group)
        return rotation

    embedding.forward = angles
    try:
        yield
    finally:
        del embedding.forward


@contextlib.contextmanager
def _evaluating(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Dropout off, and as it was afterwards."""
    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, was in zip(chunks, training, strict=True):
            chunk.train(was)


def _default_positions(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.size(1)).expand_as(tokens)


def _extend(rows: Tensor, missing: int) -> Tensor:
    """`[b s]` with `missing` zeros at the end of each row."""
    return torch.nn.functional.pad(rows, (0, missing))


def _array(tensor: Tensor) -> Floats:
    return tensor.detach().to(device="cpu", dtype=torch.float32).numpy()
