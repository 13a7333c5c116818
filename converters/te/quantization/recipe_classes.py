"""Transformer Engine's recipe classes, in name, fields and defaults, for where it is not installed.

Source: TransformerEngine 2.20.2, transformer_engine/common/recipe/__init__.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from converters.errors import ConversionError


class _Largest(NamedTuple):
    max_fwd: float
    max_bwd: float


class Format(Enum):
    """Which format forward operands have, and which backward ones: `HYBRID` is E4M3 forward and E5M2 backward."""

    E2M1 = _Largest(6, 6)
    E4M3 = _Largest(448, 448)
    E5M2 = _Largest(57344, 57344)
    HYBRID = _Largest(448, 57344)


@dataclass(frozen=True)
class MMParams:
    """Options of a matrix product."""

    use_split_accumulator: bool = True


@dataclass(frozen=True)
class QParams:
    """Options of one operand's quantisation."""

    power_2_scale: bool = False
    amax_epsilon: float = 0.0
    random_hadamard_transform: bool = False
    stochastic_rounding: bool = False
    fp4_2d_quantization: bool = False


class Recipe:
    """The root of the recipes."""

    def __post_init__(self) -> None:
        if getattr(self, "fp8_format", None) is Format.E5M2:
            raise ConversionError(
                f"{type(self).__name__}: fp8_format E5M2 has too few bits for forward operands: take HYBRID or E4M3"
            )


@dataclass
class DelayedScaling(Recipe):
    """One scale a tensor, from the largest magnitudes of earlier steps."""

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str | Callable[[Tensor], Tensor] = "max"
    scaling_factor_compute_algo: Callable[..., Tensor] | None = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None


@dataclass
class Float8CurrentScaling(Recipe):
    """One scale a tensor, from its own largest magnitude."""

    use_power_2_scales: bool = False
    fp8_format: Format = Format.HYBRID
    fp8_quant_fwd_inp: ClassVar[QParams] = QParams()
    fp8_quant_fwd_weight: ClassVar[QParams] = QParams()
    fp8_quant_bwd_grad: ClassVar[QParams] = QParams()
    fp8_gemm_fprop: MMParams = MMParams(use_split_accumulator=False)
    fp8_gemm_dgrad: MMParams = MMParams()
    fp8_gemm_wgrad: MMParams = MMParams()
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None


@dataclass
class MXFP8BlockScaling(Recipe):
    """One power of two for 32 elements in a row."""

    margin: int = 0
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None
    enable_2d_quantization: bool = False


@dataclass
class Float8BlockScaling(Recipe):
    """One scale for 1 x 128 elements of activations and gradients, for 128 x 128 of weights."""

    use_f32_scales: bool = False
    fp8_format: Format = Format.E4M3
    fp8_quant_fwd_inp: ClassVar[QParams] = QParams(power_2_scale=True)
    fp8_quant_fwd_weight: ClassVar[QParams] = QParams(power_2_scale=True)
    fp8_quant_bwd_grad: ClassVar[QParams] = QParams(power_2_scale=True)
    x_block_scaling_dim: int = 1
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1
    fp8_gemm_fprop: MMParams = MMParams()
    fp8_gemm_dgrad: MMParams = MMParams()
    fp8_gemm_wgrad: MMParams = MMParams()
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None


@dataclass
class NVFP4BlockScaling(Recipe):
    """E2M1 elements, an E4M3 scale for 16 of them and an fp32 scale for all."""

    disable_rht: bool = False
    disable_stochastic_rounding: bool = False
    disable_2d_quantization: bool = False
    row_scaled_activation: bool = False
    nvfp4_4over6: str = "none"
    nvfp4_4over6_e4m3_use_256: str = "all"
    nvfp4_4over6_err_mode: str = "MAE"
    fp4_format: Format = Format.E2M1
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None
    fp4_quant_fwd_inp: QParams = field(init=False, repr=False)
    fp4_quant_fwd_weight: QParams = field(init=False, repr=False)
    fp4_quant_bwd_grad: QParams = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        transform = not self.disable_rht
        self.fp4_quant_fwd_inp = QParams(random_hadamard_transform=transform)
        self.fp4_quant_fwd_weight = QParams(fp4_2d_quantization=not self.disable_2d_quantization)
        self.fp4_quant_bwd_grad = QParams(
            random_hadamard_transform=transform, stochastic_rounding=not self.disable_stochastic_rounding
        )


def fields_of(recipe: Any) -> dict[str, Any]:
    """The fields of a recipe of either kind, by name."""
    return {each.name: getattr(recipe, each.name) for each in fields(recipe)}
