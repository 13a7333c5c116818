"""What the tests run in ranks. Nothing heavy is imported with the module: some zygotes have no torch."""

from __future__ import annotations

import ctypes
import os
import pickletools
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

FOREVER = 3600.0
calls: list[int] = []


class NotForPickle:
    def __reduce__(self) -> str:
        raise TypeError("no pickle of this")


def place() -> tuple[int, int, dict[str, str | None], str]:
    """Rank and world as torch knows them, the environment, and the working directory."""
    import torch.distributed as dist

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "COLOUR", "FRUIT")
    return dist.get_rank(), dist.get_world_size(), {name: os.environ.get(name) for name in names}, str(Path.cwd())


def summed(scale: float, *, dtype: str = "float32") -> Any:
    """The all-reduced sum of rank * scale, shape (2,)."""
    import torch
    import torch.distributed as dist

    value = torch.full((2,), dist.get_rank() * scale, dtype=getattr(torch, dtype))
    dist.all_reduce(value)
    return value


def torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def remembered(value: int) -> tuple[int, list[int]]:
    """This process, and what earlier calls in it have left."""
    calls.append(value)
    os.environ["LEFT_BEHIND"] = "yes"
    return os.getpid(), list(calls)


def left_behind() -> str | None:
    return os.environ.get("LEFT_BEHIND")


def large() -> dict[str, Any]:
    """40 MB of float32, and tensors of several kinds, two of them views of the same memory."""
    import torch

    whole = torch.arange(8, dtype=torch.bfloat16)
    return {
        "large": torch.arange(10_000_000, dtype=torch.float32),
        "head": whole[:3],
        "tail": whole[3:],
        "transposed": torch.arange(6).reshape(2, 3).t(),
        "empty": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(2, dtype=torch.float64)),
        "fp8": torch.tensor([0.5, -448.0]).to(torch.float8_e4m3fn),
    }


def pickled(path: str) -> list[str]:
    """Write tensors of unusual kinds and read them again; the strings in the pickle of a plain one."""
    import torch

    from parity.pickled import read, write

    noted: Any = torch.ones(1)
    noted.note = "kept"
    write(Path(path), [noted, torch.tensor([1 + 2j]).conj(), torch.eye(2).to_sparse(), torch.empty(3, device="meta")])
    noted, conjugate, sparse, meta = read(Path(path))
    assert noted.note == "kept"
    assert conjugate.tolist() == [1 - 2j]
    assert sparse.to_dense().tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert (meta.device.type, meta.shape) == ("meta", (3,))
    write(Path(path), torch.ones(2))
    found = [argument for _, argument, _ in pickletools.genops(Path(path).read_bytes())]
    return [argument for argument in found if isinstance(argument, str)]


def early_return() -> float:
    """Ranks 0, which serves the store, and 3 return at once; then 1 and 2 still use the store and a group of theirs."""
    import torch
    import torch.distributed as dist

    rank = dist.get_rank()
    pids = process_ids()
    group = dist.new_group([1, 2])
    value = torch.ones(1) * rank
    if rank in (1, 2):
        until_gone(pids[3])
        store = dist.distributed_c10d._get_default_store()
        for turn in range(100):
            store.set(f"{rank}/{turn}", "x")
            store.get(f"{3 - rank}/{turn}")
        dist.all_reduce(value, group=group)
    return float(value)


def process_ids() -> list[int]:
    """The pids of all ranks, over a collective."""
    import torch
    import torch.distributed as dist

    pids = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(pids, torch.tensor([os.getpid()]))
    return [int(pid) for pid in pids]


def until_gone(pid: int) -> None:
    """Wait until the process is gone, or a zombie."""
    line = Path(f"/proc/{pid}/cmdline")
    while line.exists() and line.read_bytes():
        time.sleep(0.005)


