"""Run in a rank without a GPU: the real Transformer Engine layers, constructed only, beside the reference's."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable
from typing import Any

import torch

CLASSES = (
    "TransformerLayer",
    "MultiheadAttention",
    "DotProductAttention",
    "Linear",
    "LayerNormLinear",
    "LayerNormMLP",
    "RMSNorm",
)
MARKS = ("tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel")


def libraries() -> tuple[Any, Any]:
    """Transformer Engine and the reference; a GPU is feigned, without which the former refuses to construct."""
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # type: ignore[assignment,misc]

    import transformer_engine.pytorch as real

    from converters.te import reference

    return real, reference


def structures(cases: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Build each case's class with its arguments in both libraries, from one seed; what each made."""
    return {name: tuple(_made(library, *case) for library in libraries()) for name, case in cases.items()}  # type: ignore[misc]


def _made(library: Any, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(7)
    layer = getattr(library, name)(**arguments)
    found: dict[str, Any] = {}
    for key, value in layer.state_dict().items():
        found[key] = (tuple(value.shape), str(value.dtype), str(value.device), _digest(value))
    for key, value in layer.named_parameters():
        marks = {} if value.is_meta else {mark: getattr(value, mark) for mark in MARKS if hasattr(value, mark)}
        found[f"{key} as a parameter"] = (value.requires_grad, marks)
    return found


def _digest(value: torch.Tensor) -> str:
    if value.is_meta:
        return "meta"
    return hashlib.sha256(value.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def signatures() -> dict[str, tuple[dict[str, str], dict[str, str], dict[str, str]]]:
    """Of each class's constructor and forward: Transformer Engine's defaults, the reference's, and those it refuses."""
    real, reference = libraries()
    found = {}
    for name in CLASSES:
        for method in ("__init__", "forward"):
            off = getattr(getattr(reference, name), "OFF" if method == "__init__" else "FORWARD_OFF", {})
            found[f"{name}.{method}"] = (
                _defaults(getattr(real, name).__mro__, method),
                _defaults([getattr(reference, name)], method),
                {option: repr(value) for option, value in off.items()},
            )
    return found


def _defaults(classes: Iterable[type], method: str) -> dict[str, str]:
    """Arguments with their defaults; also those of the next class, where a signature ends in `**`."""
    found: dict[str, str] = {}
    for one in classes:
        if method not in vars(one):
            continue
        parameters = inspect.signature(vars(one)[method]).parameters.values()
        for parameter in parameters:
            if parameter.name != "self" and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                found.setdefault(parameter.name, repr(parameter.default))
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found
