"""What a model computes on its way, recorded by hooks around a forward, by the names of `activations`.

A tap holds what came out of a module while the hooks were on: nothing is computed again, and nothing is changed.
Transformer Engine's layers compute their norms inside the next linear: the taps of those norms do not exist there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parity.backends import below_bf16
from parity.converter import Converter, Settings
from parity.observation.activations import LOGITS, PARTS, Floats, Yardstick, blocks, everything, yardstick
from parity.observation.observe import array_of, hf_model, hf_observation
from parity.observation.quantised_hf import CALIBRATIONS, MOVES, moved, restore
from parity.probes import Probe

Wanted = Callable[[str], bool]
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Taps:
    """What the taps of one process have recorded.

    Attributes:
        parts: For each tap, what came out at each call: `[b s h]` in transformers, `[s b h]` of this rank's share in
            Megatron-Core; on the model's device and in its dtype.
    """

    parts: dict[str, list[Tensor]] = field(default_factory=dict)

    def of_hf(self) -> dict[str, Floats]:
        """`[b s h]` float32; several calls are several batches."""
        return {name: array_of(torch.cat(calls)) for name, calls in self.parts.items()}


@contextlib.contextmanager
def hf_taps(model: Any, wanted: Wanted = everything) -> Iterator[Taps]:
    """Record what the modules of a `LlamaForCausalLM` put out while it runs.

    Source: huggingface/transformers v5.23, models/llama/modeling_llama.py `LlamaDecoderLayer.forward`.
    """
    inner = model.model
    modules = {"embedding": inner.embed_tokens, "final_norm": inner.norm}
    for n, layer in enumerate(inner.layers):
        parts = (layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm, layer.mlp)
        modules |= {f"layers.{n}.{part}": module for part, module in zip(PARTS, parts, strict=True)}
        modules[f"layers.{n}"] = layer
    with recording(modules, wanted, lambda output: output[0] if isinstance(output, tuple) else output) as taps:
        yield taps


def said(model: Any, probe: Probe, wanted: Wanted = everything) -> dict[str, Floats]:
    """What a transformers model computes for a probe: its taps, then its logits."""
    with hf_taps(model, wanted) as taps:
        logits = hf_observation(model, probe).logits
    return {**taps.of_hf(), LOGITS: logits}


def yardsticks(model: Any, probe: Probe, precision: str, wanted: Wanted = everything) -> dict[str, Yardstick]:
    """Each tap of transformers with its floor: eager attention, against evaluations that are equal in exact arithmetic.

    They are fused attention, in float32 with matrix products in another order of summation, and one sequence at a time.
    The order matters at the first token: attention has nothing to add up there, and activations are at their largest.

    Args:
        model: A `LlamaForCausalLM` in `precision`. Below float32 it is float32 afterwards: that is the oracle.
        probe: One segment a row.
        precision: A name of `parity.backends.PRECISIONS`.
        wanted: Which taps; logits always.
    """
    evaluations: list[dict[str, Floats]] = []
    for _ in range(CALIBRATIONS if precision == "fp8-delayed" else 0):
        hf_observation(model, probe)
    model.set_attn_implementation("eager")
    evaluations.append(said(model, probe, wanted))
    model.set_attn_implementation("sdpa")
    with _in_two_sums(model) if precision == "fp32" else contextlib.nullcontext():
        evaluations.append(said(model, probe, wanted))
    model.set_attn_implementation("eager")
    rows = [said(model, probe.alone(piece), wanted) for piece in probe.pieces]
    evaluations.append({name: np.concatenate([row[name] for row in rows]) for name in rows[0]})
    for seed in range(MOVES) if below_bf16(precision) else ():
        with moved(model, seed):
            evaluations.append(said(model, probe, wanted))
    oracle = said(restore(model.float()), probe, wanted) if precision != "fp32" else {}
    return {name: yardstick([one[name] for one in evaluations], oracle.get(name)) for name in evaluations[0]}


@contextlib.contextmanager
def _in_two_sums(model: Any) -> Iterator[None]:
    """Every linear layer adds up its two halves of the input each by itself, as two tensor-parallel ranks do."""

    def halves(module: torch.nn.Linear, given: tuple[Tensor], output: Tensor) -> Tensor:
        cut = module.in_features // 2
        first = torch.nn.functional.linear(given[0][..., :cut], module.weight[:, :cut])
        return first + torch.nn.functional.linear(given[0][..., cut:], module.weight[:, cut:], module.bias)

    hooks = [module.register_forward_hook(halves) for module in model.modules() if isinstance(module, torch.nn.Linear)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def reference(folder: Path, probe: Probe, precision: str) -> dict[str, Yardstick]:
    """`yardsticks` of what leaves each block, for the checkpoint in `folder`. In one process without Megatron."""
    return yardsticks(hf_model(folder, dtype=precision), probe, precision, blocks)


def of_blocks(converter: Converter, folder: Path, settings: Settings, probe: Probe) -> Mapping[str, Floats]:
    """What leaves each block of the imported model that this rank has whole. In each rank; collective."""
    from parity.observation import backend

    side = backend.of(settings)
    models = side.built(converter, folder, settings)
    taps, _ = side.tapped(models, probe, settings=settings, vocab_size=hf_config(folder)["vocab_size"], wanted=blocks)
    return taps


def hf_config(folder: Path) -> dict[str, Any]:
    """The config of a checkpoint as transformers completes it."""
    from transformers import LlamaConfig

    config: dict[str, Any] = LlamaConfig.from_pretrained(folder).to_dict()
    return config


@contextlib.contextmanager
def recording(modules: Mapping[str, Any], wanted: Wanted, value: Callable[[Any], Tensor]) -> Iterator[Taps]:
    """Record what modules put out, by their taps; `value` is the tensor in an output."""
    taps = Taps()

    def keep(name: str) -> Callable[..., None]:
        # A copy: without gradients, what follows may add to an output in place.
        return lambda module, given, output: taps.parts.setdefault(name, []).append(value(output).detach().clone())

    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items() if wanted(name)]
    try:
        yield taps
    finally:
        for hook in hooks:
            hook.remove()


def with_bias(output: Any) -> Tensor:
    """A Megatron-Core or Transformer Engine module's output: some give their last bias, or their context, apart."""
    if not isinstance(output, tuple):
        tensor: Tensor = output
        return tensor
    first, second = output[:2]
    whole: Tensor = first if second is None or second.dim() != 1 else first + second
    return whole
