"""Whether the checks have teeth: each fault of the catalogue injected, and what each check makes of it."""

from __future__ import annotations

import fnmatch
import importlib
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from parity.case import Case
from parity.causes import Cause
from parity.checks.bench import Shared
from parity.converter import Converter, Named
from parity.faults.catalogue import At, Fault, all_faults
from parity.faults.inject import Faulty
from parity.findings import Measurement
from parity.rank_failure import RankFailure
from parity.selftest.batch import Pending, Question, ReplayBench, answered, said_by
from parity.selftest.models import Bed, Stock, packaged

if TYPE_CHECKING:
    from parity.subjects import Subject

Verdict = Literal["caught", "refused", "crashed", "hung", "passed", "not applicable", "broken"]
KILLS = ("caught", "refused", "crashed", "hung")
TIMEOUT, HANG = 120.0, 8.0  # seconds without an answer that a rank may take; where it is known to hang
BATCH = 48


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check of the suite, as the self-test calls it.

    Args:
        name: For people.
        function: `module:function` under `parity.checks`.
        reads: The directions that it goes: `import`, `export`.
        dear: It takes seconds, and so runs for faults that name it alone, unless all is asked for.
        asks: The check that asks ranks the same, if there is one: they are asked once.
    """

    name: str
    function: str
    reads: tuple[str, ...]
    dear: bool = False
    asks: str = ""

    def load(self) -> Callable[..., Iterable[Any]]:
        """The check."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(f"parity.checks.{module}"), name)  # type: ignore[no-any-return]


