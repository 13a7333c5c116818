"""Which device a case runs on, found without importing torch."""

from __future__ import annotations

from pathlib import Path

from parity.backends import below_bf16
from parity.case import Case

GPUS = Path("/proc/driver/nvidia/gpus")


def gpus() -> int:
    """GPUs that the NVIDIA driver shows on this machine."""
    return len(list(GPUS.iterdir())) if GPUS.is_dir() else 0


def device_of(case: Case) -> str:
    """`cuda` where a case asks for it, or leaves it open and every rank can have a GPU of its own; else `cpu`."""
    if case.device == "auto":
        return "cuda" if 0 < case.topology.world_size <= gpus() else "cpu"
    return case.device


def lacking(case: Case) -> str:
    """Why this machine cannot run `case`, or an empty string."""
    if device_of(case) == "cuda" and gpus() < case.topology.world_size:
        return f"--device cuda: {case.topology} needs {case.topology.world_size} GPUs, this machine has {gpus()}"
    if device_of(case) == "cuda" and below_bf16(case.precision):
        return _incapable(case.precision)
    return ""


def _incapable(precision: str) -> str:
    """Why the GPUs here cannot run a precision. Asks torch, which is not imported otherwise."""
    import torch

    from converters.te.quantization import compute_capability

    needed, found = compute_capability(precision), torch.cuda.get_device_capability()
    spelled = [".".join(map(str, one)) for one in (needed, found)]
    return f"{precision} needs compute capability {spelled[0]}, this GPU has {spelled[1]}" if found < needed else ""
