"""The imported model trains as transformers trains it: gradients of every tensor, and the losses of a few steps.

Bounds are `parity.bounds` applied tensor by tensor and step by step: ten floors, where a floor is how far evaluations
by transformers itself, equal in exact arithmetic, are from the reference *there*. A gradient's floor belongs to its
tensor because noise is as unequal as gradients are: it grows with what is summed (a long sum that nearly cancels has
little size and much noise), and a gate that is as wide as the noisiest tensor needs would hide a fault in a quiet one.
A floor that is smaller than one rounding step of the tensor's largest element counts as that.

In bfloat16 the distance is the root mean square over a tensor, from the oracle, beside transformers' own (see
`parity.bounds.nearness`). Where transformers rounds once in making a gradient, Megatron-Core rounds `2 n - 1` times at
most, n parts of it and n - 1 additions of them:

- the input gradient of a column-parallel layer, and forward the output of a row-parallel one: n = tp;
- the gradients of keys and values, which context-parallel ranks gather: n = cp;
- each rank's part of a weight's gradient, under context parallelism, or of a norm's under sequence parallelism: n = cp
  or tp, and added in float32, so n roundings only.

None of these lies within another, so n is the larger of tp and cp. Micro-batches and data parallelism need no factor:
transformers' own evaluation takes as many backward passes over the batch, and adds up their rounded gradients in
float32, as Megatron-Core's `main_grad` does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from parity.backends import BACKENDS
from parity.bounds import allowed, nearness
from parity.case import Case
from parity.checks.bench import Bench
from parity.diagnosis.localise import explained
from parity.findings import Finding, Lines, Measurement
from parity.observation.lessons import Deal, Lesson, Recipe, lessons
from parity.probes import IGNORED

if TYPE_CHECKING:
    from pathlib import Path

    from parity.observation.hf_training import Reference
    from parity.observation.training import Trained

RECIPE = Recipe()


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A difference beside what is allowed at its place.

    Args:
        name: The place.
        off: The difference.
        bound: What is allowed.
        floor: What `bound` was derived from.
        scale: The size of what was compared.
    """

    name: str
    off: float
    bound: float
    floor: float
    scale: float

    @property
    def ratio(self) -> float:
        """How much of what is allowed is used; NaN counts as beyond everything."""
        return self.off / self.bound if self.off == self.off and self.bound > 0 else np.inf * (self.off != 0)


def asked(bench: Bench) -> tuple[list[Lesson], Reference, Path]:
    """The batches of this case, what transformers makes of them, and the file of its gradients; asked once."""
    case, subject, deal = bench.case, bench.subject, Deal.of(bench.case.topology)
    parts = min(deal.rows, deal.dp * deal.microbatches * case.topology.cp) if case.precision != "fp32" else 1
    key = ("trained", case.slug, case.precision, deal.rows, parts)

    def ask() -> tuple[list[Lesson], Reference, Path]:
        batches = lessons(subject.config, subject.folder, rows=deal.rows, prose=subject.weights != "seeded")
        file = bench.shared.folder / f"gradients-{case.slug}-{case.precision}-{deal.rows}-{parts}.safetensors"
        told = (subject.folder, batches, RECIPE, file, case.precision, parts)
        said = bench.alone("observation.hf_training:reference", *told)
        return batches, said, file

    found: tuple[list[Lesson], Reference, Path] = bench.shared.once(key, ask)
    return found


@explained
def steps(bench: Bench) -> Iterator[Finding]:
    """Gradients of every tensor, then five optimizer steps, each on its own batch (see `parity.observation.training`).

    Under data parallelism the steps are taken a second time, with the optimizer distributed over the ranks (ZeRO-1).

    """
    case = bench.case
    batches, said, file = asked(bench)
    if not np.isfinite([said.norm, said.norm_floor, *said.scales.values()]).all():
        unproved = [f"transformers itself has losses or gradients that are no numbers for {bench.subject.folder}"]
        yield Measurement.proved("reference", count=1, unit="references", unproved=unproved)
        return
    found = _trained(bench, batches, file)
    yield from _gradients(said, found, case)
    yield from _losses(said, found, batches, case)
    if case.topology.dp > 1:
        distributed = _trained(bench, batches, None)
        yield _norm(said, distributed, case, ", distributed optimizer")
        curve = _curve(said, distributed, batches, case)
        yield _worst(f"loss curve, {len(batches)} steps, distributed optimizer", curve, case, distributed.optimizer)


def _trained(bench: Bench, batches: Sequence[Lesson], file: Path | None) -> Trained:
    arguments = (bench.subject.folder, bench.settings, batches, RECIPE, file)
    everyones = bench.ranks("observation.training:train", bench.converter, *arguments)
    (found,) = [one for one in everyones if one is not None]
    trained: Trained = found
    return trained


def _bound(case: Case, floor: float, scale: float) -> float:
    """What a difference may be where transformers' own evaluations differ by `floor`."""
    if case.precision == "fp32":
        return allowed(floor, scale, case.max_floors)
    return nearness(floor, max(case.topology.tp, case.topology.cp), case.max_floors)