CHECKS: tuple[Check, ...] = (
    Check(name="import", function="weights:imported", reads=("import",)),
    Check(name="config", function="weights:config_in_the_model", reads=("import",), asks="import"),
    Check(name="export", function="weights:exported", reads=("export",)),
    Check(name="round trip", function="weights:round_trip", reads=("import", "export")),
    Check(name="logits", function="forward:logits_and_loss", reads=("import",)),
    Check(name="blocks", function="activations:every_block", reads=("import",), dear=True),
    Check(name="decoding", function="decoding:with_cache", reads=("import",), dear=True),
    Check(name="training", function="training:steps", reads=("import",), dear=True),
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A fault at one place, in some layers, on one bed; without a fault, a clean run."""

    fault: Fault | None
    at: At = "import"
    layers: tuple[int, ...] = ()
    bed: Bed
    seed: int = 0

    @property
    def id(self) -> str:
        """For people and reports."""
        name = "clean" if self.fault is None else f"{self.fault.name} [{self.at}{', one layer' * bool(self.layers)}]"
        return f"{name} {self.bed}" + f" seed {self.seed}" * bool(self.seed)


@dataclass(kw_only=True)
class Outcome:
    """What the checks made of a variant.

    Attributes:
        verdicts: By check.
        causes: What they named, by check, most telling first.
        seconds: Of ranks, its part of a batch.
    """

    variant: Variant
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    causes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)

    @property
    def killed(self) -> bool:
        """Whether some check saw it."""
        return any(verdict in KILLS for verdict in self.verdicts.values())

    @property
    def applicable(self) -> bool:
        """Whether any check had a say."""
        return any(verdict != "not applicable" for verdict in self.verdicts.values())

    @property
    def named(self) -> bool | None:
        """Whether a check names an expected cause among its first; `None` where no check names any."""
        fault = self.variant.fault
        if fault is None or not fault.causes or not any(self.causes.values()):
            return None
        first = [cause for causes in self.causes.values() for cause in causes[:2]]
        return any(Cause.from_json(cause).names(expected) for expected in fault.causes for cause in first)


@dataclass(kw_only=True)
class _Job:
    """One check to be run on a variant, or on all variants that are the same to it."""

    check: Check
    variants: list[Variant]
    bench: ReplayBench
    alone: bool
    verdict: Verdict | None = None
    causes: list[dict[str, Any]] = field(default_factory=list)
    said: str = ""

    def step(self) -> Question | None:
        """Run the check from its beginning: its next question, or nothing when it is done."""
        self.bench.at[0] = 0
        from parity.checks.bench import NotApplicable

        try:
            found = [one for one in self.check.load()(self.bench) if isinstance(one, Measurement)]
        except Pending as pending:
            return pending.question
        except NotApplicable as reason:
            self.verdict, self.said = "not applicable", str(reason)
        except RankFailure as failure:
            self._failed(failure)
        except Exception as error:  # a check that breaks fails its test as well
            self.verdict, self.said = "crashed", f"{type(error).__name__}: {error}"
        else:
            failed = [one for one in found if not one.passed]
            self.verdict = "caught" if failed else "passed"
            self.said = "\n".join(one.verdict for one in failed)
            self.causes = [cause for one in failed for cause in one.causes]
            for answer in self.bench.answers:
                if failed and isinstance(answer, RankFailure):  # which the check has made a finding of
                    self._failed(answer)
        return None

    def _failed(self, failure: RankFailure) -> None:
        kind = said_by(failure)
        self.verdict, self.said = "not applicable" if kind == "not here" else kind, str(failure)


def variants(names: str = "*", *, stock: Stock, seeds: int = 1, full: bool = False) -> list[Variant]:
    """Every variant of the faults that match the glob `names`, then the clean runs.

    Args:
        names: A glob on names of faults; `FAMILY:*` is a family.
        stock: The models and layouts.
        seeds: Clean runs: on each bed in turn, then with other weights.
        full: Every fault on every bed where it shows, not on the first alone.
    """
    out: list[Variant] = []
    for fault in selected(names):
        fits = [bed for bed in stock.beds if fault.applies(stock.configs[bed.model], bed.topology)]
        if not fault.equivalent:
            fits = [bed for bed in fits if bed.model != "half"] or fits
        for bed in fits if full else fits[:1]:
            for at in fault.at:
                out.append(Variant(fault=fault, at=at, bed=bed))
                if fault.layered:
                    middle = stock.configs[bed.model]["num_hidden_layers"] // 2
                    out.append(Variant(fault=fault, at=at, bed=bed, layers=(middle,)))
    beds = stock.beds
    out += [Variant(fault=None, bed=beds[n % len(beds)], seed=n // len(beds)) for n in range(seeds)]
    return out


def selected(names: str) -> list[Fault]:
    """The faults whose name, or family and name joined by a colon, the glob matches."""
    return [
        fault
        for fault in all_faults()
        if fnmatch.fnmatchcase(fault.name, names) or fnmatch.fnmatchcase(f"{fault.family}:{fault.name}", names)
    ]


class SelfTest:
    """Runs variants.

    Args:
        shared: Ranks, and what is made once.
        stock: The models.
        converter: The converter whose honest work is made wrong.
        checks: The checks under test; all by default.
        full: Run dear checks for every fault.
    """

    def __init__(
        self,
        shared: Shared,
        *,
        stock: Stock | None = None,
        converter: Converter | None = None,
        checks: Sequence[Check] | None = None,
        full: bool = False,
    ) -> None:
        self.shared = shared
        self.stock = stock or packaged()
        self.converter = converter or Named()
        self.checks = CHECKS if checks is None else checks
        self.full = full
        self._subjects: dict[tuple[str, int], Subject] = {}
        self._scratch = Path(tempfile.mkdtemp(prefix="faults-", dir=shared.folder))

    def run(
        self, asked: Sequence[Variant], progress: Callable[[int, int], None] = lambda done, of: None
    ) -> list[Outcome]:
        """What each check makes of each variant."""
        jobs = self._jobs(asked)
        waiting = list(jobs)
        while waiting:
            asked_now: dict[bytes, tuple[Question, list[_Job]]] = {}
            for job in waiting:
                if (question := job.step()) is not None:
                    same = (job.bench.case.topology, question)
                    asked_now.setdefault(pickle.dumps(same), (question, []))[1].append(job)
            waiting = [job for _, askers in asked_now.values() for job in askers]
            done = len(jobs) - len(waiting)
            progress(done, len(jobs))
            for batch in _batches(asked_now.values()):
                self._answer(batch)
                done += sum(len(askers) for _, askers in batch) // 2
                progress(min(done, len(jobs)), len(jobs))
        outcomes = {id(variant): Outcome(variant=variant) for variant in asked}
        for job in jobs:
            assert job.verdict is not None
            for variant in job.variants:
                outcome = outcomes[id(variant)]
                outcome.verdicts[job.check.name] = job.verdict
                outcome.causes[job.check.name] = job.causes
                outcome.said[job.check.name] = job.said
        return list(outcomes.values())

    def _answer(self, batch: Sequence[_Asked]) -> None:
        folder = Path(tempfile.mkdtemp(prefix="batch-", dir=self._scratch))
        job = batch[0][1][0]
        hangs = job.variants[0].fault is not None and job.variants[0].fault.name == "ranks: a rank hangs"
        found = answered(
            self.shared.zygote,
            [question for question, _ in batch],
            job.variants[0].bed.topology,
            folder,
            timeout=HANG if hangs else TIMEOUT,
        )
        for (_, askers), answer in zip(batch, found, strict=True):
            for asker in askers:
                asker.bench.answers.append(answer)
                shutil.rmtree(asker.bench.folder, ignore_errors=True)
        shutil.rmtree(folder)

    def _jobs(self, asked: Sequence[Variant]) -> list[_Job]:
        """One for each thing that a check would do: variants that a check cannot tell apart share it."""
        jobs: dict[object, _Job] = {}
        folders: dict[object, int] = {}
        for variant in asked:
            fault = variant.fault
            there, back = ((), ()) if fault is None else fault.mutations(variant.at)
            for check in self.checks:
                wanted = fault is None or self.full or check.name in fault.checks
                if not wanted and (check.dear or (fault is not None and fault.runs)):
                    continue
                if fault is not None and fault.equivalent and check.name not in fault.checks:
                    continue
                if variant.layers and check.name == "logits" and not self.full:
                    continue
                wrong = (there if "import" in check.reads else (), back if "export" in check.reads else ())
                if fault is not None and not any(wrong):
                    continue
                key = (check.name, variant.bed, variant.seed, *wrong, variant.layers)
                if key not in jobs:
                    number = folders.setdefault((check.asks or check.name, *key[1:]), len(folders))
                    bench = self._bench(variant, *wrong, number=number)
                    jobs[key] = _Job(check=check, variants=[], bench=bench, alone=fault is not None and fault.runs)
                jobs[key].variants.append(variant)
        return list(jobs.values())

    def _bench(self, variant: Variant, there: Any, back: Any, *, number: int) -> ReplayBench:
        bed, subject = variant.bed, self._subject(variant.bed.model, variant.seed)
        case = Case(
            model=bed.model,
            slug=subject.slug,
            topology=bed.topology.evenly(subject.config["num_hidden_layers"]),
            precision="bf16"
            if "bfloat16" in (subject.config.get("torch_dtype"), subject.config.get("dtype"))
            else "fp32",
            device="cpu",
        )
        converter = self.converter
        if there or back:
            converter = Faulty(
                inner=converter,
                on_import=there,
                on_export=back,
                topology=case.topology,
                layers=variant.layers,
                scratch=self._scratch,
            )
        return ReplayBench(
            case=case, subject=subject, shared=self.shared, converter=converter, folder=self._scratch / str(number)
        )

    def _subject(self, model: str, seed: int) -> Subject:
        if (model, seed) not in self._subjects:
            folder = Path(tempfile.mkdtemp(prefix=f"{model}-", dir=self.shared.folder))
            self._subjects[model, seed] = self.stock.make(model, folder, seed)
        return self._subjects[model, seed]


_Asked = tuple[Question, list[_Job]]
"""A question, and the checks that ask it."""


def _batches(questions: Iterable[_Asked]) -> Iterator[list[_Asked]]:
    """Questions that one set of ranks can answer; a fault of a process has its own."""
    together: dict[object, list[_Asked]] = {}
    for question, askers in questions:
        job = askers[0]
        topology = job.bench.case.topology
        key = (topology, job.variants[0].fault, job.variants[0].at) if job.alone else (topology,)
        together.setdefault(key, []).append((question, askers))
    for group in together.values():
        for at in range(0, len(group), BATCH):
            yield group[at : at + BATCH]
