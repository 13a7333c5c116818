"""What the model says today is what it said when its golden values were made: transformers, and the imported model.

Both are held to the golden, so that a failure says who moved: with transformers beyond its bound it is the library, the
weights or the golden; with transformers within and the imported model beyond, it is the converter or Megatron-Core.
"""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity.backends import BACKENDS
from parity.bounds import FLOORS
from parity.cache import digest_of
from parity.case import Case
from parity.checks.bench import Bench
from parity.findings import Finding, Lines, Measurement
from parity.golden.file import (
    FORMAT,
    NAME,
    PENDING,
    Golden,
    GoldenError,
    digest_of_probe,
    leave_pending,
    read,
    spelled,
    strays,
    write,
)
from parity.golden.values import FROM_LOGITS, Compared, asked, compare, compare_all, from_logits, noise, unmatched
from parity.probes import Probe

if TYPE_CHECKING:
    from parity.golden.model import Evaluation

DEFAULT = Path("golden")


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """Where goldens are, and what is to be done with them.

    Args:
        folder: One folder a model in it.
        given: As it was asked for; then every model must have a golden. `None` for the default folder, which holds only
            the models that it has.
        regenerate: Write them anew.
    """

    folder: Path
    given: Path | None = None
    regenerate: bool = False

    @classmethod
    def of(cls, start: Path, given: Path | None, regenerate: bool) -> Shelf:
        """The shelf `given` on the command line, or the default, as seen from the folder that pytest was started in."""
        return cls(folder=start / (given or DEFAULT), given=given, regenerate=regenerate)

    def skips(self, case: Case) -> str:
        """Why there is nothing to check, or an empty string."""
        if case.precision != "fp32":
            return f"golden values are float32, this case is {case.precision}"
        if self.regenerate or self.given is not None or (self.folder / case.slug).is_dir():
            return ""
        return f"no golden for {case.slug}: make one with {self.command(case)}"

    def command(self, case: Case) -> str:
        """What makes the golden of a case's model, for a shell."""
        words = ["pytest", "--model", case.model]
        words += ["--revision", case.revision] if case.revision else []
        words += ["--size", case.size] if case.size != "full" else []
        words += ["--weights", case.weights] if (case.weights, case.size) == ("seeded", "full") else []
        words += ["--layers", str(case.layers)] if case.layers else []
        words += ["--golden", str(self.given)] if self.given is not None else []
        return shlex.join([*words, "--regen-golden", "-k", "golden"])


def against(shelf: Shelf) -> Callable[[Bench], Iterator[Finding]]:
    """The check that holds a bench to the goldens of `shelf`."""
    return lambda bench: _held(bench, shelf)


def _held(bench: Bench, shelf: Shelf) -> Iterator[Finding]:
    case, home = bench.case, shelf.folder / bench.case.slug
    try:
        if shelf.regenerate:
            bench.shared.once(("golden, written", case.slug), lambda: _write(bench, shelf))
        if not (home / NAME).is_file():
            raise GoldenError(f"{home / NAME} is missing: make it with\n  {shelf.command(case)}")
        golden = read(home / NAME)
    except GoldenError as error:
        yield Measurement.proved("golden, file", count=1, unit="files", unproved=[str(error)])
        return
    now = _evaluated(bench, golden.probe, golden.places)
    moved = differences(golden, bench.subject.config, now)
    unmet = unmatched(golden.quantities, now.quantities)
    unmet += [f"{name}: unused: no check reads this file" for name in strays(home) if name != PENDING]
    found = compare_all(golden.quantities, now.quantities, case.max_floors)
    candidate = _candidate(bench, golden, now)
    worst = noise(golden.quantities, now.quantities)
    coarser = worst.unmet if worst is not None else []
    if moved or unmet or coarser or not all(one.passed for one in found):
        unmet.append(_left_pending(bench, shelf, golden, now))
    yield Measurement.proved(
        "golden, file", count=len(golden.quantities), unit="quantities and their origin", unproved=[*moved, *unmet]
    )
    if worst is not None:
        yield Measurement.within(
            "golden, noise floors",
            measured=worst.growth,
            bound=FLOORS,
            unit="times the floor of the golden",
            where=worst.name,
            detail="\n".join(coarser),
        )
    for whose, compared in (("transformers", found), (case.backend, candidate)):
        for one in compared:
            yield Measurement.within(
                f"golden, {one.name}" + f", {case.backend}" * (whose == case.backend),
                measured=one.distance,
                bound=one.bound,
                unit="of the largest in its group",
                where=one.where,
                detail=f"golden {one.then!r}, now {one.now!r}\n"
                + _who_moved(whose, moved, found, golden, now, home, BACKENDS[case.backend].title),
            )
    ratios = {one.name: one.ratio for one in candidate}
    yield Lines(
        title=f"drift from the golden values of {case.slug}",
        x="quantity",
        y="difference / bound",
        curves={
            "transformers": [one.ratio for one in found],
            case.backend: [ratios.get(one.name, float("nan")) for one in found],
        },
        marks={"gate": 1.0},
        ticks=[one.name for one in found],
    )


