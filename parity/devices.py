"""Which device a case runs on, found without importing torch."""

from __future__ import annotations

from pathlib import Path

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
    return ""
