"""Delayed scaling: the history of largest magnitudes, and the scales made of it between steps.

Source: TransformerEngine 2.20.2, transformer_engine/pytorch/quantization.py (`DelayedScalingRecipeState`,
`reduce_and_update_fp8_tensors`, `_amax_and_scale_update`) and transformer_engine/common/recipe/delayed_scaling.cu.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from converters.te.quantization.quantizers import DelayedQuantizer
from converters.te.quantization.recipes import Operands, formats_of
from converters.te.quantization.scaling import FLOAT32_MAX

# Per GEMM: input, weight, output; and gradient of the output, gradient of the input. Outputs stay unquantised, but
# Transformer Engine keeps their place.
FORWARD, BACKWARD = 3, 2


class Direction:
    """The scales and the history of one direction of a layer.

    Attributes:
        scale: `[slots]` fp32.
        amax_history: `[length slots]` fp32; row 0 is the step in progress, the last row the step before it.
    """

    def __init__(self, length: int, slots: int) -> None:
        self.scale = torch.ones(slots)
        self.amax_history = torch.zeros(length, slots)

    @property
    def fresh(self) -> bool:
        """Whether nothing has been recorded yet."""
        return not bool(self.amax_history.any()) and bool((self.scale == 1).all())

    def resize(self, length: int) -> None:
        """Keep the newest rows of another length; new rows are zero."""
        have = len(self.amax_history)
        if length < have:
            self.amax_history = self.amax_history[:length].clone()
        elif length > have:
            self.amax_history = torch.nn.functional.pad(self.amax_history, (0, 0, 0, length - have))

    def update(self, recipe: Any, largest: float, newest: Tensor) -> None:
        """End a step: put `newest` (`[slots]`, reduced over ranks) into the history, and make scales of it.

        The row of the step in progress moves to the end, the oldest row drops out, and row 0 is zero again. A slot
        that saw nothing keeps its history and its scale.
        """
        history = self.amax_history
        if callable(recipe.amax_compute_algo) or callable(recipe.scaling_factor_compute_algo):
            self._update_called(recipe, largest, newest)
            return
        newest = torch.where(newest != 0, newest, history[0])
        rolled = torch.cat([history[1:], newest[None]])
        amax = newest if recipe.amax_compute_algo == "most_recent" else rolled.amax(0)
        seen = newest != 0
        amax = torch.where(seen, amax, torch.zeros_like(amax))
        rolled[0] = 0
        history.copy_(torch.where(seen, rolled, history))
        self.scale.copy_(_scale(amax, self.scale, torch.full_like(amax, largest * 2.0**-recipe.margin) / amax))

    def _update_called(self, recipe: Any, largest: float, newest: Tensor) -> None:
        history = self.amax_history
        history[0] = newest
        algo = recipe.amax_compute_algo
        amax = algo(history) if callable(algo) else history[0].clone() if algo == "most_recent" else history.amax(0)
        if len(history) > 1:
            history.copy_(history.roll(-1, 0))
        history[0] = 0
        if callable(recipe.scaling_factor_compute_algo):
            scale = recipe.scaling_factor_compute_algo(amax, self.scale, largest, recipe)
        else:
            scale = _scale(amax, self.scale, torch.full_like(amax, largest) / amax / 2**recipe.margin)
        self.scale.copy_(scale)


def _scale(amax: Tensor, before: Tensor, scale: Tensor) -> Tensor:
    scale = torch.where(amax.isfinite() & (amax > 0), scale, before)
    return torch.where(scale.isinf(), torch.full_like(scale, FLOAT32_MAX), scale)


class DelayedState:
    """The state of one layer under `DelayedScaling`."""

    def __init__(self, recipe: Any, gemms: int) -> None:
        self.recipe = recipe
        self.gemms = gemms
        self.forward = Direction(recipe.amax_history_len, FORWARD * gemms)
        self.backward = Direction(recipe.amax_history_len, BACKWARD * gemms)

    @property
    def fresh(self) -> bool:
        """Whether no step has been recorded."""
        return self.forward.fresh and self.backward.fresh

    def use(self, recipe: Any) -> None:
        """Go on under another `DelayedScaling`: the history takes its length."""
        self.recipe = recipe
        self.forward.resize(recipe.amax_history_len)
        self.backward.resize(recipe.amax_history_len)

    def operands(self, index: int) -> Operands:
        """The quantizers of GEMM `index`, which record into this state."""
        formats = formats_of(self.recipe)

        def quantizer(direction: Direction, slot: int, backward: bool) -> DelayedQuantizer:
            return DelayedQuantizer(
                format=formats[backward], scale=direction.scale[slot], amax=direction.amax_history[0, slot]
            )

        return Operands(
            input=quantizer(self.forward, FORWARD * index, False),
            weight=quantizer(self.forward, FORWARD * index + 1, False),
            grad=quantizer(self.backward, BACKWARD * index, True),
        )
