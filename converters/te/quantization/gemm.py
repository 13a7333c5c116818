"""The three GEMMs of a linear layer with quantised operands: forward, dgrad and wgrad.

Each multiplies the values that the codes stand for, sums in fp32, applies the scales of the whole tensors, adds the
bias, and rounds once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from converters.errors import ConversionError
from converters.te.quantization.quantized import Quantized, product_scale
from converters.te.quantization.quantizers import Quantizer
from converters.te.quantization.recipes import Operands


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """A weight as its GEMMs take it.

    Attributes:
        rowwise: `[out in]`, for the forward GEMM.
        columnwise: `[in out]`, for dgrad; None where no gradient will be asked for.
        values: Of `rowwise`, in the narrowest dtype that holds them exactly; None where they are computed each time.
    """

    rowwise: Quantized
    columnwise: Quantized | None = None
    values: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, quantizer: Quantizer, *, columnwise: bool) -> QuantizedWeight:
        """Quantise `weight`."""
        rowwise = quantizer.quantize(weight)
        return cls(rowwise=rowwise, columnwise=_other_way(rowwise, weight, quantizer) if columnwise else None)

    def ready(self) -> QuantizedWeight:
        """With the values at hand."""
        values = self.rowwise.operand()
        narrow = values.bfloat16()
        return replace(self, values=narrow if torch.equal(narrow.float(), values) else values)


def _other_way(rowwise: Quantized, x: Tensor, quantizer: Quantizer) -> Quantized:
    """Columnwise usage of what has been quantised rowwise."""
    if rowwise.block is None or rowwise.block[0] == rowwise.block[1]:
        return rowwise.transposed()
    return quantizer.quantize(x, columnwise=True)


def multiply(
    left: Quantized,
    right: Quantized,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """`left @ right.T + bias`, `[m n]` in `dtype`, from `[m k]`, `[n k]` and `[n]`.

    Args:
        left: The operand whose rows the result has.
        right: The other operand.
        dtype: What the sum is rounded to, once.
        bias: Added in fp32.
        values: The values of `right`, where they are at hand.
    """
    factors = right.operand() if values is None else values.float()
    out = (left.operand() @ factors.T).mul_(product_scale(left, right))
    return (out if bias is None else out + bias.float()).to(dtype)


class QuantizedLinear(torch.autograd.Function):
    """`x @ weight.T + bias` with quantised operands, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        operands: Operands,
        quantized: QuantizedWeight | None,
        after_backward: Callable[[], None] | None,
    ) -> Tensor:
        """The forward GEMM.

        Args:
            ctx: autograd's.
            x: `[... in]`; fp32 beside a narrower weight where a kernel before it hands on what it has not rounded.
            weight: `[out in]`; its dtype is the result's.
            bias: `[out]`.
            operands: The quantizers.
            quantized: The weight, where it is quantised already.
            after_backward: Called at the end of backward.
        """
        matrix, dtype = x.reshape(-1, x.shape[-1]), weight.dtype
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if quantized is None:
            quantized = QuantizedWeight.of(weight, operands.weight, columnwise=needs_x)
        rows = operands.input.quantize(matrix)
        out = multiply(rows, quantized.rowwise, dtype, bias=_bias(bias, dtype), values=quantized.values)
        ctx.bias_dtype = None if bias is None or not needs_bias else bias.dtype
        ctx.grad_quantizer, ctx.after_backward = operands.grad, after_backward
        ctx.shape, ctx.input_dtype, ctx.dtype = x.shape, x.dtype, dtype
        # Now, not in backward: a delayed scale has moved on by then.
        ctx.weight = quantized.columnwise if needs_x else None
        ctx.input = _other_way(rows, matrix, operands.input) if needs_weight else None
        return out.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The dgrad GEMM (gradient rowwise, weight columnwise) and the wgrad GEMM (both columnwise)."""
        (grad,) = grads
        grad = grad.reshape(-1, grad.shape[-1])
        dx = dweight = dbias = None
        if ctx.bias_dtype is not None:
            dbias = grad.float().sum(0).to(ctx.bias_dtype)
        if ctx.weight is not None or ctx.input is not None:
            rows = ctx.grad_quantizer.quantize(grad)
        if ctx.weight is not None:
            dx = multiply(rows, ctx.weight, ctx.dtype).reshape(ctx.shape).to(ctx.input_dtype)
        if ctx.input is not None:
            dweight = multiply(_other_way(rows, grad, ctx.grad_quantizer), ctx.input, ctx.dtype)
        if ctx.after_backward is not None:
            ctx.after_backward()
        return dx, dweight, dbias, None, None, None


def _bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # cuBLAS takes no fp32 bias beside FP8 operands, so Transformer Engine rounds it to bf16.
    return None if bias is None else bias.to(torch.bfloat16 if dtype == torch.float32 else dtype)


def require_shapes(x: Tensor, weight: Tensor) -> None:
    """Refuse what Transformer Engine refuses: sizes that an FP8 GEMM cannot take.

    Source: TransformerEngine 2.20.2, transformer_engine/pytorch/utils.py, `assert_dim_for_fp8_exec`.

    Raises:
        ConversionError: Tokens or outputs that are no multiple of 8, or inputs that are none of 16.
    """
    tokens, (outputs, inputs) = math.prod(x.shape[:-1]), weight.shape
    wrong = [
        f"{count} {what}: a multiple of {multiple} is needed, {-count % multiple} short"
        for what, count, multiple in (
            ("tokens (product of the leading dimensions)", tokens, 8),
            ("input features", inputs, 16),
            ("output features", outputs, 8),
        )
        if count % multiple
    ]
    if wrong:
        way = "Pad the batch: a tokenizer and the collator take pad_to_multiple_of" if tokens % 8 else "Pad the layer"
        raise ConversionError(
            f"an FP8 GEMM cannot take x {list(x.shape)} and a weight {list(weight.shape)}: {'; '.join(wrong)}. {way}, "
            "or run these layers outside autocast"
        )
