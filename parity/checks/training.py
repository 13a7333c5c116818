"""The imported model trains as transformers trains it: gradients of every tensor, and the losses of a few steps.

Bounds are `parity.bounds` applied tensor by tensor and step by step: ten floors, where a floor is how far evaluations
by transformers itself, equal in exact arithmetic, are from each other *there*. A gradient's floor belongs to its tensor
because noise is as unequal as gradients are: it grows with what is summed (a long sum that nearly cancels has little
size and much noise), and a gate that is as wide as the noisiest tensor needs would hide a fault in a quiet one. A
floor that is smaller than one rounding step of the tensor's largest element counts as that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from parity.bounds import allowed
from parity.checks.bench import Bench, NotApplicable
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
    deal, subject = Deal.of(bench.case.topology), bench.subject
    key = ("trained", bench.case.slug, deal.rows)

    def ask() -> tuple[list[Lesson], Reference, Path]:
        batches = lessons(subject.config, subject.folder, rows=deal.rows, prose=subject.weights != "seeded")
        file = bench.shared.folder / f"gradients-{bench.case.slug}-{deal.rows}.safetensors"
        said = bench.alone("observation.hf_training:reference", subject.folder, batches, RECIPE, file)
        return batches, said, file

    found: tuple[list[Lesson], Reference, Path] = bench.shared.once(key, ask)
    return found


def steps(bench: Bench) -> Iterator[Finding]:
    """Gradients of every tensor, then five optimizer steps, each on its own batch (see `parity.observation.training`).

    Raises:
        NotApplicable: In another precision than fp32.
    """
    case = bench.case
    if case.precision != "fp32":
        raise NotApplicable(
            f"training is compared in fp32 only, {case.id} is {case.precision}: no bound is derived yet"
        )
    batches, said, file = asked(bench)
    if not np.isfinite([*said.eager.norms, *said.scales.values()]).all():
        unproved = [f"transformers itself has losses or gradients that are no numbers for {bench.subject.folder}"]
        yield Measurement.proved("reference", count=1, unit="references", unproved=unproved)
        return
    arguments = (bench.subject.folder, bench.settings, batches, RECIPE, file)
    (found,) = [
        one for one in bench.ranks("observation.training:train", bench.converter, *arguments) if one is not None
    ]
    yield from _gradients(said, found, case.max_floors)
    yield from _losses(said, found, batches, case.max_floors)


def _gradients(said: Reference, found: Trained, floors: float) -> Iterator[Finding]:
    gates = [
        Gate(
            name=f"{one.key} {list(one.where)}",
            off=one.distance,
            bound=allowed(said.floors[one.key], said.scales[one.key], floors),
            floor=said.floors[one.key],
            scale=said.scales[one.key],
        )
        for one in found.gradients
    ]
    yield _worst("gradients", gates, f"{len(gates)} tensors; frozen: {', '.join(found.frozen) or 'none'}")
    count, differing = found.replicas
    if count:
        yield Measurement.equal("gradients, replicas", count=count, unit="copies of gradients", differing=differing)
    count, nonzero = found.constants
    if count:
        yield Measurement.proved("gradients, padding", count=count, unit="added elements", unproved=nonzero)
    yield _by_layer([one.key for one in found.gradients], gates)


def _losses(said: Reference, found: Trained, batches: Sequence[Lesson], floors: float) -> Iterator[Finding]:
    size = len(batches[0].tokens) // len(found.rows)
    parts = [(0, slice(at, at + size)) for at in range(0, len(batches[0].tokens), size)]
    rows = _means("micro-batch", said, found.rows, batches, parts, floors)
    yield _worst("training loss", rows, "each micro-batch of the first step")
    bound = allowed(said.norm_floor, said.eager.norms[0], floors)
    norm = Gate(
        name="first step",
        off=abs(found.norms[0] - said.eager.norms[0]),
        bound=bound,
        floor=said.norm_floor,
        scale=said.eager.norms[0],
    )
    yield _worst("gradient norm", [norm], "as each side's own library computes it")
    steps = [(step, slice(None)) for step in range(len(batches))]
    curve = _means("step", said, found.curve, batches, steps, floors)
    yield _worst(f"loss curve, {len(batches)} steps", curve, f"{found.optimizer}, {RECIPE}")
    yield Lines(
        title="Loss, one batch a step",
        x="step",
        y="mean loss, nats",
        curves={"transformers": [gate.scale for gate in curve], "Megatron-Core": found.curve},
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


def _means(
    what: str,
    said: Reference,
    actual: Sequence[float],
    batches: Sequence[Lesson],
    parts: Sequence[tuple[int, slice]],
    floors: float,
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
        expected = said.eager.losses[step][rows]
        there = [other for other in said.others if step < len(other.losses)]
        apart = [float(np.abs(other.losses[step][rows] - expected).sum()) / tokens for other in there]
        floor, mean = max(floor, *apart), float(expected.sum()) / tokens
        bound = allowed(floor, mean, floors)
        gates.append(Gate(name=f"{what} {at}", off=abs(actual[at] - mean), bound=bound, floor=floor, scale=mean))
    return gates


def _worst(check: str, gates: Sequence[Gate], detail: str) -> Measurement:
    """The gate of which most is used. The others use less of theirs, whatever their size."""
    worst = max(gates, key=lambda gate: gate.ratio)
    over = [gate for gate in sorted(gates, key=lambda gate: -gate.ratio) if not gate.ratio <= 1]
    lines = [f"floor {worst.floor:.2e} on a scale of {worst.scale:.2e}; {detail}"]
    lines += [f"{len(over)} of {len(gates)} beyond their bound:"] if over else []
    lines += [f"  {gate.name}: {gate.off:.2e}, allowed {gate.bound:.2e}" for gate in over[:8]]
    return Measurement.within(
        check, measured=worst.off, bound=worst.bound, unit="max |Δ|", where=worst.name, detail="\n".join(lines)
    )


def _by_layer(keys: Sequence[str], gates: Sequence[Gate]) -> Lines:
    """The worst tensor of each layer: difference, floor and gate relative to its largest gradient."""
    places: dict[str, list[Gate]] = {}
    for key, gate in zip(keys, gates, strict=True):
        number = re.search(r"layers\.(\d+)\.", key)
        places.setdefault(f"layer {number[1]}" if number else key, []).append(gate)
    worst = {place: max(held, key=lambda gate: gate.ratio) for place, held in places.items()}
    relative = [(gate.off, gate.floor, gate.bound, gate.scale or 1.0) for gate in worst.values()]
    return Lines(
        title="Gradients, the worst tensor of each layer",
        x="place",
        y="max |Δ| / max |gradient|",
        curves={
            "difference": [off / scale for off, _, _, scale in relative],
            "floor": [floor / scale for _, floor, _, scale in relative],
            "gate": [bound / scale for _, _, bound, scale in relative],
        },
        ticks=list(worst),
    )
