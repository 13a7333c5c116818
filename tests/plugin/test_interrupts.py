"""However a run ends, nothing of it is left: no process, no temporary folder, no partial golden."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STALLING = '''
import time
from pathlib import Path

import torch.distributed as dist

from parity.converter import Own


class Stalls(Own):
    """Never comes back from an import on rank 1, and says that it is there."""

    def to_megatron(self, folder, settings):
        if dist.get_rank() == 1:
            Path("{there}").touch()
            time.sleep(600)
        return super().to_megatron(folder, settings)


class Raises(Own):
    def to_megatron(self, folder, settings):
        if dist.get_rank() == 1:
            raise RuntimeError("no such luck")
        return super().to_megatron(folder, settings)
'''


class Run:
    """A run of pytest on a tiny model, marked, so that every process that it starts can be found."""

    def __init__(self, tmp_path: Path, *options: str) -> None:
        self.mark = f"PARITY_TEST_RUN={uuid.uuid4()}"
        self.there, self.temporary, self.golden = tmp_path / "there", tmp_path / "tmp", tmp_path / "golden"
        self.temporary.mkdir()
        (tmp_path / "stalling.py").write_text(STALLING.format(there=self.there))
        name, _, value = self.mark.partition("=")
        command = ["pytest", "-p", "parity.plugin", "-p", "no:cacheprovider", "--model=Llama-3.2-1B", "--size=tiny"]
        environ = {name: text for name, text in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
        environ.pop("CI", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command, "--tp=2", *options],
            cwd=tmp_path,
            env={
                **environ,
                name: value,
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]),
                "TMPDIR": str(self.temporary),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_until_ranks_stall(self) -> None:
        deadline = time.monotonic() + 120
        while not self.there.exists():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, "the ranks never started"
            time.sleep(0.02)

    def output(self) -> str:
        return self.process.communicate(timeout=120)[0]

    def left(self) -> list[str]:
        """Command lines of the processes that this run started and that still live."""
        found = []
        for process in Path("/proc").iterdir():
            if not process.name.isdigit() or int(process.name) == os.getpid():
                continue
            try:
                environ = (process / "environ").read_bytes().split(b"\0")
                if self.mark.encode() in environ:
                    found.append((process / "cmdline").read_text().replace("\0", " "))
            except OSError:  # it is gone, or belongs to somebody else
                continue
        return found


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Run]:
    return lambda *options: Run(tmp_path, *options)


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_ctrl_c(run: Callable[..., Run], workers: tuple[str, ...]) -> None:
    started = run("--converter=stalling:Stalls", "-k", "import", *workers)
    started.wait_until_ranks_stall()
    # As a terminal does: to the whole foreground group. Ranks are in groups of their own.
    os.killpg(started.process.pid, signal.SIGINT)
    said = started.output()
    assert started.process.returncode == pytest.ExitCode.INTERRUPTED, said
    assert started.left() == []
    assert list(started.temporary.glob("parity-*")) == []


def test_the_first_failure_ends_it(run: Callable[..., Run]) -> None:
    started = run("--converter=stalling:Raises", "-x")
    said = started.output()
    assert started.process.returncode == pytest.ExitCode.TESTS_FAILED, said
    assert "no such luck" in said
    assert started.left() == []
    assert list(started.temporary.glob("parity-*")) == []


def test_ranks_that_hang(run: Callable[..., Run]) -> None:
    started = run("--converter=stalling:Stalls", "--rank-timeout=8", "-k", "import")
    said = started.output()
    assert started.process.returncode == pytest.ExitCode.TESTS_FAILED, said
    assert "in to_megatron" in said  # where rank 1 is
    assert started.left() == []
    assert list(started.temporary.glob("parity-*")) == []


def test_no_partial_golden(run: Callable[..., Run]) -> None:
    started = run("--converter=stalling:Stalls", "--regen-golden", "--golden=golden", "-p", "no:randomly")
    started.wait_until_ranks_stall()
    os.killpg(started.process.pid, signal.SIGINT)
    said = started.output()
    assert started.process.returncode == pytest.ExitCode.INTERRUPTED, said
    assert started.left() == []
    assert [path for path in started.golden.rglob("*") if path.is_file()] == []
