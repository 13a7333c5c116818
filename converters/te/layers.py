"""Which layers the model is built from: Transformer Engine's on a GPU, the torch reference of them elsewhere.

The one place that chooses. Both have the same names, arguments, parameters and meaning; the reference is held to the
real ones by tests, their structure without a GPU and their numbers on one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from converters.errors import ConversionError


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The classes and contexts that the model needs, of one kind.

    Attributes:
        kind: `transformer_engine` or `reference`.
        autocast: `autocast(enabled=..., recipe=..., amax_reduction_group=...)`: GEMMs inside run in the recipe.
        quantized_model_init: `quantized_model_init(enabled=..., recipe=...)`: layers made inside hold quantised
            weights.
    """

    kind: str
    TransformerLayer: type[torch.nn.Module]
    Linear: type[torch.nn.Module]
    RMSNorm: type[torch.nn.Module]
    InferenceParams: type
    autocast: Callable[..., AbstractContextManager[Any]]
    quantized_model_init: Callable[..., AbstractContextManager[Any]]


def layers_for(device: torch.device | str | None = None) -> Layers:
    """The layers that can run on `device`.

    Args:
        device: Where parameters will be; by default a GPU where there is one. `meta` counts as that default.

    Raises:
        ConversionError: A CUDA device without Transformer Engine installed.
    """
    kind = None if device is None else torch.device(device).type
    if kind in (None, "meta"):
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return _transformer_engine() if kind == "cuda" else _reference()


def _transformer_engine() -> Layers:
    try:
        import transformer_engine.pytorch as te
    except ImportError as error:
        raise ConversionError(
            f"Transformer Engine cannot be imported ({error}): layers on a CUDA device are its own. Install "
            "transformer-engine[pytorch], or ask for device='cpu', where a reference in torch computes the same"
        ) from error
    return Layers(
        kind="transformer_engine",
        TransformerLayer=te.TransformerLayer,
        Linear=te.Linear,
        RMSNorm=te.RMSNorm,
        InferenceParams=te.InferenceParams,
        autocast=te.autocast,
        quantized_model_init=te.quantized_model_init,
    )


def _reference() -> Layers:
    from converters.te import reference
    from converters.te.quantization import autocast, quantized_model_init

    return Layers(
        kind="reference",
        TransformerLayer=reference.TransformerLayer,
        Linear=reference.Linear,
        RMSNorm=reference.RMSNorm,
        InferenceParams=reference.InferenceParams,
        autocast=autocast,
        quantized_model_init=quantized_model_init,
    )
