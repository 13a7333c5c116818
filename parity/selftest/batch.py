"""Many rank-side calls of checks in one set of ranks, where each would otherwise fork its own.

A check is a function that asks ranks once or twice. Here it is run until it asks, its question put beside those of
other checks, and run again with the answer: what a check says does not depend on when its ranks ran. Ranks answer one
question after the other. One that fails alike on every rank is an answer; one that fails on some ends the batch, and
what comes after it goes into another.
"""

from __future__ import annotations

import re
import tempfile
import time
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from parity.backends import held_in
from parity.checks.bench import Bench
from parity.pickled import read, write
from parity.rank_failure import RankFailure
from parity.ranks import PRELOAD

if TYPE_CHECKING:
    from converters.topology import Topology
    from parity.ranks import Zygote

MODULES = (
    *PRELOAD,
    *(f"parity.observation.{name}" for name in ("backend", "weights", "forward", "taps", "training", "decoding")),
    *(f"parity.{name}" for name in ("selftest.batch", "faults.mutate", "faults.patches", "diagnosis.held")),
    *(f"converters.megatron.{name}" for name in ("provider", "generation", "translate", "specs")),
    *(f"parity.{name}" for name in ("observation.te.products", "observation.te.state", "faults.te_patches")),
    *(f"converters.te.{name}" for name in ("convert", "modeling", "generation", "reference", "reference.context")),
)
"""For a zygote: all that a batch would import, of which there are a hundred."""
_PEERS = 3.0  # seconds that a rank which failed waits for the others to fail too


