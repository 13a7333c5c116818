"""The life of one rank, from the fork to the file that holds its result.

`live` runs in a fresh fork of the zygote. It makes the fork look like a process that the caller has just started, loads
the function, joins the process group, calls, and leaves what came of it in the request's folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import faulthandler
import importlib
import importlib.util
import io
import os
import pickle
import re
import resource
import signal
import socket
import sys
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from parity.pickled import read, write

Kind = Literal["exception", "signal", "timeout", "memory", "exit"]

_OUT_OF_MEMORY = re.compile(r"not enough memory: you tried to allocate|bad_alloc|Cannot allocate memory|out of memory")

in_rank = False  # whether this process is a rank


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A module-level function by name, and the file of its module where the caller knows it."""

    module: str
    qualname: str
    file: str | None

    def __str__(self) -> str:
        return f"{self.module}:{self.qualname}"


@dataclass(frozen=True, kw_only=True)
class Order:
    """One request: `world` fresh ranks that call `function`. `group_timeout` in seconds, `memory_limit` in bytes.

    `folder` holds `arguments` (pickled args and kwargs) and receives `<rank>.log`, `<rank>.stack`, and of each rank
    either `<rank>.value` (its pickled result) or `<rank>.failure` (a pickled `Raised`). It is private to the user, and
    what is in it was written by this program: that is why it may be unpickled.
    """

    function: Reference
    folder: Path
    world: int
    threads: int
    backend: str | None
    group_timeout: float
    memory_limit: int | None
    environ: dict[str, str]
    sys_path: tuple[str, ...]
    cwd: str


@dataclass(frozen=True, kw_only=True)
class Raised:
    """What a rank's function raised, as text; `resident` in bytes at that moment, `at` as `time.monotonic`."""

    kind: Kind
    summary: str
    traceback: str
    resident: int
    at: float


def live(order: Order, rank: int, zygote: int, listener: socket.socket | None) -> NoReturn:
    """Do what `order` says as `rank`, then end the process. To be called in the child, right after the fork.

    Args:
        order: The request.
        rank: This process's rank in it.
        zygote: The pid of the process that forked.
        listener: The open socket at which rank 0 is to serve the store; `None` without a process group.
    """
    global in_rank
    in_rank = True
    code = 1
    try:
        _settle(order, rank, zygote)
        try:
            _work(order, rank, listener)
            code = 0
        except BaseException as error:
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))  # room to tell the tale
            write(order.folder / f"{rank}.failure", _raised(error))
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # neither exit handlers nor threads of the function can hold a rank back


def prctl(option: int, value: int) -> None:
    """Set one attribute of this process, as Linux's prctl does.

    Raises:
        OSError: The kernel refuses.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def memory(pid: int | str, field: str) -> int:
    """Bytes in a `Vm...` field of /proc/`pid`/status; 0 when the process is gone or a zombie."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0


def is_out_of_memory(text: str) -> bool:
    """Whether an error's text is that of an allocation that failed."""
    return _OUT_OF_MEMORY.search(text) is not None


def _settle(order: Order, rank: int, zygote: int) -> None:
    """Make the fork look like a process that the caller has just started: environment, folder, path, output."""
    prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != zygote:
        os._exit(1)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")  # rather a rank than the process that runs the tests
    log = os.open(order.folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for fd in (1, 2):
        os.dup2(log, fd)
    os.close(log)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a rank that is killed flushes nothing
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, file=(order.folder / f"{rank}.stack").open("w"), all_threads=True)
    os.environ.clear()
    os.environ.update(order.environ, RANK=str(rank), LOCAL_RANK=str(rank))
    os.chdir(order.cwd)
    sys.path[:] = order.sys_path


def _work(order: Order, rank: int, listener: socket.socket | None) -> None:
    """Load the function, join the process group, call, and leave the result in a file."""
    function = _load(order.function)
    args, kwargs = read(order.folder / "arguments")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(order.threads)
    store = None if listener is None else _join(order, rank, listener)
    if order.memory_limit is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (memory("self", "VmData") + order.memory_limit, hard))
    value = function(*args, **kwargs)
    try:
        write(order.folder / f"{rank}.value", value)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise TypeError(
            f"{order.function} must return what pickle can carry, found {type(value).__qualname__}: {error}. "
            "Return tensors, arrays, numbers, and containers of them"
        ) from error
    if store is not None:
        # Rank 0 serves the store: it must not leave while a peer may still ask it for something.
        if rank:
            store.set(f"parity/returned/{rank}", "")
        elif order.world > 1:
            store.wait([f"parity/returned/{peer}" for peer in range(1, order.world)])


def _join(order: Order, rank: int, listener: socket.socket) -> Any:
    """Start `torch.distributed`; the store.

    The store sits on a loopback port that was open before the fork, so nobody else can take it in between. A
    `FileStore` polls: with Megatron's parallel state, ranks are ready three times later.
    """
    import torch
    from torch.distributed import TCPStore, init_process_group  # type: ignore[attr-defined]

    assert order.backend is not None
    if "nccl" in order.backend:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    host, port = listener.getsockname()
    timeout = datetime.timedelta(seconds=order.group_timeout)
    serving = listener.detach()  # rank 0's store closes it
    if rank:
        os.close(serving)
    store = TCPStore(
        host,
        port,
        order.world,
        rank == 0,
        timeout,
        wait_for_workers=False,
        master_listen_fd=None if rank else serving,
    )
    init_process_group(order.backend, store=store, rank=rank, world_size=order.world, timeout=timeout)
    return store


def _load(reference: Reference) -> Callable[..., Any]:
    target: Any = _module(reference.module, reference.file)
    for part in reference.qualname.split("."):
        target = getattr(target, part)
    found: Callable[..., Any] = target
    return found


def _module(name: str, file: str | None) -> types.ModuleType:
    """The module `name`: imported by name where that leads to `file`, else executed from `file` under that name."""
    if file is None:
        return importlib.import_module(name)
    if name == "__main__":
        # multiprocessing's name for the main module of a parent, registered in the parent too: what a rank returns can
        # be unpickled there. It also keeps `if __name__ == "__main__"` from running the script again.
        name = "__mp_main__"
    else:
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(name)
            if spec is not None and spec.origin is not None and Path(spec.origin).resolve() == Path(file).resolve():
                return importlib.import_module(name)
    folder, parts = Path(file).parent, name.split(".")
    for count in range(len(parts) - 1, 0, -1):  # pickle imports the parents of a dotted name
        package = types.ModuleType(".".join(parts[:count]))
        package.__path__ = [str(folder)]
        sys.modules.setdefault(package.__name__, package)
        folder = folder.parent
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"expected the source of a Python module, found {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if name == "__mp_main__":
        sys.modules["__main__"] = module
    spec.loader.exec_module(module)
    return module


def _raised(error: BaseException) -> Raised:
    """`error` as text, without this module's own frames at its head."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    summary = "".join(traceback.format_exception_only(error)).strip()
    kind: Kind = "exception"
    if isinstance(error, SystemExit):
        kind, summary = "exit", f"sys.exit({error.code!r})"
    elif isinstance(error, MemoryError) or is_out_of_memory(str(error)):
        kind = "memory"
    return Raised(
        kind=kind,
        summary=summary,
        traceback="".join(traceback.format_exception(type(error), error, trace)),
        resident=memory("self", "VmRSS"),
        at=time.monotonic(),
    )
