"""What the reference layers have in common: their GEMMs, in the recipe of the moment, and the state of it."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from converters.errors import ConversionError
from converters.te.quantization import extra_state, state
from converters.te.quantization.delayed import DelayedState
from converters.te.quantization.gemm import QuantizedLinear, QuantizedWeight, require_shapes
from converters.te.quantization.quantizers import CurrentQuantizer, DelayedQuantizer, Quantizer
from converters.te.quantization.recipes import Operands, operands_of, scheme_of
from converters.te.quantization.scaling import amax_of

_Kept = tuple[weakref.ref[Tensor], Hashable, QuantizedWeight]


class Module(torch.nn.Module):
    """A layer with one or more GEMMs, each `x @ weight.T + bias`.

    Made inside `quantized_model_init`, its weights are rounded to the grid of that recipe before they are used or
    saved, and used in the form that they were rounded to.

    Args:
        gemms: How many; `LayerNormMLP` has two.
    """

    def __init__(self, *, gemms: int = 1) -> None:
        super().__init__()
        self.gemms = gemms
        self.parameter_recipe = state.parameter_recipe()
        self.delayed: DelayedState | None = None
        self._quantized: dict[int, _Kept] = {}
        self._of_first: dict[int, tuple[type[Quantizer], QuantizedWeight]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Everything but quantised weights, which are made anew: copies must not share them."""
        return self.__dict__ | {"_quantized": {}, "_of_first": {}}

    def gemm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        index: int = 0,
        is_first_microbatch: bool | None = None,
    ) -> Tensor:
        """`x @ weight.T + bias`, forward and backward in the recipe of the enclosing `autocast`, if there is one.

        Without gradients, the quantised weight is kept from call to call for as long as torch counts no change of
        the parameter (writing through `weight.data` is not counted).

        Args:
            x: `[... in]`; fp32 beside a narrower weight where `wants_unrounded`.
            weight: `[out in]`.
            bias: `[out]`.
            index: Which of the layer's GEMMs.
            is_first_microbatch: True keeps the quantised weight, False takes the one that was kept: under delayed
                scaling its scale is that of the first microbatch, and its largest magnitude is not recorded again.

        Returns:
            `[... out]` in the dtype of `weight`.

        Raises:
            ConversionError: Sizes that the recipe cannot take, or another recipe than the parameters are held in.
        """
        context = state.current()
        if self.parameter_recipe is not None:
            self._hold(weight, index)
        if not context.enabled:
            if context.calibrating and scheme_of(context.recipe) == "fp8-delayed":
                self._calibrate(context.recipe, x, weight, index)
            return torch.nn.functional.linear(x, weight, bias)
        require_shapes(x, weight)
        operands = self._operands(context.recipe, index)
        if x.dtype != weight.dtype and isinstance(operands.input, CurrentQuantizer):
            operands = replace(operands, input=replace(operands.input, rounded=weight.dtype))
        learns = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, weight, bias))
        quantized = None
        if self.parameter_recipe is not None:
            quantized = self._held(context.recipe, index)
        elif is_first_microbatch is not None:
            quantized = self._of_microbatch(operands.weight, weight, index, is_first_microbatch)
        elif not learns and isinstance(weight, torch.nn.Parameter) and not weight.is_inference():
            quantized = self._cached(operands.weight, weight, index)
        after = _end_backward if learns and state.take_first() else None
        out = QuantizedLinear.apply(x, weight, bias, operands, quantized, after)  # type: ignore[no-untyped-call]
        assert isinstance(out, Tensor)
        return out

    def wants_unrounded(self, after: str) -> bool:
        """Whether `gemm` should get the fp32 result of the norm or activation before it, before its rounding.

        Transformer Engine's kernels quantise that one where the scale is known beforehand (delayed scaling), and take
        the largest magnitude from it in activations (current scaling).

        Args:
            after: `norm` or `activation`.

        Source: TransformerEngine 2.20.2, transformer_engine/pytorch/csrc/extensions/{normalization,activation}.cpp.
        """
        context = state.current()
        if not context.enabled:
            return False
        scheme = scheme_of(context.recipe)
        return scheme == "fp8-delayed" or (scheme == "fp8-current" and after == "activation")

    def reset_quantization(self) -> None:
        """Forget the scales and histories of delayed scaling."""
        self.delayed = None
        self._quantized.clear()
        self._of_first.clear()

    def get_extra_state(self) -> Tensor:
        """The state of delayed scaling as bytes (uint8); empty where there is none, as Transformer Engine's."""
        if self.parameter_recipe is not None:
            self._hold_all()
        return extra_state.write(self.delayed)

    def set_extra_state(self, saved: Tensor | None) -> None:
        """Take over the state of delayed scaling.

        Raises:
            ConversionError: See `extra_state.read`.
        """
        self.delayed = extra_state.read(saved, self.gemms, self.delayed, where=type(self).__name__)

    def _operands(self, recipe: Any, index: int) -> Operands:
        if scheme_of(recipe) != "fp8-delayed":
            return operands_of(recipe)
        return self._delayed(recipe).operands(index)

    def _delayed(self, recipe: Any) -> DelayedState:
        if self.delayed is None:
            self.delayed = DelayedState(recipe, self.gemms)
        self.delayed.use(recipe)
        if state.current().enabled:
            state.register(self.delayed)
        return self.delayed

    @torch.no_grad()
    def _calibrate(self, recipe: Any, x: Tensor, weight: Tensor, index: int) -> None:
        operands = self._delayed(recipe).operands(index)
        for quantizer, operand in ((operands.input, x), (operands.weight, weight)):
            assert isinstance(quantizer, DelayedQuantizer)
            quantizer.amax.copy_(amax_of(operand))

    def _of_microbatch(self, quantizer: Quantizer, weight: Tensor, index: int, first: bool) -> QuantizedWeight:
        """Source: TransformerEngine 2.20.2, transformer_engine/pytorch/module/base.py, `quantize_weight`."""
        kept = self._of_first.get(index)
        if first or kept is None or kept[0] is not type(quantizer):
            kept = type(quantizer), QuantizedWeight.of(weight.detach(), quantizer, columnwise=True)
            self._of_first[index] = kept
        return kept[1]

    def _cached(self, quantizer: Quantizer, weight: Tensor, index: int) -> QuantizedWeight:
        key: Hashable = repr(quantizer)
        if isinstance(quantizer, DelayedQuantizer):
            key = (quantizer.format, float(quantizer.scale))
        found = self._unchanged(weight, index, key)
        if found is None:
            found = QuantizedWeight.of(weight.detach(), quantizer, columnwise=False).ready()
            self._keep(weight, index, key, found)
        elif isinstance(quantizer, DelayedQuantizer):
            assert found.rowwise.amax is not None
            quantizer.record(found.rowwise.amax)
        return found

    def _unchanged(self, weight: Tensor, index: int, key: Hashable) -> QuantizedWeight | None:
        kept = self._quantized.get(index)
        if kept is None or kept[0]() is not weight or kept[1] != (weight.data_ptr(), weight._version, key):
            return None
        return kept[2]

    def _keep(self, weight: Tensor, index: int, key: Hashable, quantized: QuantizedWeight) -> None:
        self._quantized[index] = (weakref.ref(weight), (weight.data_ptr(), weight._version, key), quantized)

    @torch.no_grad()
    def _hold(self, weight: Tensor, index: int) -> None:
        """Round a weight to its grid, unless it has not changed since it was."""
        if weight.is_meta or self._unchanged(weight, index, None) is not None:
            return
        if not isinstance(weight, torch.nn.Parameter):
            raise ConversionError(
                f"{type(self).__name__}: quantised parameters need one weight for each GEMM, and this one is joined of "
                "several: make the layer without parameters_split"
            )
        operands = self._operands(self.parameter_recipe, index)
        quantized = QuantizedWeight.of(weight.detach(), operands.weight, columnwise=True)
        weight.copy_(quantized.rowwise.dequantize(weight.dtype))
        self._keep(weight, index, None, quantized.ready())

    def _hold_all(self) -> None:
        matrices = [each for each in self._parameters.values() if each is not None and each.ndim == 2]
        for index, weight in enumerate(matrices):
            self._hold(weight, index)

    def _held(self, recipe: Any, index: int) -> QuantizedWeight:
        if scheme_of(recipe) != scheme_of(self.parameter_recipe):
            raise ConversionError(
                f"{type(self).__name__}: its parameters are held in {type(self.parameter_recipe).__name__} "
                f"(quantized_model_init), and autocast asks for {type(recipe).__name__}: use one recipe for both"
            )
        return self._quantized[index][2]


def _end_backward() -> None:
    state.update(forward=False)
