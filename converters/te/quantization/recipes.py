"""The recipes, and what each does to the operands of a GEMM.

Transformer Engine's own classes where it is installed, equal ones elsewhere; told apart by name, so that both work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converters.errors import ConversionError, near
from converters.te.quantization.formats import E4M3, E5M2, FloatFormat
from converters.te.quantization.quantizers import (
    BlockQuantizer,
    CurrentQuantizer,
    MXQuantizer,
    NVFP4Quantizer,
    Quantizer,
)

if TYPE_CHECKING:
    from converters.te.quantization import recipe_classes as _classes
else:
    try:
        from transformer_engine.common import recipe as _classes
    except (ImportError, OSError, RuntimeError):
        # Not installed, or without the CUDA libraries that importing it loads.
        from converters.te.quantization import recipe_classes as _classes

Format = _classes.Format
MMParams = _classes.MMParams
QParams = _classes.QParams
DelayedScaling = _classes.DelayedScaling
Float8CurrentScaling = _classes.Float8CurrentScaling
Float8BlockScaling = _classes.Float8BlockScaling
MXFP8BlockScaling = _classes.MXFP8BlockScaling
NVFP4BlockScaling = _classes.NVFP4BlockScaling

PRECISIONS = ("fp8-delayed", "fp8-current", "fp8-block", "mxfp8", "nvfp4")


def recipe_of(precision: str) -> Any:
    """The recipe of one of `PRECISIONS`, with Transformer Engine's defaults.

    Raises:
        ConversionError: Another name.
    """
    made = {
        "fp8-delayed": DelayedScaling,
        "fp8-current": Float8CurrentScaling,
        "fp8-block": Float8BlockScaling,
        "mxfp8": MXFP8BlockScaling,
        "nvfp4": NVFP4BlockScaling,
    }
    if precision not in made:
        raise ConversionError(
            f"no recipe is called {precision!r}{near(precision, PRECISIONS)}; there are {', '.join(PRECISIONS)}"
        )
    return made[precision]()


def compute_capability(precision: str) -> tuple[int, int]:
    """The least CUDA compute capability that runs one of `PRECISIONS`.

    Source: TransformerEngine 2.20.2, transformer_engine/pytorch/quantization.py, the `_compute_*_support` functions.

    Raises:
        ConversionError: Another name.
    """
    recipe_of(precision)
    return {"fp8-block": (9, 0), "mxfp8": (10, 0), "nvfp4": (10, 0)}.get(precision, (8, 9))


def scheme_of(recipe: Any) -> str:
    """Which of `PRECISIONS` a recipe is, whatever its options.

    Raises:
        ConversionError: A class that the reference does not know, or an option that it does not compute.
    """
    names = {
        "DelayedScaling": "fp8-delayed",
        "Float8CurrentScaling": "fp8-current",
        "Float8BlockScaling": "fp8-block",
        "MXFP8BlockScaling": "mxfp8",
        "NVFP4BlockScaling": "nvfp4",
    }
    name = type(recipe).__name__
    if name not in names:
        raise ConversionError(
            f"the reference of Transformer Engine's layers has no recipe {name}; it has {', '.join(sorted(names))}"
        )
    refused: dict[str, Any] = {"fp8_dpa": False, "fp8_mha": False, "backward_override": None}
    refused |= {"row_scaled_activation": False, "nvfp4_4over6": "none"} if name.startswith("NVFP4") else {}
    wrong = [
        f"{field}={getattr(recipe, field)!r}"
        for field, usual in refused.items()
        if getattr(recipe, field, usual) != usual
    ]
    if wrong:
        raise ConversionError(
            f"{name} with {', '.join(wrong)}: the reference of Transformer Engine's layers does not compute that; "
            "leave it at its default, or run the layers on a GPU"
        )
    return names[name]


def formats_of(recipe: Any) -> tuple[FloatFormat, FloatFormat]:
    """The eight-bit formats of forward and of backward operands."""
    hybrid = recipe.fp8_format.name == "HYBRID"
    return E4M3, E5M2 if hybrid else E4M3


@dataclass(frozen=True, kw_only=True)
class Operands:
    """The quantizers of one GEMM of a layer: of its input, of its weight and of the gradient of its output."""

    input: Quantizer
    weight: Quantizer
    grad: Quantizer


def operands_of(recipe: Any) -> Operands:
    """The quantizers of a recipe that keeps no state (every one but `DelayedScaling`)."""
    scheme, (forward, backward) = scheme_of(recipe), formats_of(recipe)
    if scheme == "fp8-current":
        params = (recipe.fp8_quant_fwd_inp, recipe.fp8_quant_fwd_weight, recipe.fp8_quant_bwd_grad)
        kinds = (forward, forward, backward)
        return _operands(
            *(
                CurrentQuantizer(format=kind, epsilon=p.amax_epsilon, power_of_two=p.power_2_scale)
                for kind, p in zip(kinds, params, strict=True)
            )
        )
    if scheme == "fp8-block":
        blocks = (recipe.x_block_scaling_dim, recipe.w_block_scaling_dim, recipe.grad_block_scaling_dim)
        params = (recipe.fp8_quant_fwd_inp, recipe.fp8_quant_fwd_weight, recipe.fp8_quant_bwd_grad)
        return _operands(
            *(
                BlockQuantizer(
                    format=kind,
                    block=(128 if dims == 2 else 1, 128),
                    epsilon=p.amax_epsilon,
                    power_of_two=p.power_2_scale,
                )
                for kind, dims, p in zip((forward, forward, backward), blocks, params, strict=True)
            )
        )
    if scheme == "mxfp8":
        square = (32, 32) if recipe.enable_2d_quantization else (1, 32)
        return _operands(
            MXQuantizer(format=forward), MXQuantizer(format=forward, block=square), MXQuantizer(format=backward)
        )
    assert scheme == "nvfp4"
    return _operands(
        *(
            NVFP4Quantizer(
                block=(16, 16) if p.fp4_2d_quantization else (1, 16),
                transform=p.random_hadamard_transform,
                stochastic=p.stochastic_rounding,
            )
            for p in (recipe.fp4_quant_fwd_inp, recipe.fp4_quant_fwd_weight, recipe.fp4_quant_bwd_grad)
        )
    )


def _operands(input: Quantizer, weight: Quantizer, grad: Quantizer) -> Operands:
    return Operands(input=input, weight=weight, grad=grad)
