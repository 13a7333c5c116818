"""Ranks that fail: in each way there is, the right one is named, at once, and nothing is left."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import rank_functions
from leftovers import descendants

from parity.rank_failure import oom_kills
from parity.ranks import RankFailure, Zygote, ZygoteError

MIB = 2**20


@contextlib.contextmanager
def light() -> Iterator[tuple[Zygote, int]]:
    """A zygote that imports nothing, for what must be killed; and its pid."""
    before = descendants(os.getpid())
    with Zygote(preload=[]) as zygote:
        zygote.run(rank_functions.same, 1, backend=None)
        (pid,) = descendants(os.getpid()) - before
        yield zygote, pid


def alive(pid: int) -> bool:
    """Whether `pid` runs: neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until(condition: object, what: str) -> None:
    """Wait for `condition()`; fail after a time that no machine needs."""
    limit = time.monotonic() + 60
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < limit, what
        time.sleep(0.01)


def test_an_exception_names_its_rank_and_ends_the_run(zygote: Zygote) -> None:
    """The peers sleep for an hour: whoever waits for them fails by the timeout."""
    coords = ["tp=0 pp=0", "tp=1 pp=0", "tp=0 pp=1", "tp=1 pp=1"]
    with pytest.raises(RankFailure) as caught:
        zygote.run(rank_functions.fail, "exception", 3, "sleep", world=4, coords=coords, timeout=120)
    failure, text = caught.value, str(caught.value)
    assert (failure.rank, failure.coord, failure.kind) == (3, "tp=1 pp=1", "exception")
    assert text.startswith("rank 3 (tp=1 pp=1) of 4 failed in rank_functions:fail: ValueError: seven is not eight\n")
    assert 'raise ValueError("seven is not eight")' in failure.traceback
    assert failure.traceback in text + "\n"
    assert "rank_process.py" not in text
    assert "rank 3 speaks" in text
    assert "rank 2 speaks" not in text
    assert "  rank 1 (tp=1 pp=0): was still running" in text


@pytest.mark.parametrize("how", ["exception", "SIGKILL", "os._exit(3)"])
def test_peers_that_lose_a_rank_are_not_blamed(zygote: Zygote, how: str) -> None:
    with pytest.raises(RankFailure) as caught:
        zygote.run(rank_functions.fail, how, 1, "collective", world=3, timeout=120)
    assert (caught.value.rank, caught.value.coord) == (1, "")
    for peer in (0, 2):
        lines = re.findall(rf"^  rank {peer}: (.*)$", str(caught.value), re.MULTILINE)
        assert len(lines) == 1
        assert lines[0].startswith("RuntimeError: ") or lines == ["was still running"]


def test_an_echo_that_comes_first_is_not_the_cause(zygote: Zygote) -> None:
    with pytest.raises(RankFailure) as caught:
        zygote.run(rank_functions.echo_before_cause, world=2, timeout=120)
    assert (caught.value.rank, caught.value.kind) == (1, "exception")
    assert "failed in rank_functions:echo_before_cause: ValueError: the cause" in str(caught.value)
    assert re.search(r"^  rank 0: .*peer", str(caught.value), re.MULTILINE)


def test_a_collective_that_a_rank_misses(zygote: Zygote) -> None:
    with pytest.raises(RankFailure, match=r"it waited for a peer, but rank 1 \(tp=1\) had returned") as caught:
        zygote.run(rank_functions.missed_collective, world=2, coords=["tp=0", "tp=1"], timeout=120)
    assert (caught.value.rank, caught.value.kind) == (0, "exception")


def test_a_collective_that_does_not_match_is_a_cause(zygote: Zygote) -> None:
    """Gloo throws in a thread of its own, which aborts the process: the reason is in what it wrote."""
    with pytest.raises(RankFailure, match="killed by SIGABRT") as caught:
        zygote.run(rank_functions.unequal_shapes, world=2, timeout=120)
    assert (caught.value.rank, caught.value.kind) == (1, "signal")
    assert "4000 vs 400" in str(caught.value)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGSEGV"])