def fail(how: str, culprit: int, peers: str) -> None:
    """Rank `culprit` fails in one of several ways while its peers sleep, or wait for it in a collective."""
    rank = int(os.environ["RANK"])
    print(f"rank {rank} speaks")
    if rank != culprit:
        if peers == "collective":
            summed(1.0)
        time.sleep(FOREVER)
    elif how == "exception":
        raise ValueError("seven is not eight")
    elif how == "sys.exit":
        sys.exit("enough")
    elif how == "os._exit(3)":
        os._exit(3)
    elif how == "os._exit(0)":
        os._exit(0)
    elif how == "SIGSEGV":
        ctypes.string_at(0)
    elif how == "abort":
        os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n")
        os.abort()
    else:
        os.kill(os.getpid(), getattr(signal, how))


def echo_before_cause() -> None:
    """Rank 0 loses its peer, fails and is gone; only then does rank 1, the peer, say what is wrong with it."""
    import torch
    import torch.distributed as dist

    pids = process_ids()
    if dist.get_rank() == 1:
        dist.destroy_process_group()
        until_gone(pids[0])
        time.sleep(0.2)  # so that the run has seen rank 0 fail, and still does not make up its mind
        raise ValueError("the cause")
    dist.all_reduce(torch.zeros(1))


def missed_collective() -> None:
    """Rank 1 returns where rank 0 waits for it."""
    import torch.distributed as dist

    process_ids()
    if dist.get_rank() == 0:
        summed(1.0)


def late_for_a_group() -> bool:
    """Rank 1 comes late to the making of rank 0's group; whether rank 0 waited for it."""
    import torch.distributed as dist

    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 1:
        time.sleep(0.5)
        store.set("late", "1")
    dist.new_group([0])
    return bool(store.check(["late"]))


def unequal_shapes() -> None:
    """Rank 0 sends more than rank 1 has room for."""
    import torch
    import torch.distributed as dist

    dist.broadcast(torch.zeros(1000 - 900 * dist.get_rank()), 0)


def hang() -> int:
    """Rank 0 returns, rank 1 waits for it in a collective, rank 2 is busy elsewhere, rank 3 is stopped."""
    rank = int(os.environ["RANK"])
    if rank == 1:
        summed(1.0)
    elif rank == 2:
        busy_elsewhere()
    elif rank == 3:
        os.kill(os.getpid(), signal.SIGSTOP)
    return rank


def busy_elsewhere() -> None:
    time.sleep(FOREVER)


def allocate(size: int, how: str) -> int:
    """Touch `size` bytes."""
    if how == "torch":
        import torch

        return int(torch.ones(size, dtype=torch.uint8)[-1])
    return len(b"x" * size)


def interrupt(parent: int) -> None:
    """Press Ctrl-C in the parent, as it were."""
    if os.environ["RANK"] == "0":
        os.kill(parent, signal.SIGINT)
    time.sleep(FOREVER)


def kill_zygote(note: str) -> None:
    """Leave a child that would outlive everything, note its pid, and kill the zygote."""
    child = subprocess.Popen(["sleep", str(FOREVER)])
    Path(note).write_text(str(child.pid))
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(FOREVER)


def leave_a_child() -> int:
    """The pid of a child in a session of its own, which no signal to a process group reaches."""
    return subprocess.Popen(["sleep", str(FOREVER)], start_new_session=True).pid


def leave_a_thread() -> str:
    threading.Thread(target=time.sleep, args=(FOREVER,)).start()
    return "returned"


def note_and_sleep(folder: str) -> None:
    """Write down the pids of this rank and of the zygote, then sleep."""
    part = Path(folder, f"{os.environ['RANK']}.part")
    part.write_text(f"{os.getpid()} {os.getppid()}")
    part.rename(part.with_suffix(".pids"))
    time.sleep(FOREVER)


def same(value: object) -> object:
    return value


def not_picklable() -> object:
    return NotForPickle()


def modules() -> set[str]:
    return set(sys.modules)
