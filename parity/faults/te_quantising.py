"""Faults in how matrix products are quantised, put on the torch reference of Transformer Engine's layers in a rank."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from parity.faults.patches import in_module

QUANTIZATION, REFERENCE = "converters.te.quantization", "converters.te.reference"
Patched = Callable[[Sequence[Any]], None]
Change = Callable[[Any], Any]


def _off(models: Sequence[Any]) -> None:
    for model in models:
        model.model.precision = dataclasses.replace(model.model.precision, of=())


def _operands(change: Change) -> Patched:
    """Every layer's quantizers, with and without state, changed."""

    def patch(models: Sequence[Any]) -> None:
        for where in (f"{REFERENCE}.module", f"{QUANTIZATION}.recipes"):
            in_module(where, "operands_of", lambda right: lambda recipe: change(right(recipe)))(models)
        delayed = f"{QUANTIZATION}.delayed:DelayedState"
        in_module(delayed, "operands", lambda right: lambda self, index: change(right(self, index)))(models)

    return patch


def _in_format(name: str, *roles: str) -> Patched:
    return _with({"format": getattr(importlib.import_module(f"{QUANTIZATION}.formats"), name)}, *roles)


def _with(given: Mapping[str, Any], *roles: str) -> Patched:
    """The quantizers of some operands with other options."""
    return _operands(
        lambda found: dataclasses.replace(
            found, **{role: dataclasses.replace(getattr(found, role), **given) for role in roles}
        )
    )


def _plain_backward(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Gradients are those of the product that is not quantised."""

    def wrong(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None, **named: Any) -> Tensor:
        quantised = right(self, x, weight, bias, **named)
        plain = torch.nn.functional.linear(x.to(weight.dtype), weight, bias)
        return plain + (quantised - plain).detach()

    return wrong


def _decoded_by(scales: Callable[[Tensor], Tensor]) -> Patched:
    """Codes are multiplied by other scales of blocks than they were made with."""
    return in_module(
        f"{QUANTIZATION}.quantized:Quantized",
        "expand",
        lambda right: lambda self, given: right(self, scales(given) if given.numel() > 1 else given),
    )


def _transposed(scales: Tensor) -> Tensor:
    return scales.T if scales.shape[0] == scales.shape[1] else scales


def _trimmed(scales: Tensor) -> Tensor:
    """The last block's scale is lost: the one before stands for it."""
    return torch.cat([scales[:, :-1], scales[:, -2:-1]], dim=1) if scales.shape[1] > 1 else scales


def _one_amax(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrong(x: Tensor, block: tuple[int, int]) -> Tensor:
        found = right(x, block)
        return torch.full_like(found, float(found.max()))

    return wrong


def _truncated(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What was rounded away from zero takes the code below."""

    def wrong(self: Any, values: Tensor) -> Tensor:
        codes = right(self, values)
        away = self.decode(codes).abs() > values.abs()
        return torch.where(away & ~values.isnan(), codes - 1, codes)

    return wrong


def _overflowing(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrong(self: Any, values: Tensor) -> Tensor:
        return right(self, values).masked_fill(values.abs() > self.largest, 0x7F)

    return wrong


def _halved(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A power of two is rounded down once more."""

    def wrong(amax: Tensor, *, power_of_two: bool = False, **named: Any) -> Tensor:
        scale = right(amax, power_of_two=power_of_two, **named)
        return scale / 2 if power_of_two else scale

    return wrong


def _power_below(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The power of two at or below, where it has to be the one at or above."""
    decode = importlib.import_module(f"{QUANTIZATION}.formats").decode_e8m0
    return lambda values: right(values) - (decode(right(values)) > values).to(torch.uint8)


def _once(right: Callable[..., None]) -> Callable[..., None]:
    """The first step's scales stay."""

    def wrong(self: Any, *given: Any, **named: Any) -> None:
        if self.fresh or bool((self.scale == 1).all()):
            right(self, *given, **named)

    return wrong


def _quantised_head(models: Sequence[Any]) -> None:
    for model in models:
        right, recipe = model.lm_head.forward, model.model.precision.recipes["fp8"]

        def wrong(hidden: Tensor, *, right: Any = right, recipe: Any = recipe, model: Any = model) -> Tensor:
            with model.model.te_layers.autocast(enabled=True, recipe=recipe):
                made: Tensor = right(hidden)
                return made

        model.lm_head.forward = wrong


def _no_state(models: Sequence[Any]) -> None:
    in_module(
        f"{REFERENCE}.module:Module", "get_extra_state", lambda _: lambda self: torch.empty(0, dtype=torch.uint8)
    )(models)


def _unread(_: Callable[..., Any]) -> Callable[..., Any]:
    """A layer keeps the state that it has, whatever is loaded."""
    return lambda saved, gemms, live, *, where: live


def _unchecked(right: Callable[..., Any]) -> Callable[..., Any]:
    """States that are missing are none."""

    def wrong(saved: Any, gemms: int, live: Any, *, where: str) -> Any:
        return live if saved is None or saved.numel() == 0 else right(saved, gemms, live, where=where)

    return wrong


def _any_version(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(saved: Any, where: str) -> Any:
        content = right(saved, where)
        content.get("extra_fp8_variables", {}).pop("extra_state_version", None)
        return content

    return wrong


STATE = f"{QUANTIZATION}.extra_state"
CODES = f"{QUANTIZATION}.formats:FloatFormat"
PATCHES: Mapping[str, Patched] = {
    "quantisation off": _off,
    "one scale for all blocks": in_module(f"{QUANTIZATION}.quantizers", "_block_amax", _one_amax),
    "scales of blocks transposed": _decoded_by(_transposed),
    "scales of blocks trimmed": _decoded_by(_trimmed),
    "scales of blocks one off": _decoded_by(lambda scales: scales.roll(1, dims=1)),
    "scales of blocks all alike": _decoded_by(lambda scales: torch.full_like(scales, float(scales.flatten()[0]))),
    "E5M2 where E4M3": lambda models: _in_format("E5M2", "input", "weight")(models),
    "gradients in E4M3": lambda models: _in_format("E4M3", "grad")(models),
    "codes truncated": in_module(CODES, "encode", _truncated),
    "overflow to NaN": in_module(CODES, "encode", _overflowing),
    "power of two rounded down twice": in_module(f"{QUANTIZATION}.quantizers", "scale_of", _halved),
    "E8M0 scales rounded down": lambda models: in_module(f"{QUANTIZATION}.quantizers", "encode_e8m0", _power_below)(
        models
    ),
    "amax history stale": in_module(f"{QUANTIZATION}.delayed:Direction", "update", _once),
    "backward not quantised": in_module(f"{REFERENCE}.module:Module", "gemm", _plain_backward),
    "nvfp4 without stochastic rounding": _with({"stochastic": False}, "grad"),
    "nvfp4 without the Hadamard transform": _with({"transform": False}, "input", "grad"),
    "head quantised": _quantised_head,
    "state not written": _no_state,
    "state not read": in_module(STATE, "read", _unread),
    "missing state taken": in_module(STATE, "read", _unchecked),
    "stale state taken": in_module(STATE, "_stale", lambda _: lambda *given: []),
    "state of another version taken": in_module(STATE, "_parse", _any_version),
}
"""By name, as `parity.faults.patches.PATCHES`."""
