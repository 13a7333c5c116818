"""What a model says of every token of a probe; and transformers asked for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from parity.backends import QUANTISED, below_bf16
from parity.observation.feeding import hidden_from, positions_of
from parity.observation.quantised_hf import quantise
from parity.probes import IGNORED, Probe

Floats = npt.NDArray[np.float32]
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
    **dict.fromkeys(QUANTISED, torch.bfloat16),
}
"""Of weights and activations."""


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


def hf_model(folder: str | Path, *, dtype: str = "fp32", attention: str = "eager", oracle: bool = False) -> Any:
    """The `LlamaForCausalLM` of the checkpoint in `folder`, to be observed.

    Safe in a process that has the CPU runtime installed: that redirects only what names a CUDA device. In fp64 the
    rotary angles are still float32, as transformers computes them.

    Args:
        folder: `config.json` and safetensors.
        dtype: A name in `DTYPES`: of weights and activations, or of the matrix products in layers.
        attention: transformers' attention implementation: `eager` or `sdpa`.
        oracle: Compute in float32 with the weights of `dtype`, so that only the weights are rounded.
    """
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], attn_implementation=attention).eval()
    if below_bf16(dtype) and not oracle:
        quantise(model, dtype)
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
    return Observation(logits=array_of(logits), loss=array_of(cross_entropy(wide, labels, wide.dtype)))


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


def array_of(tensor: Tensor) -> Floats:
    """On the CPU, in float32."""
    return tensor.detach().to(device="cpu", dtype=torch.float32).numpy()
