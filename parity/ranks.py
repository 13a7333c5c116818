"""Real ranks: fresh processes that run one function, and how they fail.

    with Zygote() as zygote:
        losses = zygote.run(train_one_step, model_path, world=4, coords=topology.coords())

The first `run` starts one zygote, a process that imports torch, transformers and megatron once; every `run` forks fresh
ranks from it, in hundredths of a second, and gives them a process group. Whatever happens to one rank ends the run with
a `RankFailure` that names the rank, and no process and no file outlives the run. Importing this module imports the
standard library only. Linux only: it stands on fork, prctl and /proc.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from parity import rank_process
from parity.pickled import read, write
from parity.rank_failure import Observed, RankFailure, judge, log_tail
from parity.rank_process import Order, Reference, memory
from parity.zygote import Broken, Dump, Ended, Gone, Kill, Ready, Setup, Started

__all__ = ["PRELOAD", "RankFailure", "Zygote", "ZygoteError"]

T = TypeVar("T")

PRELOAD: tuple[str, ...] = (
    "torch",
    "torch.distributed",
    "safetensors.torch",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "megatron.core",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.dist_checkpointing",
)

_START_LIMIT = 300.0  # seconds that the imports may take
_SAMPLE_EVERY = 0.1  # seconds between two looks at the ranks' memory
_PEER_GRACE = 0.2  # seconds that peers have to add what they saw, once the cause of a failure is known
_CAUSE_GRACE = 2.0  # seconds in which a cause may turn up, while all that is known is that a connection broke
_END_LIMIT = 10.0  # seconds that dying may take
_BOOT = "import sys; sys.path[:] = sys.argv[2:]; from parity.zygote import main; main(int(sys.argv[1]))"


class ZygoteError(RuntimeError):
    """The zygote itself could not start, or died. The next run starts a new one."""


class Zygote:
    """Forks ranks. The first `run`, or `start`, starts it; `close`, the end of a `with`, or of the interpreter ends it.

    Args:
        preload: Modules that the zygote imports. One whose distribution is not installed is left out; any other failing
            import is a `ZygoteError`. None may start a thread or initialise CUDA: that is a `RuntimeWarning`.
        threads: Threads a rank, for `torch.set_num_threads` and OMP_NUM_THREADS. (What numpy does in its BLAS, imported
            before, stays at one.)
    """

    def __init__(self, *, preload: Sequence[str] = PRELOAD, threads: int = 1) -> None:
        self._preload = tuple(preload)
        self._threads = threads
        self._process: _Process | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def start(self) -> None:
        """Start the zygote where it is not running, without waiting for its imports."""
        self._running()

    def close(self) -> None:
        """End the zygote and everything that it started, and remove its files. A later `run` starts another."""
        if self._process is not None:
            self._end()
            self._process = None

    def run(
        self,
        function: str | Callable[..., T],
        /,
        *args: Any,
        world: int = 1,
        coords: Sequence[object] | None = None,
        timeout: float = 300.0,
        backend: str | None = "gloo",
        env: Mapping[str, str] | None = None,
        memory_limit: int | None = None,
        **kwargs: Any,
    ) -> list[T]:
        """Call `function(*args, **kwargs)` in `world` fresh ranks; what each returned, in rank order.

        The ranks see the caller's `sys.path`, working directory and environment of this moment, with RANK, WORLD_SIZE,
        LOCAL_RANK and OMP_NUM_THREADS set. Arguments and results travel as pickles, torch tensors included.

        Args:
            function: A module-level callable, or "module:qualname". Its module is imported by name where the name leads
                to the same file, else from its file.
            *args: Positional arguments of `function`.
            world: Ranks.
            coords: Where each rank stands, in rank order, for error messages.
            timeout: Seconds from the fork until a run that has not ended counts as hung.
            backend: Of `torch.distributed`'s default process group; `None` for no process group.
            env: Environment variables on top.
            memory_limit: Bytes that a rank may allocate (RLIMIT_DATA) beyond what it has when `function` is called.
            **kwargs: Keyword arguments of `function`.

        Raises:
            RankFailure: A rank raised, exited, was killed, ran out of memory, or did not end in time.
            ZygoteError: The zygote could not start or died.
            ValueError, TypeError: The request itself is wrong.
        """
        if world < 1 or timeout <= 0:
            raise ValueError(f"expected world >= 1 and timeout > 0, found world={world} and timeout={timeout}")
        if coords is not None and len(coords) != world:
            raise ValueError(f"expected one coord a rank, found {len(coords)} for world={world}")
        reference = _reference(function)
        threads = str(self._threads)
        environ = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "WORLD_SIZE": str(world)}
        environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a laptop's host name may resolve to nowhere
        # No rank goes on, and perhaps leaves, while another still connects the group that both have just made.
        environ.setdefault("TORCH_DIST_INIT_BARRIER", "1")
        with self._lock:
            process = self._running()
            folder = process.folder / "run"
            try:
                process.wait_ready()
                folder.mkdir()
                try:
                    write(folder / "arguments", (args, kwargs))
                except (TypeError, AttributeError, pickle.PicklingError) as error:
                    raise TypeError(f"the arguments of {reference} must be what pickle can carry: {error}") from error
                order = Order(
                    function=reference,
                    folder=folder,
                    world=world,
                    threads=self._threads,
                    backend=backend,
                    group_timeout=timeout + 60,  # it is the run that tells of a hang, with stacks, not a collective
                    memory_limit=memory_limit,
                    environ={**environ, **(env or {})},
                    sys_path=_sys_path(),
                    cwd=str(Path.cwd()),
                )
                observed = Observed(order=order, coords=coords, timeout=timeout, zygote=process.pid)
                _watch(process, observed)
                failure = judge(observed)
                if failure is not None:
                    raise failure
                return [read(folder / f"{rank}.value") for rank in range(world)]
            except (EOFError, BrokenPipeError, ConnectionResetError) as error:
                raise ZygoteError(f"{process.obituary()}, while {reference} ran in {world} ranks") from error
            finally:
                if process.busy:
                    # Interrupted, from the keyboard or by an alarm: the socket may hold half a message.
                    self.close()
                else:
                    shutil.rmtree(folder)

    def _running(self) -> _Process:
        if self._process is not None and self._process.owner != os.getpid():
            self._process = None  # this is a fork of the process that started it, and has no part in it
        if self._process is not None and self._process.died():
            warnings.warn(
                f"{self._process.obituary()}, between two runs; starting another", RuntimeWarning, stacklevel=3
            )
            self.close()
        if self._process is None:
            if rank_process.in_rank:
                raise ZygoteError(
                    "a rank cannot start ranks: in a script, put what does under `if __name__ == '__main__'`, for the "
                    "script is read again in each rank"
                )
            if sys.platform != "linux":
                raise ZygoteError(f"ranks are forked on Linux only, found {sys.platform}: run in a Linux container")
            self._process = _Process(self._preload)
            # Called once: by `close`, when nobody holds the zygote any more, or when the interpreter ends.
            self._end = weakref.finalize(self, self._process.end)
        return self._process


class _Process:
    """A started zygote: its process, the socket to it, and its private folder."""

    def __init__(self, preload: tuple[str, ...]) -> None:
        self.owner = os.getpid()
        self.busy = True  # until the zygote waits for an order: a run or the imports are under way
        self.pids: tuple[int, ...] = ()
        self.folder = Path(tempfile.mkdtemp(prefix="parity-ranks-"))
        self._ready = False
        self._conn, theirs = Pipe()
        try:
            with theirs, (self.folder / "zygote.log").open("wb") as log:
                self._conn.send(Setup(parent=self.owner, preload=preload, folder=self.folder))
                # One thread: a pool that an import starts would be lost in the fork, its locks perhaps held. And a CUDA
                # that was asked for its devices, other than through NVML, is of no use to a fork.
                threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _BOOT, str(theirs.fileno()), *_sys_path()],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C goes to the caller alone, who ends what runs
                    env=os.environ | threads | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
                )
        except BaseException:
            shutil.rmtree(self.folder)
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def conn(self) -> Connection[Any, Any]:
        return self._conn

    def died(self) -> bool:
        return self._process.poll() is not None

    def wait_ready(self) -> None:
        """Wait for the imports."""
        if self._ready:
            return
        if not self._conn.poll(_START_LIMIT):
            raise ZygoteError(f"the zygote's imports took longer than {_START_LIMIT:.0f} s\n{self._log()}")
        message: Ready | Broken = self._conn.recv()
        if isinstance(message, Broken):
            raise ZygoteError(
                f"the zygote could not import {message.module}: mend it, or leave it out of `preload`\n{message.reason}"
            )
        if message.unsafe:
            warnings.warn(
                f"{'; '.join(message.unsafe)}: forked ranks may hang. Leave it out of `preload`",
                RuntimeWarning,
                stacklevel=3,
            )
        self._ready, self.busy = True, False

    def obituary(self) -> str:
        """How the zygote died, and the end of what it wrote."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_LIMIT)
        code = self._process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return f"the zygote (pid {self.pid}) died ({how}){self._log()}"

    def _log(self) -> str:
        lines = log_tail(self.folder / "zygote.log")
        return f"\nit wrote:\n{lines}\n" if lines else ""

    def end(self) -> None:
        """End the zygote and its ranks, wait for that, and remove the folder."""
        if self.owner != os.getpid():
            return
        self._conn.close()  # the zygote then kills and reaps what it has, and leaves
        if not self._ready:
            self._process.kill()  # in the middle of its imports it would not notice
        try:
            self._process.wait(_END_LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.returncode and self.pids:
            # It could not do so itself. The ranks die with it; what they had started in their group does not.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pids[0], signal.SIGKILL)
            limit = time.monotonic() + _END_LIMIT
            while any(memory(pid, "VmSize") for pid in self.pids) and time.monotonic() < limit:
                time.sleep(0.005)
        shutil.rmtree(self.folder, ignore_errors=True)


def _watch(process: _Process, observed: Observed) -> None:
    """Send the order and stay with it until none of its processes is left, noting what happens."""
    conn, order = process.conn, observed.order
    process.busy = True
    conn.send(order)
    deadline = time.monotonic() + observed.timeout
    while True:
        if conn.poll(_SAMPLE_EVERY):
            message: Started | Ended | Gone = conn.recv()
            if isinstance(message, Started):
                process.pids = observed.pids = message.pids
            elif isinstance(message, Ended):
                observed.end(message.rank, message.code, message.at)
            else:
                process.pids, process.busy = (), False
                return
        else:
            observed.sample()
        now = time.monotonic()
        if observed.killed_at is not None:
            if now > observed.killed_at + _END_LIMIT:
                raise ZygoteError(f"the ranks of {order.function} did not die within {_END_LIMIT:.0f} s")
        elif observed.failed_at is not None:
            if now > observed.failed_at + (_PEER_GRACE if observed.cause_known else _CAUSE_GRACE):
                observed.killed_at = now
                conn.send(Kill())
        elif now > deadline:
            conn.send(Dump())
            observed.collect_stacks()
            observed.killed_at = time.monotonic()
            conn.send(Kill())


def _reference(function: str | Callable[..., Any]) -> Reference:
    """How a rank finds `function`.

    Raises:
        ValueError: It is not a module's own, by the name that it has.
    """
    if isinstance(function, str):
        name, _, qualname = function.partition(":")
        if not name or not qualname:
            raise ValueError(f"expected 'module:qualname', found {function!r}")
    else:
        name, qualname = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
        found: Any = sys.modules.get(name)
        for part in qualname.split("."):
            found = getattr(found, part, None)
        if not qualname or found != function:
            raise ValueError(
                f"expected a function that a rank can find by name, at the top level of a module, found {function!r}: "
                "move it there, and pass what it closes over as arguments"
            )
    return Reference(module=name, qualname=qualname, file=getattr(sys.modules.get(name), "__file__", None))


def _sys_path() -> tuple[str, ...]:
    return tuple(str(entry) or str(Path.cwd()) for entry in sys.path)
