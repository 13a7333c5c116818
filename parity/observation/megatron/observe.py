"""What a Megatron-Core model says of every token of a probe, through its pipeline."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from converters.topology import Coord, Topology
from parity.observation.feeding import extended, positions_of
from parity.observation.megatron.feeding import Batch, Batches, masked_by, rotating_by
from parity.observation.observe import Observation, array_of
from parity.probes import IGNORED, Probe


def megatron_observation(
    chunks: Sequence[torch.nn.Module], probe: Probe, *, topology: Topology, vocab_size: int
) -> Observation | None:
    """Run Megatron-Core's forward through its pipeline schedule, and gather what it says of every token. Collective.

    Each rank passes the same probe. Three things are added and taken off again, none of which a token can see:

    - padding at the end of each sequence, to a multiple of 2 x cp, and of cp x tp under sequence parallelism;
    - under interleaving, repeated sequences up to a multiple of the stages, since it needs a micro-batch for each;
    - the vocabulary's padding. In the loss its logits count as minus infinity: its zero rows would each add exp(0) to
      the denominator, which is a property of the padding, not of the model.

    Without positions the model's own RoPE counts from 0; with them, its own table of angles is read there. Without
    segments its own causal mask is used; with them, an explicit one.

    Args:
        chunks: This rank's model chunks, wrapped or not.
        probe: What is asked.
        topology: The layout that they were built for, on which Megatron-Core's parallel state is.
        vocab_size: Rows of the vocabulary without padding.

    Returns:
        The observation on the last stage's rank with tp, cp and dp index 0; `None` on every other rank. Values at
        padding mean nothing.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from converters.megatron.parallel import current_coord
    from converters.megatron.provider import unwrap

    batch, length = probe.tokens.shape
    tp, cp = topology.tp, topology.cp
    multiple = math.lcm(2 * cp if cp > 1 else 1, cp * tp if topology.sp else 1)
    missing = -length % multiple
    microbatches = topology.pp if topology.vpp > 1 else 1
    rows = torch.arange(-(-batch // microbatches) * microbatches) % batch
    batches = Batches(
        tokens=extended(probe.tokens, missing)[rows],
        labels=extended(probe.labels, missing)[rows],
        positions=extended(positions_of(probe), missing)[rows],
        rotate=probe.positions is not None,
        segments=None if probe.segments is None else extended(probe.segments, missing)[rows],
        count=microbatches,
    )

    with _evaluating(chunks), torch.no_grad():
        gathered: list[tuple[Tensor, Tensor]] = get_forward_backward_func()(
            forward_step_func=lambda data, chunk: _forward(next(data), chunk, topology, vocab_size, unwrap(chunk)),
            data_iterator=[batches.of_this_rank(cp) for _ in chunks],
            model=list(chunks),
            num_microbatches=microbatches,
            seq_length=length + missing,
            micro_batch_size=len(rows) // microbatches,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if current_coord() != Coord(pp=topology.pp - 1):
        return None
    return Observation(
        logits=array_of(torch.cat([logits for logits, _ in gathered])[:batch, :length]),
        loss=array_of(torch.cat([loss for _, loss in gathered])[:batch, :length]),
    )


def _forward(
    batch: Batch, chunk: torch.nn.Module, topology: Topology, vocab_size: int, model: Any
) -> tuple[Tensor, Any]:
    """One micro-batch through one chunk; the second value turns the last chunk's output into logits and loss."""
    with rotating_by(model, batch.rotate_by), masked_by(model, batch.hidden):
        output = chunk(batch.tokens, batch.positions, batch.hidden)

    def observe(logits: Tensor, non_loss_data: bool = True) -> tuple[Tensor, Tensor]:
        return _gather(logits, topology, vocab_size, model, batch.labels)

    return output, observe


def _gather(logits: Tensor, topology: Topology, vocab_size: int, model: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Whole logits `[b s v]`, and loss `[b s]`, from this rank's part `[b s/cp v/tp]`."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    cp, rank = topology.cp, parallel_state.get_tensor_model_parallel_rank()
    share = logits.size(-1) // (1 if model.parallel_output else topology.tp)
    mine = slice(rank * share, (rank + 1) * share)
    part = logits if model.parallel_output else logits[..., mine]
    padding = torch.arange(mine.start, mine.stop, device=part.device) >= vocab_size
    # In float32, in which Megatron-Core's cross entropy computes anyway, and a copy, which it overwrites.
    masked = part.float().masked_fill(padding, float("-inf")).transpose(0, 1).contiguous()
    ignored = labels == IGNORED
    loss = model.compute_language_model_loss(labels.masked_fill(ignored, 0), masked).masked_fill(ignored, 0)
    whole = gather_from_tensor_model_parallel_region(part)[..., :vocab_size]
    return _over_context(whole.contiguous(), cp), _over_context(loss, cp)


def _over_context(part: Tensor, size: int) -> Tensor:
    """This rank's part `[b s/cp ...]` of the sequence, with the other ranks' put into order: `[b s ...]`."""
    from megatron.core import parallel_state

    from converters.zigzag import zigzag_unsplit

    if size == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(size)]
    torch.distributed.all_gather(parts, part, group=parallel_state.get_context_parallel_group())
    return zigzag_unsplit(torch.cat(parts, dim=1), size)


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
