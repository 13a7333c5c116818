"""What runs in ranks for the forward checks: the model under test, and transformers. Called through a zygote."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from parity.backends import below_bf16, held_in
from parity.bounds import Spread, share_held, spread
from parity.converter import Converter, Settings
from parity.observation import backend
from parity.observation.observe import Observation, hf_model, hf_observation, hf_observation_apart
from parity.observation.quantised_hf import CALIBRATIONS, MOVES, moved
from parity.probes import Probe


@dataclass(frozen=True, kw_only=True)
class Reference:
    """transformers on one probe, in one precision.

    Attributes:
        expected: What the model under test is compared with. In float32, eager attention. Below, the oracle: float32
            arithmetic with the weights of the precision. Sequences of a probe with segments were asked for one by one,
            so that none could see another.
        logits: How far transformers' own evaluations, which are equal in exact arithmetic, lie from it.
        loss: The same of the loss.
        together: What transformers says to a probe with segments as its users ask it, at once; `None` without segments.
        finite: Whether each evaluation gave numbers.
        unquantised: Of the first probe, where products are quantised: how far the same model without that lies from it.
    """

    expected: Observation
    logits: Spread
    loss: Spread
    together: Observation | None
    finite: bool
    unquantised: Spread | None = None


def references(folder: Path, probes: Sequence[Probe], precision: str, rounded: str | None = None) -> list[Reference]:
    """Ask transformers each probe: eager and fused attention, and each sequence by itself. In one rank.

    Args:
        folder: The checkpoint.
        probes: What is asked.
        precision: Of weights and activations.
        rounded: Compute in float32, with weights that were rounded to this precision.
    """
    model = hf_model(folder, dtype=rounded, oracle=True) if rounded else hf_model(folder, dtype=precision)
    oracle = None if precision == "fp32" else hf_model(folder, dtype=precision, oracle=True)
    found = [_reference(model, oracle, probe, precision) for probe in probes]
    if not below_bf16(precision):
        return found
    first, plain = probes[0], hf_observation(hf_model(folder, dtype=held_in(precision)), probes[0])
    apart = spread([plain.logits[first.compared]], found[0].expected.logits[first.compared])
    return [replace(found[0], unquantised=apart), *found[1:]]


def transformers(folder: Path, probes: Sequence[Probe], precision: str) -> list[Observation]:
    """What transformers says to each probe, asked as its users do, with eager attention. In one rank."""
    model = hf_model(folder, dtype=precision)
    return [hf_observation(model, probe) for probe in probes]


def forward(
    converter: Converter, folder: Path, settings: Settings, probes: Sequence[Probe]
) -> list[Observation] | None:
    """What the imported model says to each probe; on the rank that has it."""
    side = backend.of(settings)
    models = side.built(converter, folder, settings)
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    said = [side.tapped(models, probe, settings=settings, vocab_size=vocab_size, wanted=None)[1] for probe in probes]
    here = [one for one in said if one is not None]
    return here if len(here) == len(said) else None


def _reference(model: Any, oracle: Any | None, probe: Probe, precision: str) -> Reference:
    whole = probe.segments is None
    ask = hf_observation if whole else hf_observation_apart
    for _ in range(CALIBRATIONS if precision == "fp8-delayed" else 0):
        hf_observation(model, probe)

    def evaluated(attention: str, how: Callable[[Any, Probe], Observation]) -> Observation:
        model.set_attn_implementation(attention)
        return how(model, probe)

    eager, others = evaluated("eager", ask), [evaluated("sdpa", ask)]
    if whole and len(probe.pieces) > 1:
        others.append(evaluated("eager", hf_observation_apart))
    for seed in range(MOVES if below_bf16(precision) else 0):
        with moved(model, seed):
            others.append(evaluated("eager", ask))
    together = None if whole else evaluated("eager", hf_observation)
    expected = eager
    if oracle is not None:
        expected, others = ask(oracle, probe), [eager, *others]
    seen, labelled = probe.compared, probe.labelled
    return Reference(
        expected=expected,
        logits=spread([one.logits[seen] for one in others], expected.logits[seen], share_held(precision)),
        loss=spread([one.loss[labelled] for one in others], expected.loss[labelled]),
        together=together,
        finite=all(bool(np.isfinite(one.logits[seen]).all()) for one in (expected, *others)),
    )
