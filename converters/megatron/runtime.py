"""Megatron-Core on a machine without a GPU: each thing that it asks of CUDA, answered by the CPU.

`install` is for a rank process that has no GPU and nothing else to do: it changes the process for good. The computation
stays Megatron-Core's own; only where tensors live and what a stream is are answered differently.

| what is asked                            | the answer here       | who asks                                |
|------------------------------------------|-----------------------|-----------------------------------------|
| `device="cuda"`, in any torch call       | `device="cpu"`        | pipeline schedules, causal mask, DDP    |
| `pin_memory=True`, `Tensor.pin_memory()` | not pinned            | RoPE under CP                           |
| `Tensor.cuda()`                          | the tensor itself     | RoPE under CP, tied embeddings under PP |
| `torch.cuda.current_device()`            | `torch.device("cpu")` | every parameter, all communication      |
| `torch.cuda.synchronize()`               | nothing to wait for   | batched pipeline communication          |
| `torch.cuda` RNG state and `manual_seed` | the CPU generator     | seeding, dropout, recompute             |
| `torch.cuda` streams and events          | stand-ins, no effect  | 0.19 DDP, MoE all-to-all                |
| a queue in a spawned manager             | a queue right here    | saving (see `_save_in_this_process`)    |
| token counts as NumPy, if on CUDA        | on the CPU too        | MoE all-to-all                          |
| `te_general_gemm`, where TE is missing   | `None`                | MoE router of 0.16                      |

The first three are a `TorchFunctionMode`, which leaves torch's factories as they are: code that names no CUDA device,
such as transformers loading a model, sees no difference. Patching the factories instead would leave transformers'
non-persistent buffers (rotary `inv_freq`) uninitialised without an error.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import queue
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from converters.errors import ConversionError

CPU = torch.device("cpu")
_installed = False


class RuntimeUnavailableError(ConversionError):
    """Megatron-Core cannot run in this process as it stands."""


def _names_cuda(device: object) -> bool:
    """Whether `device`, as torch's functions take it (a device, a string, an ordinal), is a CUDA device."""
    if isinstance(device, bool):
        return False
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) or (isinstance(device, str) and device.split(":")[0] == "cuda")


class CudaOnCpu(TorchFunctionMode):
    """While active, torch calls that name a CUDA device, or pinned memory, use plain CPU memory instead."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Rewrite the device of one call, and make it."""
        if func in _IDENTITY:
            return args[0]
        kwargs = kwargs or {}
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


_IDENTITY = frozenset({torch.Tensor.cuda, torch.Tensor.pin_memory})


class _InOrder:
    """A stream or an event where everything already runs in program order: every wait is over at once."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def _nothing(self, *_: Any, **__: Any) -> None: ...

    wait = record = synchronize = wait_stream = wait_event = _nothing

    def record_event(self, event: Any = None) -> Any:
        return event or _InOrder()

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


@contextlib.contextmanager
def _on_stream(_: Any) -> Iterator[None]:
    yield


def _cpu_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_cpu_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


def _seed_cpu(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _host_tensor(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _quiet_about_cpu_rng(record: logging.LogRecord) -> bool:
    """Drop Megatron's warning that the CPU generator moved in a GPU region: here they are one generator."""
    return "CPU RNG state changed" not in record.getMessage()


_CUDA: dict[str, Any] = {
    "current_device": lambda: CPU,
    "synchronize": _InOrder()._nothing,
    "get_rng_state": _cpu_rng_state,
    "set_rng_state": _set_cpu_rng_state,
    "manual_seed": _seed_cpu,
    "Stream": _InOrder,
    "Event": _InOrder,
    "current_stream": _InOrder,
    "default_stream": _InOrder,
    "stream": _on_stream,
}
# (module, name, value): replaced where that Megatron-Core release has the name.
_MEGATRON: tuple[tuple[str, str, Any], ...] = (
    ("tensor_parallel.random", "_get_cuda_rng_state", _cpu_rng_state),
    ("tensor_parallel.random", "_set_cuda_rng_state", _set_cpu_rng_state),
    ("transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu", _host_tensor),
)


def installed() -> bool:
    """Whether this process runs Megatron-Core without a GPU."""
    return _installed


def install() -> None:
    """Let Megatron-Core run on the CPU in this process, from now to its end. Calling it again does nothing.

    The mode belongs to the calling thread: call it from the thread that runs the model.

    Raises:
        RuntimeUnavailableError: There is a GPU. Redirecting it would silently measure something else.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise RuntimeUnavailableError(
            "the CPU runtime is for processes without a GPU, and torch.cuda.is_available() is True here. "
            "Run Megatron-Core as it is, or hide the GPUs with CUDA_VISIBLE_DEVICES= before Python starts"
        )
    for name, value in _CUDA.items():
        setattr(torch.cuda, name, value)
    for name in ("get_rng_state", "set_rng_state", "manual_seed"):
        setattr(torch.cuda.random, name, _CUDA[name])
    for module_name, name, value in _MEGATRON:
        module = importlib.import_module(f"megatron.core.{module_name}")
        if hasattr(module, name):
            setattr(module, name, value)
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_quiet_about_cpu_rng)
    _without_transformer_engine()
    _save_in_this_process()
    CudaOnCpu().__enter__()  # type: ignore[no-untyped-call]  # torch leaves it untyped; never left again
    _installed = True


def require() -> None:
    """Check that Megatron-Core can run here.

    Raises:
        RuntimeUnavailableError: There is no GPU and `install` was not called.
    """
    if not _installed and not torch.cuda.is_available():
        raise RuntimeUnavailableError(
            "Megatron-Core needs a GPU, and torch.cuda.is_available() is False here. To run it on the CPU, call "
            "converters.megatron.runtime.install() first, in a process of its own"
        )


def _without_transformer_engine() -> None:
    """0.16 reads `te_general_gemm` in the MoE router although the import that binds it failed."""
    moe = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe, "te_general_gemm"):
        moe.te_general_gemm = None  # type: ignore[attr-defined]


def _save_in_this_process() -> None:
    """`dist_checkpointing`: one queue object, since the threads that write and the one that reads are all here.

    Upstream's belongs to a manager process, which it spawns: that re-imports `__main__`, and can outlive the run.
    """
    writer = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    results: queue.Queue[Any] = queue.Queue()
    for name in ("_get_write_results_queue", "get_write_results_queue"):
        if hasattr(writer, name):
            setattr(writer, name, lambda *_, **__: results)
