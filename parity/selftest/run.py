"""Whether the checks have teeth: each fault of the catalogue injected, and what each check makes of it."""

from __future__ import annotations

import fnmatch
import importlib
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
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
    from parity.ranks import Zygote
    from parity.subjects import Subject

Verdict = Literal["caught", "refused", "crashed", "hung", "passed", "not applicable", "broken"]
KILLS = ("caught", "refused", "crashed", "hung")
TIMEOUT, HANG = 120.0, 8.0  # seconds without an answer that a rank may take; where it is known to hang
HANGS = "ranks: a rank hangs"
BATCH = 24
DIAGNOSIS = "diagnosis."  # what a question begins with that is asked to explain a failure, not to find it


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

    def plain(self) -> Callable[..., Iterable[Any]]:
        """The check without what explains its failures (see `parity.diagnosis.localise.explained`)."""
        check = self.load()
        return getattr(check, "__wrapped__", check)


CHECKS: tuple[Check, ...] = (
    Check(name="import", function="weights:imported", reads=("import",)),
    Check(name="config", function="weights:config_in_the_model", reads=("import",), asks="import"),
    Check(name="export", function="weights:exported", reads=("export",)),
    Check(name="round trip", function="weights:round_trip", reads=("import", "export")),
    Check(name="logits", function="forward:logits_and_loss", reads=("import",)),
    Check(name="blocks", function="activations:every_block", reads=("import",), dear=True),
    Check(name="decoding", function="decoding:with_cache", reads=("import",), dear=True),
    Check(name="training", function="training:steps", reads=("import",), dear=True),
    Check(name="products", function="quantisation:products", reads=("import",), dear=True),
    Check(name="state", function="quantisation:state", reads=("import",), dear=True),
    Check(name="checkpoints", function="quantisation:checkpoints", reads=("export",), dear=True),
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
    def missed(self) -> tuple[str, ...]:
        """The checks that had to see it and let it pass."""
        fault = self.variant.fault
        if fault is None or fault.equivalent:
            return ()
        return tuple(name for name in fault.must(self.variant.at) if self.verdicts.get(name) == "passed")

    @property
    def applicable(self) -> bool:
        """Whether any check had a say."""
        return any(verdict != "not applicable" for verdict in self.verdicts.values())

    @property
    def named(self) -> bool | None:
        """Whether a check names an expected cause among its first; `None` where none is expected."""
        fault = self.variant.fault
        if fault is None or not fault.causes or not self.killed:
            return None
        return any(_names(fault, causes) for causes in self.causes.values())


def _names(fault: Fault, causes: Sequence[dict[str, Any]]) -> bool:
    """Whether an expected cause is among the first of those that a check names."""
    return any(Cause.from_json(cause).names(expected) for expected in fault.causes for cause in causes[:2])


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

    def step(self, *, explained: bool = True) -> Question | None:
        """Run the check from its beginning: its next question, or nothing when it is done.

        Args:
            explained: Have it say why it fails.
        """
        self.bench.at[0] = 0
        from parity.checks.bench import NotApplicable

        check = self.check.load() if explained else self.check.plain()
        try:
            found = [one for one in check(self.bench) if isinstance(one, Measurement)]
        except Pending as pending:
            return pending.question
        except NotApplicable as reason:
            self.verdict, self.said = "not applicable", str(reason)
        except RankFailure as failure:
            self._failed(failure)
        except Exception as error:  # here, not in a rank: that is the harness, not the fault
            self.verdict, self.said = "broken", f"{type(error).__name__}: {error}"
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
        faults = [variant.fault for variant in self.variants if variant.fault is not None]
        if kind == "hung" and not any(fault.name == HANGS for fault in faults):
            kind = "broken"  # a machine that is too slow finds no faults
        self.verdict, self.said = "not applicable" if kind == "not here" else kind, str(failure)


def variants(names: str = "*", *, stock: Stock, seeds: int = 1, full: bool = False) -> list[Variant]:
    """Every variant of the faults that match the glob `names`, then the clean runs.

    Args:
        names: A glob on names of faults; `FAMILY:*` is a family.
        stock: The models and layouts.
        seeds: Clean runs: one on each bed that is used at least, then on the others, then each in another layout and
            with weights of its own.
        full: Every fault on every bed where it shows, not on the first alone.
    """
    out: list[Variant] = []
    for fault in selected(names):
        fits = [
            bed
            for bed in stock.beds
            if fault.applies(stock.configs[bed.model], bed.topology, backend=bed.backend, precision=bed.precision)
        ]
        if not fault.equivalent:
            fits = [bed for bed in fits if bed.precision != "bf16"] or fits
        # The first for each backend and precision of products: what is below decides how a fault shows.
        first = {(bed.backend, bed.precision if fault.precisions else ""): bed for bed in reversed(fits)}
        for bed in fits if full else [bed for bed in fits if bed in first.values()]:
            for at in fault.at:
                out.append(Variant(fault=fault, at=at, bed=bed))
                if fault.layered:
                    middle = stock.configs[bed.model]["num_hidden_layers"] // 2
                    out.append(Variant(fault=fault, at=at, bed=bed, layers=(middle,)))
    used = list(dict.fromkeys(variant.bed for variant in out))
    beds = list(dict.fromkeys([*used, *stock.beds, *stock.clean]))
    # What breaks on a bed is put down to a fault only where nothing breaks without one.
    seeds, shared = max(seeds, len(used)), len(stock.beds)
    out += [Variant(fault=None, bed=beds[n % len(beds)], seed=0 if n < shared else n) for n in range(seeds)]
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
        full: Run dear checks for every fault, and explain every failure.
        beside: Zygotes that answer at the same time as that of `shared`.
    """

    def __init__(
        self,
        shared: Shared,
        *,
        stock: Stock | None = None,
        converter: Converter | None = None,
        checks: Sequence[Check] | None = None,
        full: bool = False,
        beside: Sequence[Zygote] = (),
    ) -> None:
        self.shared = shared
        self.zygotes = (shared.zygote, *beside)
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
        parts = {id(variant): 0 for variant in asked}  # of each variant, the checks that are not done
        for job in jobs:
            for variant in job.variants:
                parts[id(variant)] += 1
        waiting = list(jobs)
        while waiting:
            pending = [(job, question) for job in waiting if (question := job.step()) is not None]
            if not self.full:
                pending = _unexplained(jobs, pending)
            asked_now: dict[bytes, _Asked] = {}
            for job, question in pending:
                same = (job.bench.case.topology, job.bench.case.backend, question)
                asked_now.setdefault(pickle.dumps(same), (question, []))[1].append(job)
            going = {id(job) for job, _ in pending}
            for job in waiting:
                for variant in job.variants if id(job) not in going else ():
                    parts[id(variant)] -= 1
            progress(sum(not left for left in parts.values()), len(asked))
            waiting = [job for job, _ in pending]
            # A variant has two rounds of questions, if it fails: the last of this one is the best that is known of it.
            near = dict(parts)

            def report(batch: Sequence[_Asked], near: dict[int, int] = near) -> None:
                for job in (job for _, askers in batch for job in askers):
                    for variant in job.variants:
                        near[id(variant)] -= 1
                progress(sum(not left for left in near.values()), len(asked))

            self._answer_all(list(_batches(asked_now.values())), report)
        outcomes = {id(variant): Outcome(variant=variant) for variant in asked}
        for job in jobs:
            assert job.verdict is not None
            for variant in job.variants:
                outcome = outcomes[id(variant)]
                outcome.verdicts[job.check.name] = job.verdict
                outcome.causes[job.check.name] = job.causes
                outcome.said[job.check.name] = job.said
        return list(outcomes.values())

    def _answer_all(self, batches: Sequence[Sequence[_Asked]], report: Callable[[Sequence[_Asked]], None]) -> None:
        """Answer batches, as many at a time as there are zygotes."""
        free = list(self.zygotes)
        pool = ThreadPoolExecutor(len(free))
        under_way: dict[Future[list[Any]], tuple[Sequence[_Asked], Zygote]] = {}
        try:
            for batch in (*batches, *[None] * len(free)):  # and then until all are free again
                while under_way and (batch is None or not free):
                    for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                        answered_one, zygote = under_way.pop(future)
                        free.append(zygote)
                        for (question, askers), answer in zip(answered_one, future.result(), strict=True):
                            for asker in askers:
                                asker.bench.answers.append(answer)
                                # What a diagnosis has written, it reads when it has its answer.
                                if not question.function.startswith(DIAGNOSIS):
                                    shutil.rmtree(asker.bench.folder, ignore_errors=True)
                        report(answered_one)
                if batch is not None:
                    zygote = free.pop(0)
                    under_way[pool.submit(self._answer, zygote, batch)] = (batch, zygote)
        except BaseException:
            for _, zygote in under_way.values():
                zygote.close()  # which ends what its thread waits for
            raise
        finally:
            pool.shutdown()

    def _answer(self, zygote: Zygote, batch: Sequence[_Asked]) -> list[Any]:
        folder = Path(tempfile.mkdtemp(prefix="batch-", dir=self._scratch))
        job = batch[0][1][0]
        hangs = job.variants[0].fault is not None and job.variants[0].fault.name == HANGS
        found = answered(
            zygote,
            [question for question, _ in batch],
            job.variants[0].bed.topology,
            folder,
            timeout=HANG if hangs else TIMEOUT,
        )
        shutil.rmtree(folder)
        return found

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
            precision=bed.precision,
            backend=bed.backend,
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


def usable(test: SelfTest) -> tuple[Stock, dict[Bed, str]]:
    """What is left of a stock for a converter that cannot do everything, and why the other beds are left out.

    A bed on which its honest work ends in an exception says nothing of faults. One on which it is wrong stays, and is
    then told as a false alarm.
    """
    out: dict[Bed, str] = {}
    asked = [Variant(fault=None, bed=bed) for bed in dict.fromkeys((*test.stock.beds, *test.stock.clean))]
    cheap = [check for check in test.checks if not check.dear]
    clean = SelfTest(
        test.shared, stock=test.stock, converter=test.converter, checks=cheap, beside=test.zygotes[1:]
    ).run(asked)
    for outcome in clean:
        ended = [name for name, verdict in outcome.verdicts.items() if verdict in ("refused", "crashed", "broken")]
        if ended:
            out[outcome.variant.bed] = outcome.said[ended[0]].splitlines()[0]
    left = replace(
        test.stock,
        beds=tuple(bed for bed in test.stock.beds if bed not in out),
        clean=tuple(bed for bed in test.stock.clean if bed not in out),
    )
    return left, out


_Asked = tuple[Question, list[_Job]]
"""A question, and the checks that ask it."""


def _unexplained(jobs: Sequence[_Job], pending: Sequence[tuple[_Job, Question]]) -> list[tuple[_Job, Question]]:
    """`pending` without those that ask why they fail, where another check has named the cause: they are done."""
    named = {
        id(variant)
        for job in jobs
        if job.verdict is not None
        for variant in job.variants
        if variant.fault is not None and _names(variant.fault, job.causes)
    }
    out = []
    for job, question in pending:
        known = all(id(variant) in named for variant in job.variants)
        if not (known and question.function.startswith(DIAGNOSIS)):
            out.append((job, question))
        elif (other := job.step(explained=False)) is not None:
            out.append((job, other))
    return out


def _batches(questions: Iterable[_Asked]) -> Iterator[list[_Asked]]:
    """Questions that one set of ranks can answer; a fault of a process has its own."""
    together: dict[object, list[_Asked]] = {}
    for question, askers in questions:
        job = askers[0]
        where = (job.bench.case.topology, job.bench.case.backend)
        key = (*where, job.variants[0].bed, job.variants[0].fault, job.variants[0].at) if job.alone else where
        together.setdefault(key, []).append((question, askers))
    for group in together.values():
        for at in range(0, len(group), BATCH):
            yield group[at : at + BATCH]