def _gradients(said: Reference, found: Trained, case: Case) -> Iterator[Finding]:
    compared = found.gradients
    assert compared is not None, "the file of expected gradients was passed"
    gates = [
        Gate(
            name=f"{one.key} {list(one.where)}",
            off=one.distance,
            bound=_bound(case, said.floors[one.key], said.scales[one.key]),
            floor=said.floors[one.key],
            scale=said.scales[one.key],
        )
        for one in compared.tensors
    ]
    detail = f"{len(gates)} tensors; frozen: {', '.join(found.frozen) or 'none'}"
    unit = "max |Δ|" if case.precision == "fp32" else "rms from fp32"
    yield _worst("gradients", gates, case, detail, unit)
    count, differing = compared.replicas
    if count:
        yield Measurement.equal("gradients, replicas", count=count, unit="copies of gradients", differing=differing)
    count, nonzero = compared.constants
    if count:
        yield Measurement.proved("gradients, padding", count=count, unit="added elements", unproved=nonzero)
    yield _by_layer([one.key for one in compared.tensors], gates, unit)


def _losses(said: Reference, found: Trained, batches: Sequence[Lesson], case: Case) -> Iterator[Finding]:
    size = len(batches[0].tokens) // len(found.rows)
    parts = [(0, slice(at, at + size)) for at in range(0, len(batches[0].tokens), size)]
    rows = _means("micro-batch", said, found.rows, batches, parts, case)
    yield _worst("training loss", rows, case, "each micro-batch of the first step")
    yield _norm(said, found, case)
    curve = _curve(said, found, batches, case)
    yield _worst(f"loss curve, {len(batches)} steps", curve, case, f"{found.optimizer}, {RECIPE}")
    yield Lines(
        title="Loss, one batch a step",
        x="step",
        y="mean loss, nats",
        curves={"transformers": [gate.scale for gate in curve], BACKENDS[case.backend].title: found.curve},
        log=False,
    )
    yield Lines(
        title="Difference of the loss",
        x="step",
        y="|Δ| of the mean loss, nats",
        curves={
            "difference": [gate.off for gate in curve],
            "floor": [gate.floor for gate in curve],
            "gate": [gate.bound for gate in curve],
        },
    )


def _norm(said: Reference, found: Trained, case: Case, optimizer: str = "") -> Measurement:
    off, bound = abs(found.norms[0] - said.norm), _bound(case, said.norm_floor, said.norm)
    gate = Gate(name="first step", off=off, bound=bound, floor=said.norm_floor, scale=said.norm)
    return _worst(f"gradient norm{optimizer}", [gate], case, "as each side's own library computes it")


def _curve(said: Reference, found: Trained, batches: Sequence[Lesson], case: Case) -> list[Gate]:
    return _means("step", said, found.curve, batches, [(step, slice(None)) for step in range(len(batches))], case)


def _means(
    what: str,
    said: Reference,
    actual: Sequence[float],
    batches: Sequence[Lesson],
    parts: Sequence[tuple[int, slice]],
    case: Case,
) -> list[Gate]:
    """One gate for each mean loss over some rows of a step.

    The floor of a mean is the mean of the tokens' differences, without their signs: it bounds the difference of the
    means, and is not small by the luck of a cancellation. Errors accumulate along training, so it is never below that
    of an earlier step.
    """
    gates: list[Gate] = []
    floor = 0.0
    for at, (step, rows) in enumerate(parts):
        tokens = int((batches[step].labels[rows] != IGNORED).sum())
        expected = said.expected.losses[step][rows]
        there = [other for other in said.others if step < len(other.losses)]
        apart = [float(np.abs(other.losses[step][rows] - expected).sum()) / tokens for other in there]
        floor, mean = max(floor, *apart), float(expected.sum()) / tokens
        bound = _bound(case, floor, mean)
        gates.append(Gate(name=f"{what} {at}", off=abs(actual[at] - mean), bound=bound, floor=floor, scale=mean))
    return gates


def _worst(check: str, gates: Sequence[Gate], case: Case, detail: str, unit: str = "max |Δ|") -> Measurement:
    """The gate of which most is used. The others use less of theirs, whatever their size."""
    worst = max(gates, key=lambda gate: gate.ratio)
    over = [gate for gate in sorted(gates, key=lambda gate: -gate.ratio) if not gate.ratio <= 1]
    own = "floor" if case.precision == "fp32" else "transformers' own distance from its float32 oracle"
    lines = [f"{own} {worst.floor:.2e} on a scale of {worst.scale:.2e}; {detail}"]
    lines += [f"{len(over)} of {len(gates)} beyond their bound:"] if over else []
    lines += [f"  {gate.name}: {gate.off:.2e}, allowed {gate.bound:.2e}" for gate in over[:8]]
    return Measurement.within(
        check, measured=worst.off, bound=worst.bound, unit=unit, where=worst.name, detail="\n".join(lines)
    )


def _by_layer(keys: Sequence[str], gates: Sequence[Gate], unit: str) -> Lines:
    """The worst tensor of each layer: difference, floor and gate relative to the size of its gradient."""
    places: dict[str, list[Gate]] = {}
    for key, gate in zip(keys, gates, strict=True):
        number = re.search(r"layers\.(\d+)\.", key)
        places.setdefault(f"layer {number[1]}" if number else key, []).append(gate)
    worst = {place: max(held, key=lambda gate: gate.ratio) for place, held in places.items()}
    relative = [(gate.off, gate.floor, gate.bound, gate.scale or 1.0) for gate in worst.values()]
    return Lines(
        title="Gradients, the worst tensor of each layer",
        x="place",
        y=f"{unit} / size of the gradient",
        curves={
            "difference": [off / scale for off, _, _, scale in relative],
            "floor": [floor / scale for _, floor, _, scale in relative],
            "gate": [bound / scale for _, _, bound, scale in relative],
        },
        ticks=list(worst),
    )
