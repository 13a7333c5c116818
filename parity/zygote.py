"""The process that forks ranks: it imports the heavy libraries once and never computes.

`parity.ranks.Zygote` starts it and speaks with it in pickled messages over a socket: one `Setup`, answered by `Ready`
or `Broken`, then an `Order` for each request, answered by `Started`, one `Ended` a rank, and `Gone`, after which no
process of that request is left. Here is the mechanism only; what an end means is judged by `parity.ranks`.

Nothing outlives its maker: a rank dies with the zygote (PR_SET_PDEATHSIG), the zygote ends when the socket closes or
its parent is gone, and what a rank itself started is adopted here (PR_SET_CHILD_SUBREAPER) and killed before `Gone`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import os
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from parity.rank_process import Order, live, prctl


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the zygote is: the pid of its parent, the modules to import, and the folder that must not outlive both."""

    parent: int
    preload: tuple[str, ...]
    folder: Path


@dataclass(frozen=True)
class Dump:
    """Asks for the Python stacks of every living rank, into `<rank>.stack`."""


@dataclass(frozen=True)
class Kill:
    """Asks for the death of every process of the request."""


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The preload is done; `unsafe` says what in it makes forking unsafe."""

    unsafe: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Broken:
    """The import of `module` failed; `reason` is the traceback."""

    module: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Started:
    """The ranks' pids in rank order. The first is also the id of their process group."""

    pids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A rank's process is over: its exit code (or minus the signal that killed it), and when (`time.monotonic`)."""

    rank: int
    code: int
    at: float


@dataclass(frozen=True)
class Gone:
    """No process of the request is left."""


def main(fd: int) -> NoReturn:
    """Serve the socket `fd` until it closes or the parent is gone."""
    conn: Connection[Any, Any] = Connection(fd)
    setup: Setup = conn.recv()
    prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    code = 0
    try:
        ready = _preload(setup.preload)
        gc.collect()
        gc.freeze()  # the ranks' collector then need not touch, and so copy, the pages of what is imported
        conn.send(ready)
        if isinstance(ready, Ready):
            _serve(conn, setup.parent)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent has closed the socket, or is gone
    except BaseException:
        traceback.print_exc()
        code = 1
    _end_children()
    if code == 0:  # else the parent still wants to read what was printed
        shutil.rmtree(setup.folder, ignore_errors=True)
    sys.stderr.flush()
    os._exit(code)  # no thread that an import started can hold this up


def _preload(names: Sequence[str]) -> Ready | Broken:
    """Import what is installed of `names`; note which import started a thread or CUDA, which a fork does not survive.

    Source: torch 2.13.0, transformers 5.23.0, megatron-core 0.16.1 and 0.19.2 start no thread, measured; numpy 2 starts
        the pool of OpenBLAS, unless OPENBLAS_NUM_THREADS is 1, to which the parent sets it.
    """
    unsafe = []
    for name in names:
        try:
            if _installed(name):
                before = _os_threads()
                importlib.import_module(name)
                if (started := _os_threads() - before) > 0:
                    unsafe.append(f"importing {name} started {started} thread{'s' if started > 1 else ''}")
        except BaseException:
            return Broken(module=name, reason=traceback.format_exc())
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        unsafe.append("an import initialised CUDA, which no forked rank can then use")
    return Ready(unsafe=tuple(unsafe))


def _installed(name: str) -> bool:
    """Whether the distribution of module `name` is there: the first of its packages that is not a bare namespace."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        spec = importlib.util.find_spec(".".join(parts[:count]))
        if spec is None or spec.origin is not None:
            return spec is not None
    return True


def _os_threads() -> int:
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def _serve(conn: Connection[Any, Any], parent: int) -> None:
    """Fork, kill and reap as asked."""
    wake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler is what makes Python write to the wake-up pipe
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # asked for its stack, a rank so young that it has none goes on
    ranks: dict[int, int] = {}  # pid -> rank, of those not yet reaped: so no pid in it can belong to somebody else
    busy = False
    while os.getppid() == parent:
        # Bounded, because a copy of the parent's end of the socket, in some other fork of it, would outlive the parent.
        readable, _, _ = select.select([conn.fileno(), wake], [], [], 1.0)
        if wake in readable:
            os.read(wake, 4096)
        if conn.fileno() in readable:
            message = conn.recv()
            if isinstance(message, Order):
                ranks, busy = _fork(message, (conn.fileno(), wake, waker)), True
                conn.send(Started(pids=tuple(ranks)))
            else:
                for pid in ranks:
                    os.kill(pid, signal.SIGUSR1 if isinstance(message, Dump) else signal.SIGKILL)
        while ranks:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid in ranks:
                conn.send(Ended(rank=ranks.pop(pid), code=os.waitstatus_to_exitcode(status), at=time.monotonic()))
        if busy and not ranks:
            _end_children()
            conn.send(Gone())
            busy = False


def _fork(order: Order, private: tuple[int, ...]) -> dict[int, int]:
    """Fork the ranks of `order`, in a process group of their own, without the descriptors `private`; pid -> rank."""
    sys.stdout.flush()
    sys.stderr.flush()
    zygote, leader = os.getpid(), 0
    listener = None if order.backend is None else socket.create_server(("127.0.0.1", 0))
    ranks: dict[int, int] = {}
    for rank in range(order.world):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, leader)
            for fd in private:  # the socket above all: that it closes is how the parent learns of the zygote's death
                os.close(fd)
            live(order, rank, zygote, listener)
        leader = leader or pid
        with contextlib.suppress(OSError):  # the rank does the same: whoever comes first
            os.setpgid(pid, leader)
        ranks[pid] = rank
    if listener is not None:
        listener.close()
    return ranks


def _end_children() -> None:
    """Kill and reap every child: ranks, and what dead ranks left behind."""
    with contextlib.suppress(ChildProcessError):
        while True:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                for pid in _children():
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(-1, 0)


def _children() -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(stat.parent.name))
    return found