def differences(golden: Golden, config: Mapping[str, Any], now: Evaluation) -> list[str]:
    """What the golden was made from that is another thing now, a line each."""
    facts = {
        "weights": (golden.header["weights_digest"], now.digests["weights"]),
        "config.json": (golden.header["config_digest"], digest_of(config)),
        "probe": (golden.header["probe_digest"], digest_of_probe(golden.probe)),
    }
    return [
        f"{name}: not what the golden was made from: its digest was {then[:12]} and is {this[:12]}"
        for name, (then, this) in facts.items()
        if then != this
    ]


def _evaluated(bench: Bench, probe: Probe, places: Any = None) -> Evaluation:
    """What transformers says today; asked once a model."""
    key = ("golden, evaluated", bench.case.slug, digest_of_probe(probe))
    found: Evaluation = bench.shared.once(
        key, lambda: bench.alone("golden.model:evaluate", bench.subject.folder, probe, places)
    )
    return found


def _candidate(bench: Bench, golden: Golden, now: Evaluation) -> list[Compared]:
    """The imported model beside the golden, in what any backend can be asked for."""
    case = bench.case
    found = bench.ranks(
        "observation.forward:forward", bench.converter, bench.subject.folder, bench.settings, [golden.probe]
    )
    ((answer,),) = [one for one in found if one is not None]
    values = from_logits(answer.logits, answer.loss, golden.places)
    return [
        compare(name, golden.quantities[name], values[name], now.quantities[name].floor, case.max_floors)
        for name in FROM_LOGITS
        if name in golden.quantities
    ]


def _who_moved(
    whose: str, moved: list[str], found: list[Compared], golden: Golden, now: Evaluation, home: Path, title: str
) -> str:
    """Whose difference this is, and what to do."""
    drifted = moved or not all(one.passed for one in found)
    look = f"look: parity golden diff {home.name}; accept, if it is right: parity golden accept {home.name}"
    if whose != "transformers":
        if drifted:
            return "transformers is beyond its bounds too: settle that first"
        return f"transformers still says what the golden says: the converter moved, or {title} did"
    if moved:
        return f"other weights, or another config, than the golden was made from\n{look}"
    return (
        "transformers itself moved, on the same weights: a library, or this machine\n"
        f"then: {golden.versions}\nnow:  {spelled(now.versions)}\n{look}"
    )


def _write(bench: Bench, shelf: Shelf) -> Path:
    probe = asked(bench.subject.config, bench.subject.folder, prose=bench.subject.weights != "seeded")
    return write(shelf.folder / bench.case.slug, _made(bench, shelf, probe, _evaluated(bench, probe)))


def _left_pending(bench: Bench, shelf: Shelf, golden: Golden, now: Evaluation) -> str:
    """Leave what was found beside the golden; a line that says so."""
    slug = bench.case.slug
    try:
        pending = leave_pending(shelf.folder / slug, _made(bench, shelf, golden.probe, now))
    except (GoldenError, OSError) as error:
        return f"{PENDING}: not left: {error}"
    return (
        f"{pending} holds what was found; look: parity golden diff {slug}; accept, if it is right: "
        f"parity golden accept {slug}"
    )


def _made(bench: Bench, shelf: Shelf, probe: Probe, now: Evaluation) -> Golden:
    """A golden of what was found, with where it comes from."""
    case, subject = bench.case, bench.subject
    header = {
        "format": FORMAT,
        "model": case.model,
        "options": {"revision": case.revision, "size": case.size, "weights": case.weights, "layers": case.layers},
        "revision": subject.revision,
        "weights": subject.weights,
        "weights_digest": now.digests["weights"],
        "config_digest": digest_of(subject.config),
        "probe_digest": digest_of_probe(probe),
        "logits_digest": now.digests["logits"],
        "computed": "transformers, eager attention, float32, cpu, one thread",
        "versions": now.versions,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "regenerate": shelf.command(case),
    }
    return Golden(header=header, probe=probe, places=now.places, quantities=now.quantities)
