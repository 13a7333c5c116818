"""What is seen of a run's ranks, and the judgement of it: which rank failed first, how, and what to do next."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from parity.pickled import read
from parity.rank_process import Kind, Order, Raised, is_out_of_memory, memory

_LOG_LINES = 40
_STACK_LIMIT = 2.0  # seconds that the dump of all stacks may take

# What a rank says that lost a peer. Not the mere name of a transport: unequal shapes are reported by it too.
_LOST_PEER = re.compile(
    r"(connection (was )?(closed|reset|aborted)|closed by (remote )?peer|broken pipe|connection refused|socket closed"
    r"|remote process exited|ncclRemoteError|failed to (recv|send)|DistNetworkError|DistStoreError)",
    re.IGNORECASE,
)

# Frames of the harness itself, below those of the function.
_OWN_FRAME = re.compile(r'^ +File "(<string>|[^"]*/parity/(rank_process|zygote)\.py)".*\n?', re.MULTILINE)

# The innermost Python frame of a thread, in a dump of faulthandler, lies in torch.distributed.
_IN_COLLECTIVE = re.compile(r'hread 0x[^\n]*\n +File "[^"]*/torch/distributed/')

_HINTS: dict[Kind, str] = {
    "exception": "",
    "timeout": "",
    "exit": "the function, or a library that it calls, ended the process: let it return or raise",
    "signal": "SIGSEGV, SIGBUS, SIGFPE, SIGILL and SIGABRT come from native code, whose last words are below; "
    "SIGKILL and SIGTERM come from outside the run",
    "memory": "run fewer ranks or fewer pytest workers at once, or a smaller model or dtype, or raise the limit "
    "(memory_limit, or that of the container)",
}


class RankFailure(Exception):
    """A rank failed, and with it the run.

    Attributes:
        rank: The rank that failed first.
        coord: Where it stands, such as "tp=1 pp=0"; "" where the run had no coords.
        kind: "exception", "signal", "timeout", "memory" or "exit".
        traceback: Its traceback, or at a timeout its stacks; "" where it died without.
    """

    def __init__(self, message: str, rank: int, coord: str, kind: Kind, traceback: str) -> None:
        super().__init__(message, rank, coord, kind, traceback)
        self.rank = rank
        self.coord = coord
        self.kind = kind
        self.traceback = traceback

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, kw_only=True)
class End:
    """How one rank ended: `kind` is how it failed, if it did; `killed`, by the run. `at` is from `time.monotonic`."""

    rank: int
    kind: Kind | None
    summary: str
    traceback: str
    at: float
    killed: bool = False

    @property
    def returned(self) -> bool:
        """Whether the function returned."""
        return self.kind is None and not self.killed

    @property
    def lost_peer(self) -> bool:
        """Whether it is what a rank shows when another one fails."""
        return self.kind == "exception" and _LOST_PEER.search(self.summary) is not None


@dataclass(kw_only=True)
class Observed:
    """What is known of a run. Memory in bytes, times from `time.monotonic`."""

    order: Order
    coords: Sequence[object] | None
    timeout: float
    zygote: int
    pids: tuple[int, ...] = ()
    ends: dict[int, End] = field(default_factory=dict)
    resident: dict[int, int] = field(default_factory=dict)
    stacks: dict[int, str] = field(default_factory=dict)
    killed_at: float | None = None

    def __post_init__(self) -> None:
        self._oom_kills = oom_kills(self.zygote)

    @property
    def failures(self) -> list[End]:
        """The ranks that failed by themselves, the likeliest cause first."""
        return sorted((end for end in self.ends.values() if end.kind), key=lambda end: (end.lost_peer, end.at))

    @property
    def failed_at(self) -> float | None:
        """When the first rank failed."""
        return min((end.at for end in self.failures), default=None)

    @property
    def cause_known(self) -> bool:
        """Whether a failure is more than the echo of another one."""
        return any(not end.lost_peer for end in self.failures)

    def label(self, rank: int) -> str:
        """The rank with its coord."""
        return f"rank {rank} ({self.coords[rank]})" if self.coords is not None else f"rank {rank}"

    def sample(self) -> None:
        """Note how much memory each living rank has."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.ends and (resident := memory(pid, "VmRSS")):
                self.resident[rank] = resident

    def end(self, rank: int, code: int, at: float) -> None:
        """Note that the process of `rank` is over, with the exit code `code` (or minus the signal)."""
        self.ends[rank] = self._ended(rank, code, at)

    def collect_stacks(self) -> None:
        """Wait for the stacks that the living ranks have been asked for."""
        waiting = [rank for rank in range(self.order.world) if rank not in self.ends]
        limit = time.monotonic() + _STACK_LIMIT
        while waiting and time.monotonic() < limit:
            time.sleep(0.02)
            before = dict(self.stacks)
            for rank in waiting:
                with contextlib.suppress(OSError):
                    stack = (self.order.folder / f"{rank}.stack").read_text(errors="replace")
                    self.stacks[rank] = _OWN_FRAME.sub("", stack)
            # The dump has no end mark: it is whole when it stops growing.
            waiting = [r for r in waiting if not self.stacks.get(r) or self.stacks[r] != before.get(r)]

    def _ended(self, rank: int, code: int, at: float) -> End:
        folder, ours = self.order.folder, self.killed_at is not None
        if (folder / f"{rank}.value").exists() and (code == 0 or ours):
            return End(rank=rank, kind=None, summary="had returned", traceback="", at=at)
        raised: Raised | None = None
        with contextlib.suppress(FileNotFoundError):
            raised = read(folder / f"{rank}.failure")
        # What a rank says after the kill, such as that a peer is gone, is our own doing.
        if raised is not None and (self.killed_at is None or raised.at < self.killed_at):
            self.resident[rank] = raised.resident
            return End(rank=rank, kind=raised.kind, summary=raised.summary, traceback=raised.traceback, at=raised.at)
        if ours and (raised is not None or code == -signal.SIGKILL):
            return End(rank=rank, kind=None, summary="was still running", traceback="", at=at, killed=True)
        kind: Kind = "exit"
        summary = f"exited with code {code} before it returned"
        if code < 0:
            kind, summary = "signal", f"killed by {signal.Signals(-code).name}"
            if code == -signal.SIGKILL and oom_kills(self.zygote) > self._oom_kills:
                kind, summary = "memory", "killed by the kernel, which was out of memory"
            elif code == -signal.SIGABRT and is_out_of_memory(log_tail(folder / f"{rank}.log")):
                kind, summary = "memory", "aborted by an allocation that failed"
        return End(rank=rank, kind=kind, summary=summary, traceback="", at=at)


