"""What the checks of the suite share: how ranks are run, and what transformers says, asked once a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from parity.case import Case
from parity.devices import device_of, lacking
from parity.probes import Probe, probe

if TYPE_CHECKING:
    from parity.measure import References
    from parity.ranks import Zygote
    from parity.subjects import Subject

Run = Callable[..., list[Any]]


@pytest.fixture
def in_ranks(case: Case, zygote: Zygote) -> Run:
    """Calls a function of `parity.measure` on every rank of the case; what each returned, in rank order."""
    reason = lacking(case)
    if reason:
        pytest.skip(reason)
    cuda = device_of(case) == "cuda"

    def run(function: str, *arguments: Any) -> list[Any]:
        return zygote.run(
            f"parity.measure:{function}",
            *arguments,
            world=case.topology.world_size,
            coords=[str(coord) for coord in case.topology.coords()],
            timeout=case.rank_timeout,
            backend="cpu:gloo,cuda:nccl" if cuda else "gloo",
            env={} if cuda else {"CUDA_VISIBLE_DEVICES": ""},
        )

    return run


@pytest.fixture(scope="session")
def asked() -> dict[str, tuple[Probe, References]]:
    """Probes and what transformers said, by model and precision."""
    return {}


@pytest.fixture
def reference(case: Case, subject: Subject, zygote: Zygote, asked: dict[str, Any]) -> tuple[Probe, References]:
    """The probe of this case's model, and what transformers says to it in the case's precision."""
    key = f"{case.slug} {case.precision}"
    if key not in asked:
        found = probe(subject.config, subject.folder, prose=subject.weights != "seeded")
        said: list[References] = zygote.run(
            "parity.measure:references",
            subject.folder,
            found,
            case.precision,
            backend=None,
            timeout=case.rank_timeout,
            env={} if device_of(case) == "cuda" else {"CUDA_VISIBLE_DEVICES": ""},
        )
        asked[key] = (found, said[0])
    return asked[key]  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def coded_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Case, Subject], Path]]:
    """A checkpoint of the subject's config whose elements say where they came from, written once a model."""
    made: dict[str, Path] = {}

    def of(case: Case, subject: Subject) -> Path:
        from parity.seeded import write_checkpoint

        key = f"{case.slug} {case.precision}"
        if key not in made:
            folder = tmp_path_factory.mktemp("coded")
            dtype = {"fp32": "float32", "bf16": "bfloat16"}[case.precision]
            made[key] = write_checkpoint(subject.config, folder, kind="coded", dtype=dtype)
        return made[key]

    yield of
    for folder in made.values():
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder for an export, removed at once: a full model would otherwise stay until pytest's third next run."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)