def test_a_signal_is_named(zygote: Zygote, name: str) -> None:
    with pytest.raises(RankFailure, match=f"killed by {name}") as caught:
        zygote.run(rank_functions.fail, name, 1, "sleep", world=2, coords=["tp=0", "tp=1"], backend=None)
    assert (caught.value.rank, caught.value.coord, caught.value.kind) == (1, "tp=1", "signal")
    assert "rank 1 speaks" in str(caught.value)
    if name == "SIGSEGV":
        assert "Segmentation fault" in str(caught.value)
        assert "in string_at" in str(caught.value)


@pytest.mark.parametrize(
    ("how", "found"),
    [("sys.exit", "sys.exit('enough')"), ("os._exit(3)", "exited with code 3"), ("os._exit(0)", "exited with code 0")],
)
def test_an_exit_is_not_a_return(zygote: Zygote, how: str, found: str) -> None:
    with pytest.raises(RankFailure, match=re.escape(found)) as caught:
        zygote.run(rank_functions.fail, how, 0, "sleep", world=2, backend=None)
    assert (caught.value.rank, caught.value.kind) == (0, "exit")


@pytest.mark.parametrize("how", ["torch", "python"])
def test_memory_limit(zygote: Zygote, how: str) -> None:
    assert zygote.run(rank_functions.allocate, 50 * MIB, how, memory_limit=150 * MIB)
    with pytest.raises(RankFailure) as caught:
        zygote.run(rank_functions.allocate, 400 * MIB, how, world=2, memory_limit=150 * MIB)
    assert caught.value.kind == "memory"
    assert re.search(
        r"out of memory, with \d+ MiB resident when last seen, under a limit of 150 MiB", str(caught.value)
    )
    assert "raise the limit (memory_limit" in str(caught.value)


