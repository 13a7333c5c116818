"""stub"""
from __future__ import annotations
from typing import Any
import torch
from torch import Tensor
from converters.te.quantization.delayed import DelayedState

def write(delayed: DelayedState | None) -> Tensor:
    return torch.empty(0, dtype=torch.uint8)

def read(saved: Tensor | None, gemms: int, live: DelayedState | None, *, where: str) -> DelayedState | None:
    return live