@dataclass(frozen=True)
class Question:
    """A call that ranks are to make: `module:function` of this package, and its arguments."""

    function: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An exception in a rank."""

    summary: str
    traceback: str


class Pending(BaseException):
    """A check has asked what is not answered yet. Not an `Exception`: no check is to take it for a failed rank."""

    def __init__(self, question: Question) -> None:
        super().__init__(question.function)
        self.question = question


@dataclass(frozen=True, kw_only=True)
class ReplayBench(Bench):
    """A bench whose ranks answer from memory.

    Args:
        answers: What they answered so far, in the order of the questions: a list of what ranks returned, or a failure.
        at: How many of them this run of the check has used; one item.
        folder: Where exports go. The caller removes it.
    """

    answers: list[Any] = field(default_factory=list)
    at: list[int] = field(default_factory=lambda: [0])
    folder: Path

    def ranks(self, function: str, *arguments: Any) -> list[Any]:
        """The answer, from memory.

        Raises:
            Pending: There is none yet.
            RankFailure: That was the answer.
        """
        at = self.at[0]
        self.at[0] += 1
        if at == len(self.answers):
            raise Pending(Question(function, arguments))
        answer = self.answers[at]
        if isinstance(answer, RankFailure):
            raise answer
        found: list[Any] = answer
        return found

    @property
    def coded(self) -> Path:
        """As `Bench.coded`, in several files, as a large checkpoint is."""
        from parity.seeded import write_checkpoint
        from parity.selftest.models import accompany

        def make() -> Path:
            folder = Path(tempfile.mkdtemp(prefix="coded-", dir=self.shared.folder))
            dtype = {"fp32": "float32", "bf16": "bfloat16"}[held_in(self.case.precision)]
            return accompany(write_checkpoint(self.subject.config, folder, kind="coded", dtype=dtype, shards=3))

        found: Path = self.shared.once(("coded in files", self.case.slug, held_in(self.case.precision)), make)
        return found

    @contextmanager
    def scratch(self) -> Iterator[str]:
        """A folder for an export."""
        self.folder.mkdir(exist_ok=True)
        yield str(self.folder)


def answered(
    zygote: Zygote, questions: Sequence[Question], topology: Topology, folder: Path, *, timeout: float
) -> list[Any]:
    """What ranks answer, in the order of the questions: a list of what each returned, or a `RankFailure`.

    Args:
        zygote: Forks the ranks.
        questions: All for `topology`.
        topology: The parallel layout.
        folder: For answers. Must be empty.
        timeout: Seconds without an answer after which the question counts as hanging.
    """
    answers: list[Any] = []
    world, coords = topology.world_size, [str(coord) for coord in topology.coords()]
    while len(answers) < len(questions):
        start = len(answers)
        here = folder / str(start)
        here.mkdir(parents=True)
        failure: RankFailure | None = None
        try:
            zygote.run(
                "parity.selftest.batch:serve",
                questions[start:],
                here,
                world=world,
                coords=coords,
                timeout=timeout + 2 * (len(questions) - start - 1),
                env={"CUDA_VISIBLE_DEVICES": ""},
            )
        except RankFailure as error:
            failure = error
        for index in range(len(questions) - start):
            files = [here / f"{index}.{rank}" for rank in range(world)]
            said = {rank: read(file) for rank, file in enumerate(files) if file.is_file()}
            failed = {rank: one for rank, one in said.items() if isinstance(one, Failure)}
            if failed:
                rank, one = min(failed.items())
                text = f"rank {rank} ({coords[rank]}): {one.summary}"
                answers.append(RankFailure(text, rank, coords[rank], "exception", one.traceback))
                if not alike(said.values(), world):
                    break  # what comes after was not asked
            elif len(said) == world:
                answers.append(list(said.values()))
            else:
                assert failure is not None, "ranks ended without an answer"
                answers.append(failure)
                break
    return answers


def alike(said: Collection[Any], world: int) -> bool:
    """Whether all ranks answered, or all failed with one kind of exception."""
    kinds = {one.summary.partition(":")[0] if isinstance(one, Failure) else "" for one in said}
    return len(said) == world and len(kinds) == 1


def serve(questions: Sequence[Question], folder: Path) -> None:
    """Answer questions, in a rank: each into a file of its own.

    Raises:
        RuntimeError: A question failed here and not on every rank.
    """
    import torch.distributed as dist

    _keep_groups()
    rank, world = dist.get_rank(), dist.get_world_size()
    for index, question in enumerate(questions):
        try:
            module, _, name = question.function.partition(":")
            answer = getattr(import_module(f"parity.{module}"), name)(*question.arguments)
        except Exception as error:
            answer = Failure(
                summary="".join(traceback.format_exception_only(error)).strip(), traceback=traceback.format_exc()
            )
        write(folder / f"{index}.{rank}", answer)
        peers = [folder / f"{index}.{peer}" for peer in range(world)]
        limit = time.monotonic() + _PEERS
        while not all(peer.is_file() for peer in peers):
            if isinstance(answer, Failure) and time.monotonic() > limit:
                raise RuntimeError(f"question {index} failed on rank {rank} while others go on")
            time.sleep(0.001)
        if isinstance(answer, Failure) and not alike([read(peer) for peer in peers], world):
            raise RuntimeError(f"question {index} failed on some ranks")


def _keep_groups() -> None:
    """Make Megatron-Core's process groups once: a question finds them as the one before left them, seeds renewed."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from converters.megatron import parallel

    right = parallel.initialize

    def initialize(topology: Topology, *, seed: int = 1234, **options: Any) -> Any:
        if not parallel_state.is_initialized():
            return right(topology, seed=seed, **options)
        if topology.vpp > 1:
            parallel_state.set_virtual_pipeline_model_parallel_rank(0)
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        return parallel.current_coord()

    parallel.initialize = initialize


def said_by(failure: RankFailure) -> Literal["refused", "hung", "not here", "broken", "crashed"]:
    """What kind of failure it is: `refused` by a `ConversionError`, `hung`, `not here`, `broken`, or `crashed`."""
    if failure.kind == "timeout":
        return "hung"
    raised = re.findall(r"^([A-Za-z_][\w.]*(?:Error|Exception|Exit|Failure))(?::|$)", failure.traceback, re.MULTILINE)
    kind = raised[-1] if raised else ""
    if kind.endswith("NotHereError"):
        return "not here"
    if kind.endswith("InjectionError"):
        return "broken"
    return "refused" if kind.startswith("converters.errors.") else "crashed"
