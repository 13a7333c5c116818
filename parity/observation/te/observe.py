"""What a model on Transformer Engine's layers says of every token of a probe, and computes on its way."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from converters.topology import Coord, Topology
from parity.converter import Settings
from parity.observation.activations import PARTS, Floats
from parity.observation.observe import Observation, array_of, cross_entropy
from parity.observation.quantised_hf import CALIBRATIONS
from parity.observation.taps import Taps, Wanted, recording, with_bias
from parity.observation.te.feeding import Call, calls, laid_out, ranks_along, rotating_by
from parity.probes import Probe


def tapped(
    models: Sequence[Any], probe: Probe, *, settings: Settings, vocab_size: int, wanted: Wanted | None
) -> tuple[dict[str, Floats], Observation | None]:
    """What the model says to a probe, on the rank with tp and cp index 0, and there the activations. Collective.

    Each rank passes the same probe. Tokens are added at the end, and taken off again, as many as the layout and the
    precision ask for; no token of the probe sees them. Scales of delayed scaling come from what was seen before, so
    then all of a probe is asked for them first (see `parity.observation.quantised_hf.CALIBRATIONS`).
    """
    (model,) = models
    topology = settings.topology
    here = topology.coord(dist.get_rank())
    logits = np.zeros((probe.tokens.size, vocab_size), dtype=np.float32)
    taps: dict[str, Floats] = {}
    training = model.training
    model.eval()
    asked = list(calls(probe, settings, here.cp))
    for call in asked * CALIBRATIONS if settings.precision == "fp8-delayed" else []:
        with torch.enable_grad():
            said(model, call)
    for call in asked:
        with torch.no_grad(), _hooks(model, wanted) as recorded:
            answer = said(model, call)
        found = _ordered(answer, call, topology, dim=1)
        if here == Coord():
            _put(logits, array_of(found), call)
        for name, parts in recorded.parts.items() if recorded is not None else ():
            (part,) = parts
            activation = array_of(_ordered(_over_rows(part, name, call, topology), call, topology, dim=1))
            _put(taps.setdefault(name, np.zeros((probe.tokens.size, part.size(-1)), np.float32)), activation, call)
    model.train(training)
    if here != Coord():
        return {}, None
    whole = logits.reshape(*probe.tokens.shape, vocab_size)
    loss = array_of(cross_entropy(torch.from_numpy(whole), torch.from_numpy(probe.labels), torch.float32))
    shaped = {name: array.reshape(*probe.tokens.shape, -1) for name, array in taps.items()}
    return shaped, Observation(logits=whole, loss=loss)


def said(model: Any, call: Call, **options: Any) -> Any:
    """The logits `[b s/cp v]` of one call, of this rank's tokens; the model's whole answer where more is passed."""
    device = next(model.parameters()).device
    given = {**call.options, **options}
    given |= {name: value.to(device) for name, value in given.items() if isinstance(value, Tensor)}
    with laid_out(model, call.layout), rotating_by(model, call.rotate_by):
        answer = model(input_ids=call.tokens[:, call.here].to(device), use_cache=False, **given)
    return answer if options else answer.logits


def everyones(part: Tensor, topology: Topology, along: str) -> list[Tensor]:
    """The tensor of each rank that differs from this one in the mesh dim `along` alone, in its order. Collective."""
    if topology.size(along) == 1:
        return [part]
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return [parts[rank] for rank in ranks_along(topology, dist.get_rank(), along)]


def _ordered(part: Tensor, call: Call, topology: Topology, *, dim: int) -> Tensor:
    """The parts of all ranks that share sequences, put back into order."""
    whole = torch.cat(everyones(part, topology, "cp"), dim=dim)
    return whole.index_select(dim, call.order.to(whole.device))


def _over_rows(part: Tensor, name: str, call: Call, topology: Topology) -> Tensor:
    """An activation `[b s/cp h]`, with the other ranks' share of it under sequence parallelism."""
    if topology.sp and name != "embedding":
        part = torch.cat(everyones(part, topology, "tp"))
    return part.reshape(len(call.tokens), len(call.here), -1)


def _put(array: Floats, found: Floats, call: Call) -> None:
    """Put what was said of each token of the probe at its place."""
    at = call.at.numpy()
    array[at[at >= 0]] = found[at >= 0][..., : array.shape[1]]


def _hooks(model: Any, wanted: Wanted | None) -> contextlib.AbstractContextManager[Taps]:
    """Record what the modules put out. Norms are part of the linear that follows: their taps do not exist."""
    if wanted is None:
        return contextlib.nullcontext(Taps())
    modules: Mapping[str, Any] = {"embedding": model.model.embed_tokens, "final_norm": model.model.norm}
    for n, layer in enumerate(model.model.layers):
        found = {"attention": layer.self_attention, "mlp": layer.layernorm_mlp}
        modules = {**modules, **{f"layers.{n}.{part}": found[part] for part in PARTS if part in found}}
        modules = {**modules, f"layers.{n}": layer}
    return recording(modules, wanted, with_bias)
