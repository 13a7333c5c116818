"""Which part of a model is to blame: transformers is given the model's weights, config or frequencies, one by one.

If transformers with a part of the imported model computes what that does, that part is what differs. What no part
explains is computation, and the first tap that is still wrong says where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from converters.topology import Topology
from parity.backends import below_bf16
from parity.causes import Cause
from parity.diagnosis.held import Held, checkpoint
from parity.diagnosis.pullback import Pullback
from parity.observation import taps
from parity.observation.activations import Floats, Reach, Yardstick, first_wrong, merged, reached
from parity.observation.observe import DTYPES
from parity.observation.quantised_hf import quantise
from parity.probes import Probe
from parity.statement.config import FREQUENCIES, Facts, activation_name, demanded, disagreement

SHOWN = 6
"""Tensors that a line names."""


@dataclass(frozen=True, kw_only=True)
class Failing:
    """A forward that fails, and how it is judged.

    Args:
        folder: The checkpoint.
        probe: What was asked; one segment a row.
        precision: `fp32` or `bf16`.
        topology: The parallel layout.
        floors: As in `parity.bounds`.
    """

    folder: Path
    probe: Probe
    precision: str
    topology: Topology
    floors: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is to blame.

    Args:
        first: The first tap at which the model is not where it must be; `None` if there is none.
        causes: What explains it.
        lines: The same for people.
    """

    first: Reach | None
    causes: tuple[Cause, ...]
    lines: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something that transformers can take over from the imported model.

    Args:
        causes: What it is if it is to blame.
        line: The same for people.
        config: Changes a `LlamaConfig`.
        model: Changes a `LlamaForCausalLM`.
    """

    causes: tuple[Cause, ...]
    line: str
    config: Callable[[Any], None] = lambda config: None
    model: Callable[[Any], None] = lambda model: None


def judge(failing: Failing, held: Sequence[Held], scratch: Path) -> Verdict:
    """Say what is to blame. In one process without Megatron.

    Args:
        failing: The forward.
        held: What each rank's model is.
        scratch: Where ranks left the tensors that differ.
    """
    actual = merged([rank.taps for rank in held])
    plain = _yardsticks(failing, ())
    first = _first_wrong(failing, plain, actual)
    if first is None:
        return Verdict(first=None, causes=(), lines=("every tap is within its bound",))
    weights = _weights(failing, scratch)
    fields, beyond = _stated(failing, held)
    parts = [*([weights] if weights else []), *fields]
    rest: Reach | None = first
    blamed: list[Part] = []
    if parts:
        full = _yardsticks(failing, parts)
        computed = {name: stick.expected for name, stick in full.items()}
        rest = _first_wrong(failing, full, actual)
        for part in parts:
            others = plain if len(parts) == 1 else _yardsticks(failing, [one for one in parts if one is not part])
            if _first_wrong(failing, others, computed) is not None:
                blamed.append(part)
    causes = [cause for part in blamed for cause in part.causes]
    lines = [f"first wrong: {_place(first)}"]
    lines += [part.line for part in blamed]
    lines += [f"{part.line}; this does not matter here" for part in parts if part not in blamed]
    lines += ["weights: equal to the bit"] if weights is None else []
    lines += ["config: nothing differs that the model says of itself"] if not fields else []
    if rest is not None:
        cause = _computation(rest, beyond)
        causes.append(cause)
        known = "transformers with all of the above still computes otherwise, " if blamed else ""
        lines.append(f"computation: {known}first at {_place(rest)}: {cause.detail or 'look there'}")
    elif blamed:
        lines.append("transformers with that computes what the model does")
    stray = sorted({line for rank in held for line in rank.stray})
    lines += [f"parameters: {line}" for line in stray[:SHOWN]]
    return Verdict(first=first, causes=tuple(causes), lines=tuple(lines))


def _yardsticks(failing: Failing, parts: Sequence[Part]) -> dict[str, Yardstick]:
    """What transformers with `parts` of the imported model computes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(failing.folder)
    for part in parts:
        part.config(config)
    model = LlamaForCausalLM.from_pretrained(
        failing.folder, config=config, dtype=DTYPES[failing.precision], attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for part in parts:
            part.model(model)
    if below_bf16(failing.precision):
        quantise(model, failing.precision)
    return taps.yardsticks(model, failing.probe, failing.precision)


def _first_wrong(failing: Failing, sticks: Mapping[str, Yardstick], actual: Mapping[str, Floats]) -> Reach | None:
    """The first tap of `actual` that is not within its bound. Both sides may have NaN at the same places."""
    both = {name: np.isnan(stick.expected) & np.isnan(actual[name]) for name, stick in sticks.items() if name in actual}
    numbers = {
        name: replace(sticks[name], expected=np.where(nan, 0, sticks[name].expected)) for name, nan in both.items()
    }
    found = {name: np.where(nan, 0, actual[name]) for name, nan in both.items()}
    return first_wrong(
        reached(numbers, found, precision=failing.precision, tp=failing.topology.tp, floors=failing.floors)
    )


def _place(reach: Reach) -> str:
    return f"{reach.tap} ({reach.place}): {reach.measured:.2g}, allowed {reach.bound:.2g}"


def _weights(failing: Failing, scratch: Path) -> Part | None:
    """The tensors that ranks hold otherwise than the checkpoint."""
    source, config = checkpoint(failing.folder, failing.precision), taps.hf_config(failing.folder)
    pulled = Pullback.of(scratch, source, config)
    changed = pulled.changed()
    if not changed:
        return None
    # A tied head on another stage than the embedding is a parameter of its own.
    apart = failing.topology.pp * failing.topology.vpp > 1

    def give(model: Any) -> None:
        if apart and model.lm_head.weight is model.model.embed_tokens.weight:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, (wrong, values) in changed.items():
            right = parameters[name]
            right.copy_(torch.where(torch.from_numpy(wrong.copy()), torch.from_numpy(values.copy()), right))

    counts = [f"{name} ({int(wrong.sum()):,} elements)" for name, (wrong, _) in changed.items()]
    more = f" and {len(counts) - SHOWN} more" * (len(counts) > SHOWN)
    return Part(
        causes=tuple(pulled.causes(source, config, failing.topology, is_coded=False)),
        line=f"weights: {', '.join(counts[:SHOWN])}{more} differ from the checkpoint",
        model=give,
    )


def _stated(failing: Failing, held: Sequence[Held]) -> tuple[list[Part], list[Cause]]:
    """What ranks' models compute with that the config does not demand: as parts, and what transformers cannot do."""
    wanted, config = demanded(failing.folder), taps.hf_config(failing.folder)
    parts: dict[str, Part] = {}
    beyond: list[Cause] = []
    for facts in (facts for rank in held for facts in rank.facts):
        for name in facts:
            cause = None if name in parts else disagreement(name, wanted, facts, config)
            if cause is None:
                continue
            if cause.kind == "computation" and cause not in beyond:
                beyond.append(cause)
            given = _taken_over(name, facts[name], wanted)
            if given or cause.kind == "config":
                parts[name] = Part(causes=(cause,), line=f"{cause.kind}: {name}: {cause.detail}", **given)
    return list(parts.values()), beyond


def _taken_over(name: str, value: Any, wanted: Facts) -> dict[str, Callable[[Any], None]]:
    """How transformers computes with another value of a field; empty where it cannot, or where shapes decide."""
    if name == "rms_norm_eps" and isinstance(value, float):
        return {"config": lambda config: setattr(config, name, value)}
    if not isinstance(value, np.ndarray) or value.shape != wanted[name].shape:
        return {}
    if name == FREQUENCIES:
        return {"model": lambda model: model.model.rotary_emb.inv_freq.copy_(torch.from_numpy(value))}
    if known := activation_name(value):
        return {"config": lambda config: setattr(config, name, known)}
    return {}


def _computation(reach: Reach, beyond: Sequence[Cause]) -> Cause:
    """The sub-module behind a tap, or what is known of the model that explains it."""
    part = reach.tap.rpartition(".")[2]
    name = {
        "embedding": "embedding",
        "input_norm": "norm",
        "post_norm": "norm",
        "final_norm": "norm",
        "attention": "attention",
        "mlp": "mlp",
        "logits": "head",
    }.get(part, "mlp")
    suspects = {"attention": ("rope", "attention")}.get(name, (name,))
    known = [cause for cause in beyond if cause.what[0] in suspects]
    if known:
        return replace(known[0], where=reach.tap, detail="; ".join(cause.detail for cause in known))
    return Cause(kind="computation", what=(name,), where=reach.tap)
