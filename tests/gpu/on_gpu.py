"""Where the tests of this folder run, and why they do not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from types import ModuleType
from typing import Any

import pytest
import torch

from converters.te import quantization
from converters.te.quantization import PRECISIONS, compute_capability

DEVICE = "cuda"


def lacking() -> str:
    """Why Transformer Engine's layers cannot run here, or an empty string."""
    if not torch.cuda.is_available():
        return "no NVIDIA GPU on this machine"
    if importlib.util.find_spec("transformer_engine") is None:
        return "transformer-engine is not installed"
    return ""


def lacking_for(precision: str) -> str:
    """Why this GPU cannot run a precision, or an empty string."""
    if reason := lacking():
        return reason
    needed, found = compute_capability(precision), torch.cuda.get_device_capability()
    if found >= needed:
        return ""
    return f"{precision} needs compute capability {needed[0]}.{needed[1]}, this GPU has {found[0]}.{found[1]}"


needs_te = pytest.mark.skipif(bool(lacking()), reason=lacking() or "nothing is missing")


def precisions(*names: str) -> list[Any]:
    """Parameters for precisions below bf16, each skipped where the GPU lacks it."""
    return [
        pytest.param(
            name, marks=pytest.mark.skipif(bool(lacking_for(name)), reason=lacking_for(name) or "nothing is missing")
        )
        for name in names or PRECISIONS
    ]


def transformer_engine() -> ModuleType:
    """`transformer_engine.pytorch`. An installed one that cannot be imported is a failure, not a reason to skip."""
    import transformer_engine.pytorch

    module: ModuleType = transformer_engine.pytorch
    return module


def reset_recipes() -> None:
    """Forget every layer's part in delayed scaling, on both sides: each keeps one list for the process."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()
    quantization.state.reset()


def attention_backend() -> str:
    """The attention that Transformer Engine chose last."""
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention as chosen

    backends = chosen._attention_backends
    if backends["use_flash_attention"]:
        return f"flash {backends['flash_attention_backend']}"
    if backends["use_fused_attention"]:
        return f"fused (cuDNN), sub-backend {int(backends['fused_attention_backend'])}"
    return "unfused" if backends["use_unfused_attention"] else "none"


def describe() -> str:
    """GPU, libraries and switches, on one line."""
    if reason := lacking():
        return f"GPU tests: {reason}"
    major, minor = torch.cuda.get_device_capability()
    return ", ".join(
        [
            f"GPU tests: {torch.cuda.device_count()} x {torch.cuda.get_device_name()}",
            f"compute capability {major}.{minor}",
            f"transformer-engine {importlib.metadata.version('transformer-engine')}",
            f"torch {torch.__version__}",
            f"CUDA {torch.version.cuda}",
            f"cuDNN {torch.backends.cudnn.version()}",
            f"NVIDIA_TF32_OVERRIDE={os.environ.get('NVIDIA_TF32_OVERRIDE')}",
        ]
    )