def judge(observed: Observed) -> RankFailure | None:
    """The failure of the run, or `None` when every rank returned."""
    if failures := observed.failures:
        return _failure(observed, failures[0])
    if any(end.killed for end in observed.ends.values()):
        return _hang(observed)
    return None


def _failure(observed: Observed, cause: End) -> RankFailure:
    assert cause.kind is not None
    order = observed.order
    text = [f"{observed.label(cause.rank)} of {order.world} failed in {order.function}: {_first_line(cause.summary)}"]
    if cause.kind == "memory":
        resident = observed.resident.get(cause.rank)
        found = f"{resident / 2**20:.0f} MiB resident" if resident else "no sample taken of its memory"
        limit = "" if order.memory_limit is None else f", under a limit of {order.memory_limit / 2**20:.0f} MiB more"
        text.append(f"out of memory, with {found} when last seen{limit}")
    if hint := _HINTS[cause.kind]:
        text.append(hint)
    returned = [observed.label(end.rank) for end in observed.ends.values() if end.returned]
    if cause.lost_peer and returned:
        text.append(f"it waited for a peer, but {', '.join(returned)} had returned: do all make the same collectives?")
    if cause.traceback:
        text += ["", cause.traceback.rstrip()]
    if lines := log_tail(order.folder / f"{cause.rank}.log"):
        text += ["", f"the end of what {observed.label(cause.rank)} wrote:", lines]
    others = [end for rank, end in sorted(observed.ends.items()) if rank != cause.rank]
    if others:
        text += ["", "the other ranks:"]
        text += [f"  {observed.label(end.rank)}: {_first_line(end.summary)}" for end in others]
    return _rank_failure(observed, cause.rank, cause.kind, cause.traceback, text)


def _hang(observed: Observed) -> RankFailure:
    """Blames the first rank that neither returned nor waits in `torch.distributed` for somebody else."""
    order = observed.order
    hung = [rank for rank in range(order.world) if observed.ends[rank].killed]
    waiting = {rank for rank in hung if _IN_COLLECTIVE.search(observed.stacks.get(rank, ""))}
    suspect = min(hung, key=lambda rank: (rank in waiting, rank))
    text = [
        f"{observed.label(suspect)} of {order.world} hung: {order.function} did not end within {observed.timeout:g} s. "
        "Where it is only slow, raise the timeout"
    ]
    for rank in range(order.world):
        if rank not in hung:
            text += ["", f"{observed.label(rank)} {observed.ends[rank].summary}"]
            continue
        state = "waits in torch.distributed" if rank in waiting else "was still running"
        stack = observed.stacks.get(rank, "").rstrip() or "  no stack: it did not answer the signal (stopped?)"
        text += ["", f"{observed.label(rank)} {state}:", stack]
    if lines := log_tail(order.folder / f"{suspect}.log"):
        text += ["", f"the end of what {observed.label(suspect)} wrote:", lines]
    return _rank_failure(observed, suspect, "timeout", observed.stacks.get(suspect, ""), text)


def _rank_failure(observed: Observed, rank: int, kind: Kind, traceback: str, text: list[str]) -> RankFailure:
    coord = "" if observed.coords is None else str(observed.coords[rank])
    return RankFailure("\n".join(text), rank, coord, kind, traceback)


def _first_line(text: str, limit: int = 160) -> str:
    line = text.partition("\n")[0]
    return line if len(line) <= limit else f"{line[:limit]}..."


def log_tail(path: Path, lines: int = _LOG_LINES) -> str:
    """The last lines of a log, of which at most 64 KiB are read; "" where there is none."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    return ""


def oom_kills(pid: int) -> int:
    """How many processes the kernel's out-of-memory killer has ended in the cgroup of `pid`, or in all where unknown.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst `memory.events`, cgroup-v1/memory.rst `memory.oom_control`;
        the field is called oom_kill in both, and in /proc/vmstat.
    """
    places = [Path("/proc/vmstat")]
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers == "memory":
                roots, name = ["/sys/fs/cgroup/memory"], "memory.oom_control"
            elif controllers == "":
                roots, name = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"], "memory.events"
            else:
                continue
            # In a container the path may be the host's, while the mount begins at the container's own group.
            places[:0] = [Path(root) / inside / name for inside in (group.strip("/"), "") for root in roots]
    for place in places:
        with contextlib.suppress(OSError):
            for line in place.read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0
