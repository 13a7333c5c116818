"""The imported model computes what transformers computes: every token of every probe."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from converters.topology import Topology
from parity.bounds import Distance, Floats, Spread, allowed, largest, nearness, rms, share_held, worst
from parity.case import Case
from parity.checks.bench import Bench
from parity.devices import device_of
from parity.diagnosis.localise import explained
from parity.findings import Finding, Lines, Measurement
from parity.probes import Probe, probes

if TYPE_CHECKING:
    from parity.observation.forward import Reference
    from parity.observation.observe import Observation

    Asked = tuple[tuple[Probe, ...], list[Reference]]

LOOK = (
    "weights alone are checked bit for bit by 'import, coded': if that passes, look at the config ledger (rope, eps, "
    "head_dim, activation) before the tensors"
)


def asked(bench: Bench, rounded: str | None = None) -> Asked:
    """The probes of this case's model, and what transformers says to each in the case's precision; asked once.

    Args:
        bench: The case.
        rounded: As for `parity.observation.forward.references`.
    """

    def ask() -> Asked:
        subject = bench.subject
        found = probes(subject.config, subject.folder, prose=subject.weights != "seeded")
        arguments = (subject.folder, found, bench.case.precision, rounded)
        return found, bench.alone("observation.forward:references", *arguments)

    found: Asked = bench.shared.once(("asked", bench.case.slug, bench.case.precision, rounded), ask)
    return found


@explained
def logits_and_loss(bench: Bench) -> Iterator[Finding]:
    """Logits and loss of every token of every probe, within bounds measured in this run (see `parity.bounds`)."""
    case = bench.case
    questions, references = asked(bench)
    if broken := [probe.name for probe, reference in zip(questions, references, strict=True) if not reference.finite]:
        yield Measurement.proved(
            "reference",
            count=len(questions),
            unit="probes",
            unproved=[
                f"transformers itself gives logits that are no numbers for {bench.subject.folder}, asked {name}: look "
                "for NaN and infinity in the checkpoint's tensors; nothing can be compared"
                for name in broken
            ],
        )
        return
    found = bench.ranks("observation.forward:forward", bench.converter, bench.subject.folder, bench.settings, questions)
    (answers,) = [one for one in found if one is not None]
    yield _numbers(questions, answers)
    if misshapen := [
        f"{probe.name}: expected logits {list(reference.expected.logits.shape)}, found {list(answer.logits.shape)}"
        for probe, reference, answer in zip(questions, references, answers, strict=True)
        if answer.logits.shape != reference.expected.logits.shape
    ]:
        yield Measurement.equal("logits, of every row", count=len(questions), unit="probes", differing=misshapen)
        return
    for probe, reference, answer in zip(questions, references, answers, strict=True):
        yield from _compared(case, probe, reference, answer)
    if references[0].unquantised is not None:
        yield quantised(case, questions[0], references[0], references[0].unquantised, answers[0])
    if exactly(case, bench.subject.config):
        actual, expected = answers[0].logits, references[0].expected.logits
        differing = int((actual != expected).sum())
        names = [f"{differing:,} logits"] if differing else []
        yield Measurement.equal("logits, to the bit", count=actual.size, unit="logits", differing=names)


def quantised(case: Case, probe: Probe, reference: Reference, unquantised: Spread, answer: Observation) -> Measurement:
    """Products are quantised at all: a model that leaves it out is nearer to the oracle than the recipe lets it be.

    Distances of two kinds of models are known, with quantised products and without. What is nearer to the second kind,
    as a ratio, is of it.
    """
    seen = probe.compared
    found = rms(answer.logits[seen], reference.expected.logits[seen]).value
    between = math.sqrt(unquantised.rms * reference.logits.rms)
    return Measurement.within(
        "logits, quantised at all",
        measured=between / found if found else math.inf,
        bound=1,
        unit="of the distance that tells",
        where=probe.name,
        detail=f"rms from fp32: {found:.2e}; of transformers in {case.precision} {reference.logits.rms:.2e}, in bf16 "
        f"{unquantised.rms:.2e}; the line is drawn at {between:.2e}",
    )


def exactly(case: Case, config: Mapping[str, Any]) -> bool:
    """Whether Megatron's own layers run the very operations of transformers' eager attention, in the same order.

    The two scale attention scores at different places, which rounds alike only where the scale, one over the root of
    head_dim, is a power of two. And the two hold tokens in another order, which a matrix product sees where its sizes
    leave a remainder for a kernel of 16 lanes.
    """
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    if any(size % 16 for size in (config["hidden_size"], config["intermediate_size"], heads * head_dim)):
        return False
    if case.backend != "megatron":
        return False
    one = case.topology.tp == case.topology.cp == case.topology.vpp == 1
    return one and case.precision == "fp32" and device_of(case) == "cpu" and math.log2(head_dim) % 2 == 0


def _numbers(questions: tuple[Probe, ...], answers: list[Observation]) -> Measurement:
    """Every answer is a number, at padding too: what is not compared could still reach what is."""
    strange = []
    for probe, answer in zip(questions, answers, strict=True):
        bad = ~np.isfinite(answer.logits)
        if bad.any():
            first = tuple(np.argwhere(bad)[0].tolist())
            strange.append(f"{probe.name}: {int(bad.sum()):,}; the first, {answer.logits[first]}, at {_words(first)}")
        if not np.isfinite(answer.loss).all():
            strange.append(f"{probe.name}: the loss of {int((~np.isfinite(answer.loss)).sum()):,} tokens")
    count = sum(answer.logits.size for answer in answers)
    return Measurement.proved("logits, all numbers", count=count, unit="logits", unproved=strange)


def _compared(case: Case, probe: Probe, reference: Reference, answer: Observation) -> Iterator[Finding]:
    """One probe: the reference itself where that could leak, then logits and loss of the model under test."""
    expected, seen, labelled = reference.expected, np.argwhere(probe.compared), np.argwhere(probe.labelled)
    question = f"probe: {probe.name}; {probe.about}"
    if reference.together is not None:
        said = "transformers asked for the whole probe, held against transformers asked for each sequence alone"
        yield from held(
            f"transformers, {probe.name}",
            reference.together.logits,
            expected.logits,
            reference.logits,
            at=seen,
            case=replace(case, topology=Topology()),
            detail=f"{said}\n{question}",
        )
    detail = f"{question}\n{LOOK}"
    logits = held(
        f"logits, {probe.name}", answer.logits, expected.logits, reference.logits, at=seen, case=case, detail=detail
    )
    yield from logits
    yield from held(
        f"loss, {probe.name}", answer.loss, expected.loss, reference.loss, at=labelled, case=case, detail=detail
    )
    yield _picture(case, probe, reference, answer, logits)


def held(
    check: str, actual: Floats, expected: Floats, spread: Spread, *, at: npt.NDArray[np.intp], case: Case, detail: str
) -> list[Measurement]:
    """Distances beside their bounds: in float32 the largest, below it those from the oracle.

    Args:
        check: What is compared.
        actual: `[b s v]` or `[b s]`.
        expected: Likewise.
        spread: Of the reference.
        at: Row and token of what is compared.
        case: Says precision, layout and floors.
        detail: Of each measurement.
    """
    mine, theirs = (array[at[:, 0], at[:, 1]] for array in (actual, expected))
    tp, floors = case.topology.tp, case.max_floors

    def measurement(name: str, distance: Distance, bound: float, unit: str, about: str, where: str) -> Measurement:
        return Measurement.within(
            name, measured=distance.value, bound=bound, unit=unit, where=where, detail=f"{about}\n{detail}"
        )

    def place(where: tuple[int, ...]) -> str:
        return _words((*at[where[0]].tolist(), *where[1:]))

    if case.precision == "fp32":
        distance = largest(mine, theirs)
        bound = allowed(spread.largest, float(np.abs(theirs).max()), floors)
        about = f"floor {spread.largest:.2e}: transformers against itself, evaluated otherwise"
        return [measurement(check, distance, bound, "max |Δ|", about, place(distance.where))]
    about = "transformers' own distance from its float32 oracle: {:.2e}"
    whole = rms(mine, theirs)
    found = [
        measurement(
            check,
            whole,
            nearness(spread.rms, tp, floors),
            "rms from fp32",
            about.format(spread.rms),
            place(whole.where),
        )
    ]
    if mine.ndim == 2:
        token = worst(mine, theirs, axis=1, share=share_held(case.precision))
        row = worst(mine, theirs, axis=0)
        if share_held(case.precision) < 1:
            about += f"; of tokens, the worst of {share_held(case.precision):.0%}"
        for name, distance, own, where in (
            ("worst token", token, spread.token, place(token.where)),
            ("worst row", row, spread.row, f"vocabulary row {row.where[0]}"),
        ):
            bound = nearness(own, tp, floors)
            found.append(measurement(f"{check}, {name}", distance, bound, "rms from fp32", about.format(own), where))
    return found


def _picture(case: Case, probe: Probe, reference: Reference, answer: Observation, logits: list[Measurement]) -> Lines:
    """Error by token: in float32 the largest over the vocabulary, below it the root mean square."""
    exact = case.precision == "fp32"
    difference = np.abs(answer.logits - reference.expected.logits)
    by_token = difference.max(axis=2) if exact else np.sqrt(np.mean(difference**2, axis=2))
    by_token = np.where(probe.compared, by_token, np.nan)
    own, gate = (reference.logits.largest, logits[0]) if exact else (reference.logits.token, logits[1])
    return Lines(
        title=f"logits by token, {probe.name}",
        x="token",
        y="max |Δ| over the vocabulary" if exact else "rms from fp32 over the vocabulary",
        curves={f"sequence {row}": [float(value) for value in values] for row, values in enumerate(by_token)},
        marks={"floor" if exact else "transformers": own, "gate": float(gate.bound or 0)},
    )


def _words(index: tuple[int, ...]) -> str:
    names = ("sequence", "token", "vocabulary row")
    return ", ".join(f"{name} {at}" for name, at in zip(names, index, strict=False))