def test_an_abort_for_want_of_memory(zygote: Zygote) -> None:
    with pytest.raises(RankFailure, match="aborted by an allocation that failed") as caught:
        zygote.run(rank_functions.fail, "abort", 0, "sleep", world=2, backend=None)
    assert caught.value.kind == "memory"


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory cgroup of 64 MiB."""
    place = None
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers in ("memory", ""):
            place = Path("/sys/fs/cgroup", controllers, group.strip("/"), f"parity-test-{os.getpid()}")
            limit = "memory.limit_in_bytes" if controllers else "memory.max"
            break
    try:
        assert place is not None
        place.mkdir()
    except (AssertionError, OSError) as error:
        pytest.skip(f"may not make a memory cgroup here: {error}")
    try:
        try:
            (place / limit).write_text(str(64 * MIB))
        except OSError as error:
            pytest.skip(f"may not limit the memory of a cgroup here: {error}")
        yield place
    finally:
        until(lambda: not (place / "cgroup.procs").read_text(), "processes are left in the cgroup")
        place.rmdir()


def test_the_kernels_oom_killer_is_told_from_another_kill(small_cgroup: Path) -> None:
    with light() as (zygote, pid):
        (small_cgroup / "cgroup.procs").write_text(str(pid))
        with pytest.raises(RankFailure, match="killed by SIGKILL") as caught:
            zygote.run(rank_functions.fail, "SIGKILL", 0, "sleep", backend=None)
        assert caught.value.kind == "signal"
        assert oom_kills(pid) == 0
        with pytest.raises(RankFailure, match="killed by the kernel, which was out of memory") as caught:
            zygote.run(rank_functions.allocate, 256 * MIB, "python", backend=None)
        assert caught.value.kind == "memory"
        assert oom_kills(pid) == 1


def test_a_hang_shows_every_ranks_stack(zygote: Zygote) -> None:
    coords = ["tp=0", "tp=1", "tp=2", "tp=3"]
    with pytest.raises(RankFailure) as caught:
        zygote.run(rank_functions.hang, world=4, coords=coords, timeout=1.5)
    failure, text = caught.value, str(caught.value)
    assert (failure.rank, failure.coord, failure.kind) == (2, "tp=2", "timeout")
    assert text.startswith("rank 2 (tp=2) of 4 hung: rank_functions:hang did not end within 1.5 s.")
    assert re.search(r"in busy_elsewhere\n.* in hang\n", failure.traceback)
    assert "rank_process.py" not in text
    parts = {int(part[5]): part for part in re.split(r"\n\n(?=rank \d)", text)[1:]}
    assert parts[0] == "rank 0 (tp=0) had returned"
    assert parts[1].startswith("rank 1 (tp=1) waits in torch.distributed:\n")
    assert "in summed" in parts[1]
    assert parts[2].startswith("rank 2 (tp=2) was still running:\n")
    assert "did not answer the signal (stopped?)" in parts[3]


def test_what_cannot_be_returned(zygote: Zygote) -> None:
    with pytest.raises(RankFailure, match=r"must return what pickle can carry, found NotForPickle: no pickle of this"):
        zygote.run(rank_functions.not_picklable, backend=None)


def test_a_function_that_is_not_there(zygote: Zygote) -> None:
    with pytest.raises(RankFailure, match=r"AttributeError: module 'rank_functions' has no attribute 'sam'"):
        zygote.run("rank_functions:sam", backend=None)


def test_an_interrupt_ends_the_ranks(zygote: Zygote) -> None:
    before = descendants(os.getpid())
    with light() as (own, _):
        with pytest.raises(KeyboardInterrupt):
            own.run(rank_functions.interrupt, os.getpid(), world=2, backend=None)
        assert descendants(os.getpid()) == before
        assert own.run(rank_functions.same, 1, backend=None) == [1]


def test_a_zygote_that_dies_during_a_run(tmp_path: Path) -> None:
    note = tmp_path / "child"
    with light() as (zygote, pid):
        expected = rf"zygote \(pid {pid}\) died \(killed by SIGKILL\), while rank_functions:kill_zygote ran in 2 ranks"
        with pytest.raises(ZygoteError, match=expected):
            zygote.run(rank_functions.kill_zygote, str(note), world=2, backend=None)
        until(lambda: not alive(int(note.read_text())), "a child of a rank is left")
        assert zygote.run(rank_functions.same, 1, backend=None) == [1]


def test_a_zygote_that_dies_between_runs() -> None:
    with light() as (zygote, pid):
        os.kill(pid, signal.SIGKILL)
        until(lambda: not alive(pid), "the zygote survives SIGKILL")
        with pytest.warns(RuntimeWarning, match=r"killed by SIGKILL\), between two runs; starting another"):
            assert zygote.run(rank_functions.same, 1, backend=None) == [1]


def test_what_a_rank_started_does_not_outlive_it(zygote: Zygote) -> None:
    (child,) = zygote.run(rank_functions.leave_a_child, backend=None)
    assert not Path(f"/proc/{child}").exists()
    assert zygote.run(rank_functions.leave_a_thread, backend=None, timeout=120) == ["returned"]


@pytest.mark.parametrize("end", ["exit", "SIGKILL", "SIGKILL of both"])
def test_nothing_outlives_the_interpreter(end: str, tmp_path: Path) -> None:
    """A process that ends without closing its zygote: by itself, or killed while ranks run, and the zygote with it."""
    script = textwrap.dedent(f"""
        import threading, time, rank_functions
        from pathlib import Path
        from parity.ranks import Zygote
        zygote = Zygote(preload=[])
        run = dict(world=2, backend=None)
        threading.Thread(target=zygote.run, args=(rank_functions.note_and_sleep, {str(tmp_path)!r}), kwargs=run,
                         daemon=True).start()
        while len(list(Path({str(tmp_path)!r}).glob("*.pids"))) < 2:
            time.sleep(0.01)
        if {end!r} != "exit":
            time.sleep({rank_functions.FOREVER})
    """)
    own = tmp_path / "tmp"
    own.mkdir()
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TMPDIR": str(own)}
    process = subprocess.Popen([sys.executable, "-c", script], env=environ)
    try:
        until(lambda: len(list(tmp_path.glob("*.pids"))) == 2, "the ranks do not start")
        if end == "SIGKILL of both":
            process.send_signal(signal.SIGSTOP)
            os.kill(int((tmp_path / "0.pids").read_text().split()[1]), signal.SIGKILL)
        if end != "exit":
            process.kill()
    finally:
        process.wait(60)
    pids = {int(pid) for note in tmp_path.glob("*.pids") for pid in note.read_text().split()}
    assert len(pids) == 3
    until(lambda: not any(map(alive, pids)), "processes are left")
    if end != "SIGKILL of both":  # then nobody is there to remove them
        until(lambda: not list(own.iterdir()), "files are left")
