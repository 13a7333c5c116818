"""What every check is given: the case, its model, the converter under test, and ranks to run things in."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity.backends import held_in
from parity.case import Case
from parity.converter import Converter, Named, Settings
from parity.devices import device_of
from parity.diagnosis.refusals import causes_of
from parity.findings import Finding, Measurement
from parity.rank_failure import RankFailure
from parity.subjects import Subject

if TYPE_CHECKING:
    from parity.ranks import Zygote


ON_GPU = {"NVIDIA_TF32_OVERRIDE": "0"}
"""fp32 is fp32: Transformer Engine lets cuBLAS round the operands of such products to 10 bits."""


class NotApplicable(Exception):
    """What a check raises, before it does anything, where it has nothing to say of a case; the reason is shown."""


Check = Callable[["Bench"], Iterator[Finding]]


def measures(name: str) -> Callable[[Check], Check]:
    """Makes a failing measurement `name`, with the causes that it names, of a failed rank in a check."""

    def decorate(check: Check) -> Check:
        @functools.wraps(check)
        def run(bench: Bench) -> Iterator[Finding]:
            try:
                yield from check(bench)
            except RankFailure as failure:
                where = f"rank {failure.rank}" + f" ({failure.coord})" * bool(failure.coord)
                yield Measurement.proved(
                    name,
                    count=bench.case.topology.world_size,
                    unit="ranks",
                    unproved=[where],
                    where=where,
                    detail=str(failure),
                    causes=causes_of(failure),
                )

        return run

    return decorate


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What is made once for all cases of a session, and where. `close` removes it."""

    zygote: Zygote
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="parity-")))
    known: dict[object, Any] = field(default_factory=dict)

    def once(self, key: object, make: Callable[[], Any]) -> Any:
        """`make()`, called the first time that `key` is asked for."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def close(self) -> None:
        """Remove everything that was written."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One case on the bench.

    Args:
        case: What is checked.
        subject: Its model.
        shared: What outlives the case.
        converter: The converter under test. Must be picklable: it is sent to ranks.
    """

    case: Case
    subject: Subject
    shared: Shared
    converter: Converter = field(default_factory=Named)

    @property
    def settings(self) -> Settings:
        """What models are built for."""
        return Settings(topology=self.case.topology, precision=self.case.precision, backend=self.case.backend)

    def ranks(self, function: str, *arguments: Any) -> list[Any]:
        """Call `parity.<module>:<name>` on every rank of the case, over gloo or NCCL; what each returned."""
        cuda = device_of(self.case) == "cuda"
        return self.shared.zygote.run(
            f"parity.{function}",
            *arguments,
            world=self.case.topology.world_size,
            coords=[str(coord) for coord in self.case.topology.coords()],
            timeout=self.case.rank_timeout,
            backend="cpu:gloo,cuda:nccl" if cuda else "gloo",
            env=ON_GPU if cuda else {"CUDA_VISIBLE_DEVICES": ""},
        )

    def alone(self, function: str, *arguments: Any) -> Any:
        """Call `parity.<module>:<name>` in one fresh process without a process group: for transformers."""
        cuda = device_of(self.case) == "cuda"
        found: list[Any] = self.shared.zygote.run(
            f"parity.{function}",
            *arguments,
            backend=None,
            timeout=self.case.rank_timeout,
            env=ON_GPU if cuda else {"CUDA_VISIBLE_DEVICES": ""},
        )
        return found[0]

    @property
    def coded(self) -> Path:
        """A checkpoint of the model's config whose elements say where they came from (see `parity.coded`)."""
        from parity.seeded import write_checkpoint

        def write() -> Path:
            folder = Path(tempfile.mkdtemp(prefix="coded-", dir=self.shared.folder))
            dtype = {"fp32": "float32", "bf16": "bfloat16"}[held_in(self.case.precision)]
            return write_checkpoint(self.subject.config, folder, kind="coded", dtype=dtype)

        found: Path = self.shared.once(("coded", self.case.slug, held_in(self.case.precision)), write)
        return found

    @property
    def blank(self) -> Path:
        """The coded checkpoint with zeros for weights: what an export may take everything from but the weights."""

        def write() -> Path:
            folder = Path(tempfile.mkdtemp(prefix="blank-", dir=self.shared.folder))
            for file in self.coded.iterdir():
                if file.suffix != ".safetensors":
                    shutil.copyfile(file, folder / file.name)
                    continue
                with file.open("rb") as whole, (folder / file.name).open("wb") as empty:
                    size = whole.read(8)
                    empty.write(size + whole.read(int.from_bytes(size, "little")))
                    empty.truncate(file.stat().st_size)  # a hole, which reads as zeros
            return folder

        found: Path = self.shared.once(("blank", self.case.slug, held_in(self.case.precision)), write)
        return found

    def scratch(self) -> AbstractContextManager[str]:
        """A folder for an export, removed at once."""
        return tempfile.TemporaryDirectory(prefix="export-", dir=self.shared.folder)
