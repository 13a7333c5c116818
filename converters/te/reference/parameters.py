"""Parameters of the reference layers: registered with how they start and how they are cut, as Transformer Engine does.

Source: TransformerEngine 2.20.2, transformer_engine/pytorch/module/base.py, `TransformerEngineBaseModule`:
`register_parameter` and `reset_parameters`; distributed.py, `set_tensor_model_parallel_attributes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.errors import ConversionError, near
from converters.te.reference.module import Module

Init = Callable[[Tensor], object]


def normal(weight: Tensor) -> Tensor:
    """Transformer Engine's start of a weight where none is given: normal, with a standard deviation of 0.023."""
    return torch.nn.init.normal_(weight, mean=0.0, std=0.023)


@dataclass(frozen=True, kw_only=True)
class Slot:
    """What is known of a parameter beside its value.

    Attributes:
        init: Sets its first value, in place.
        cut: The dimension that tensor parallelism cuts, or None where every rank holds all of it.
        sequence_parallel: Whether its gradient is of this rank's part of the sequence only; None for weights of GEMMs.
    """

    init: Init
    cut: int | None = None
    sequence_parallel: bool | None = None


class Layer(Module):
    """A layer that registers its parameters in slots.

    A parameter made on the `meta` device has no value: `reset_parameters` gives it a place (a CPU) and a value.
    """

    def __init__(self, *, gemms: int = 1) -> None:
        super().__init__(gemms=gemms)
        self.slots: dict[str, Slot] = {}

    def add(self, name: str, value: Tensor, slot: Slot) -> None:
        """Register `value`, uninitialised, as the parameter `name`."""
        self.slots[name] = slot
        self.register_parameter(name, torch.nn.Parameter(value))

    def reset_parameters(self, defer_init: bool = False) -> None:
        """Start every parameter of this layer anew.

        Args:
            defer_init: Leave values as they are; for parameters that are still on the `meta` device.
        """
        for name, slot in self.slots.items():
            parameter = self.get_parameter(name)
            if not defer_init:
                if parameter.is_meta:
                    parameter = torch.nn.Parameter(torch.empty_like(parameter, device="cpu"))
                    self.register_parameter(name, parameter)
                with torch.no_grad():
                    slot.init(parameter)
            mark(parameter, slot)


def mark(parameter: torch.nn.Parameter, slot: Slot) -> None:
    """Write on the parameter what optimisers and checkpoints of tensor-parallel training look for."""
    if slot.cut is not None:
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        parameter.partition_dim = slot.cut  # type: ignore[attr-defined]
        parameter.partition_stride = 1  # type: ignore[attr-defined]
    if slot.sequence_parallel is not None:
        parameter.sequence_parallel = slot.sequence_parallel  # type: ignore[attr-defined]


def refuse(owner: str, given: Mapping[str, object], off: Mapping[str, object], known: Mapping[str, object]) -> None:
    """Refuse options of Transformer Engine that the reference does not have, and names that neither has.

    Args:
        owner: The class or method, for the message.
        given: Keyword arguments beyond those that the reference has.
        off: Those of Transformer Engine, with the value at which each does nothing (its default).
        known: What the reference has, for spelling suggestions.

    Raises:
        ConversionError: One of `given` is not in `off`, or has another value than there. All are named.
    """
    wrong = []
    for name, value in given.items():
        if name not in off:
            wrong.append(f"{name}: Transformer Engine has no such option{near(name, [*known, *off])}")
        elif value is not off[name] and value != off[name]:
            wrong.append(f"{name}={value!r}: only {off[name]!r} is in the reference")
    if wrong:
        raise ConversionError(
            f"{owner}: the torch reference of Transformer Engine's layers lacks what was asked for:\n"
            + "\n".join(f"  {line}" for line in wrong)
            + "\nLeave the option out, or run on a GPU, where the layers are Transformer Engine's own"
        )


def part(total: int, parts: int, *, what: str) -> int:
    """`total / parts`.

    Raises:
        ConversionError: It is not whole.
    """
    if total % parts:
        raise ConversionError(f"expected {what} to divide by tp_size {parts}, found {total}; choose another tp_size")
    return total // parts
