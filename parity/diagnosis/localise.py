"""Why a forward fails: the first block and sub-module that is wrong, and whether weights, config or computation is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from parity.causes import Cause
from parity.checks.bench import Bench
from parity.findings import Finding, Measurement
from parity.probes import Probe, probes
from parity.rank_failure import RankFailure

if TYPE_CHECKING:
    from parity.diagnosis.exchange import Verdict

ELSEWHERE = (
    ("decod", "cache"),
    ("generat", "cache"),
    ("beam", "cache"),
    ("gradient", "gradients"),
    ("loss curve", "gradients"),
)
"""Words in the name of a check that no forward of a whole sequence explains, and the sub-module that it is about."""


@dataclass(frozen=True, kw_only=True)
class Localised:
    """What is to blame.

    Args:
        causes: What explains the failure, most telling first.
        text: The same for people, one line each.
    """

    causes: tuple[Cause, ...] = ()
    text: str = ""


Check = Callable[[Bench], Iterator[Finding]]


def explained(check: Check) -> Check:
    """`check`, whose first failing measurement says why it and those after it fail."""

    @functools.wraps(check)
    def run(bench: Bench) -> Iterator[Finding]:
        held: list[Finding] = []
        for finding in check(bench):
            if held or (isinstance(finding, Measurement) and not finding.passed):
                held.append(finding)
            else:
                yield finding
        if held:
            first, *others = held
            assert isinstance(first, Measurement)
            found = localise(bench, [one for one in held if isinstance(one, Measurement)])
            detail = "\n".join(line for line in (found.text, first.detail) if line)
            yield replace(first, detail=detail, causes=(*(cause.as_json() for cause in found.causes), *first.causes))
            yield from others

    return run


def localise(bench: Bench, failed: Iterable[Measurement]) -> Localised:
    """Say what is to blame for failing measurements of one case.

    A plain forward that fails is run once more in the case's ranks, recorded, and compared with transformers that is
    given parts of the Megatron model (see `exchange`). What fails only where sequences are packed or padded,
    positions jump, tokens come one by one, or gradients are taken, is that.
    """
    names = [one.check for one in failed if not one.passed]
    if itself := [name for name in names if name.startswith(("reference", "transformers"))]:
        text = f"transformers does not agree with itself ({', '.join(itself)})"
        return Localised(causes=(Cause(kind="reference", detail=text),), text=text)
    elsewhere = {name: part for name in names for word, part in ELSEWHERE if word in name}
    asked = probes(bench.subject.config, bench.subject.folder, prose=bench.subject.weights != "seeded")
    wrong = [name for name in names if name not in elsewhere]
    plain = [probe for probe in asked if probe.segments is None and any(_about(name, probe, asked) for name in wrong)]
    segmented = [probe for probe in asked if probe.segments is not None and any(probe.name in name for name in wrong)]
    if plain:
        return _of_forward(bench, plain[0], alone=plain[0] is not asked[0], loss=all("loss" in name for name in wrong))
    if segmented:
        named = ", ".join(probe.name for probe in segmented)
        text = f"only sequences behind padding or beside others are wrong ({named}): what a token sees is not masked"
        return _computation("mask", text)
    for name, part in elsewhere.items():
        return _computation(part, f"the forward of whole sequences is right, and {name} is not")
    return Localised()


def _about(name: str, probe: Probe, asked: Sequence[Probe]) -> bool:
    """Whether a check is about this probe: it names it, or it names none and this is the first."""
    return probe.name in name or (probe is asked[0] and not any(other.name in name for other in asked))


def _of_forward(bench: Bench, probe: Probe, *, alone: bool, loss: bool) -> Localised:
    try:
        with bench.scratch() as scratch:
            verdict = _verdict(bench, probe, Path(scratch) / "pulled back")
    except RankFailure as failure:
        return Localised(text=f"the forward could not be run again to say why: {str(failure).splitlines()[0]}")
    lines = "\n".join(verdict.lines)
    if verdict.first is None and loss:
        return _computation("loss", f"logits and all activations agree, and the loss does not\n{lines}")
    causes = verdict.causes
    if alone and probe.name.startswith("positions") and causes and all(cause.kind == "computation" for cause in causes):
        # Where positions count up from 0, the same sub-module is right.
        causes = (Cause(kind="computation", what=("positions",), where=causes[0].where, detail=causes[0].detail),)
    return Localised(causes=causes, text=lines)


def _verdict(bench: Bench, probe: Probe, scratch: Path) -> Verdict:
    from parity.diagnosis.exchange import Failing

    case = bench.case
    scratch.mkdir(exist_ok=True)
    held = bench.ranks("diagnosis.held:observed", bench.converter, bench.subject.folder, bench.settings, probe, scratch)
    failing = Failing(
        folder=bench.subject.folder,
        probe=probe,
        precision=case.precision,
        topology=case.topology,
        floors=case.max_floors,
    )
    found: Verdict = bench.alone("diagnosis.exchange:judge", failing, held, scratch)
    return found


def _computation(part: str, text: str) -> Localised:
    cause = Cause(kind="computation", what=(part,), detail=text.splitlines()[0])
    return Localised(causes=(cause,), text=text)
