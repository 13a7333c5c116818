"""What a Megatron-Core model computes on its way, by the names of `activations`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from converters.topology import Coord, Topology
from parity.converter import Settings
from parity.observation.activations import PARTS, Floats, everything
from parity.observation.megatron.observe import megatron_observation
from parity.observation.observe import Observation, array_of
from parity.observation.taps import Taps, Wanted, recording, with_bias
from parity.probes import Probe


def tapped(
    models: Sequence[torch.nn.Module], probe: Probe, *, settings: Settings, vocab_size: int, wanted: Wanted | None
) -> tuple[dict[str, Floats], Observation | None]:
    """What the chunks say to a probe, on the rank that has it, and the activations that this rank has whole."""
    topology = settings.topology
    if wanted is None:
        return {}, megatron_observation(models, probe, topology=topology, vocab_size=vocab_size)
    with megatron_taps(models, wanted) as recorded:
        seen = megatron_observation(models, probe, topology=topology, vocab_size=vocab_size)
    return whole(recorded, topology, *probe.tokens.shape), seen


@contextlib.contextmanager
def megatron_taps(chunks: Sequence[torch.nn.Module], wanted: Wanted = everything) -> Iterator[Taps]:
    """Record what the modules of this rank's chunks of a `GPTModel` put out while its pipeline runs.

    Source: NVIDIA/Megatron-LM core_v0.16.1 and core_v0.19.2, megatron/core/transformer/transformer_layer.py
        `TransformerLayer.forward` and identity_op.py `IdentityOp`, which stands where a norm is part of a linear.
    """
    from megatron.core.transformer.identity_op import IdentityOp

    from converters.megatron.provider import unwrap

    modules: dict[str, torch.nn.Module] = {}
    for model in (unwrap(chunk) for chunk in chunks):
        modules |= {"embedding": model.embedding} if model.pre_process else {}
        if model.post_process:
            modules["final_norm"] = model.decoder.final_layernorm
        for layer in model.decoder.layers:
            n = layer.layer_number - 1
            parts = (layer.input_layernorm, layer.self_attention, layer.pre_mlp_layernorm, layer.mlp)
            modules |= {f"layers.{n}.{part}": module for part, module in zip(PARTS, parts, strict=True)}
            modules[f"layers.{n}"] = layer
    held = {name: module for name, module in modules.items() if not isinstance(module, IdentityOp)}
    with recording(held, wanted, with_bias) as taps:
        yield taps


def whole(taps: Taps, topology: Topology, batch: int, length: int) -> dict[str, Floats]:
    """This stage's taps, whole: `[b s h]` float32. Collective over the ranks of a stage.

    Micro-batches are put together; sequence-parallel shards and context-parallel ones in zigzag order are gathered;
    rows and tokens that were added for the layout's sake, always behind the probe's own, are taken off.

    Args:
        taps: What was recorded.
        topology: The layout.
        batch: Sequences of the probe.
        length: Tokens of a sequence.

    Returns:
        The taps, on the ranks with tp, cp and dp index 0; nothing on the others.
    """
    from megatron.core import parallel_state

    from converters.megatron.parallel import current_coord
    from converters.zigzag import zigzag_unsplit

    here = current_coord()
    out: dict[str, Floats] = {}
    for name, calls in taps.parts.items():
        tensor = torch.cat(calls, dim=1)
        if topology.sp:
            tensor = _gathered(tensor, parallel_state.get_tensor_model_parallel_group())
        if topology.cp > 1:
            tensor = _gathered(tensor, parallel_state.get_context_parallel_group())
            tensor = zigzag_unsplit(tensor, topology.cp, dim=0)
        if here == Coord(pp=here.pp):
            out[name] = array_of(tensor.transpose(0, 1)[:batch, :length])
    return out


def _gathered(part: Tensor, group: Any) -> Tensor:
    """The parts of all ranks of `group`, one behind the other along the first dim."""
    parts = [torch.empty_like(part) for _ in range(group.size())]
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts)
