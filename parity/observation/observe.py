"""What one model says of every token of a probe: Megatron-Core through its pipeline, and transformers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from converters.topology import Coord, Topology
from parity.observation.feeding import Batch, Batches, extended, hidden_from, masked_by, positions_of, rotating_by
from parity.probes import IGNORED, Probe

Floats = npt.NDArray[np.float32]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a model says of every token of a probe.

    Args:
        logits: `[b s v]` float32, without vocabulary padding.
        loss: `[b s]` float32, the cross entropy of each token in nats; 0 where the label is `IGNORED`.
        activations: `[b s h]` float32 by the name of its tap (see `parity.observation.taps`), where any were asked for.
    """

    logits: Floats
    loss: Floats
    activations: Mapping[str, Floats] = field(default_factory=dict)


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
        logits=_array(torch.cat([logits for logits, _ in gathered])[:batch, :length]),
        loss=_array(torch.cat([loss for _, loss in gathered])[:batch, :length]),
    )


def hf_model(folder: str | Path, *, dtype: str = "fp32", attention: str = "eager", oracle: bool = False) -> Any:
    """The `LlamaForCausalLM` of the checkpoint in `folder`, to be observed.

    Safe in a process that has the CPU runtime installed: that redirects only what names a CUDA device. In fp64 the
    rotary angles are still float32, as transformers computes them.

    Args:
        folder: `config.json` and safetensors.
        dtype: Of weights and activations: a name in `DTYPES`.
        attention: transformers' attention implementation: `eager` or `sdpa`.
        oracle: Compute in float32 with the weights of `dtype`, so that only the weights are rounded.
    """
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], attn_implementation=attention).eval()
    return model.float() if oracle else model


def hf_observation(model: Any, probe: Probe, **loading: Any) -> Observation:
    """Ask a transformers model as its users do, the whole probe at once.

    Padding is a mask `[b s]`, packing positions that begin anew. Where a probe has both, or positions that jump within
    a segment, a mask `[b 1 s s]` says what a token sees.

    Args:
        model: A causal language model, or a checkpoint's folder.
        probe: What is asked.
        loading: Of a folder: as for `hf_model`.

    Returns:
        Values at padding mean nothing.

    Source: huggingface/transformers v5.23, masking_utils.py `find_packed_sequence_indices` and
        `_preprocess_mask_arguments`: positions that do not count up are the seams of packed sequences, unless there is
        a mask.
    """
    if isinstance(model, str | Path):
        model = hf_model(model, **loading)
    elif loading:
        raise TypeError(f"{', '.join(loading)}: a model that is loaded already cannot be loaded so")
    tokens, labels = (torch.from_numpy(array).to(model.device) for array in (probe.tokens, probe.labels))
    with torch.no_grad():
        logits = model(
            input_ids=tokens,
            position_ids=torch.from_numpy(positions_of(probe)).to(model.device),
            attention_mask=_hf_mask(probe, model),
            use_cache=False,
        ).logits
    wide = logits.float() if logits.dtype != torch.float64 else logits
    return Observation(logits=_array(logits), loss=_array(cross_entropy(wide, labels, wide.dtype)))


def cross_entropy(logits: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """The loss of each token, `[rows s]` in `dtype`, 0 where unlabelled.

    Not torch's own: its float32 log-softmax on the CPU adds up a vocabulary one by one, and what it loses (1e-5 nats of
    49,152 terms, always to one side, and 4e-4 of the gradients) is far above all other noise, in every evaluation.
    """
    wide = logits.to(dtype)
    picked = wide.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels != IGNORED, wide.logsumexp(dim=-1) - picked, 0.0)


def hf_observation_apart(model: Any, probe: Probe) -> Observation:
    """Ask a transformers model for each sequence of the probe by itself, so that none can see another.

    Returns:
        As if asked at once; zeros at padding.
    """
    logits: Floats | None = None
    loss = np.zeros(probe.tokens.shape, dtype=np.float32)
    for piece in probe.pieces:
        said = hf_observation(model, probe.alone(piece))
        if logits is None:
            logits = np.zeros((*loss.shape, said.logits.shape[-1]), dtype=np.float32)
        logits[piece.row, piece.start : piece.stop] = said.logits[0]
        loss[piece.row, piece.start : piece.stop] = said.loss[0]
    if logits is None:
        raise ValueError(f"the probe {probe.name!r} is padding alone: there is nothing to ask")
    return Observation(logits=logits, loss=loss)


def _hf_mask(probe: Probe, model: Any) -> Tensor | None:
    """`[b s]` where padding is all that is hidden, `None` where positions tell, else `[b 1 s s]` to be added."""
    if probe.segments is None:
        # With no mask, positions that jump would be read as seams.
        return torch.ones(probe.tokens.shape, dtype=torch.int64, device=model.device)
    segments = torch.from_numpy(probe.segments).to(model.device)
    if int(segments.max()) == 1:
        return (segments > 0).long()
    assert probe.positions is not None
    seams = np.diff(probe.positions) != 1
    if (probe.segments > 0).all() and np.array_equal(seams, np.diff(probe.segments) != 0):
        return None
    hidden = hidden_from(segments)
    return torch.zeros(hidden.shape, dtype=model.dtype, device=model.device).masked_fill(
        hidden, torch.finfo(model.dtype).min
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

    from converters.megatron.attention import zigzag_unsplit

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


def _array(tensor: Tensor) -> Floats:
    return tensor.detach().to(device="cpu", dtype=torch.float32).numpy()
