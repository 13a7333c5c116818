"""`Module.gemm` under each recipe: forward, dgrad and wgrad against a statement in float64, refusals, kept weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from converters.errors import ConversionError
from converters.te.quantization import PRECISIONS, autocast, compute_capability, quantized_model_init, recipe_of, state
from converters.te.quantization.formats import E4M3, E5M2
from converters.te.quantization.quantizers import (
    BlockQuantizer,
    CurrentQuantizer,
    MXQuantizer,
    NVFP4Quantizer,
    Quantizer,
)
from converters.te.quantization.recipes import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    Format,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    scheme_of,
)
from converters.te.reference.module import Module

ALL = pytest.mark.parametrize("precision", PRECISIONS)


@pytest.fixture(autouse=True)
def _fresh_state() -> None:
    state.reset()


@dataclass
class Unit:
    """One set of operands with magnitudes spread by row and column, and what a layer makes of them."""

    x: Tensor
    weight: torch.nn.Parameter
    bias: torch.nn.Parameter
    grad: Tensor

    @classmethod
    def of(
        cls,
        seed: int,
        tokens: int = 64,
        inputs: int = 160,
        outputs: int = 96,
        dtype: Any = torch.bfloat16,
        orders: int = 3,
    ) -> Unit:
        generator = torch.Generator().manual_seed(seed)

        def tensor(*shape: int, scale: float = 1.0) -> Tensor:
            x = torch.randn(*shape, generator=generator)
            for dim, size in enumerate(shape):
                powers = 2.0 ** torch.randint(-orders, orders + 1, (size,), generator=generator)
                x = x * powers.view([-1 if d == dim else 1 for d in range(len(shape))])
            return (x * scale).to(dtype)

        return cls(
            x=tensor(2, tokens // 2, inputs).requires_grad_(),
            weight=torch.nn.Parameter(tensor(outputs, inputs, scale=0.3)),
            bias=torch.nn.Parameter(tensor(outputs)),
            grad=tensor(2, tokens // 2, outputs, scale=0.1),
        )

    def run(self, module: Module, recipe: Any, *, index: int = 0) -> Tensor:
        with autocast(recipe=recipe):
            out = module.gemm(self.x, self.weight, self.bias, index=index)
        out.backward(self.grad)
        return out


def two(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1])


def held(found: Tensor | None, left: Tensor, right: Tensor, bias: Tensor | None = None) -> None:
    """`found` is `left @ right.T + bias`, summed in fp32 and rounded once."""
    assert found is not None
    exact = left.double() @ right.double().T
    magnitude = left.double().abs() @ right.double().abs().T
    if bias is not None:
        exact, magnitude = exact + bias.detach().double(), magnitude + bias.detach().double().abs()
    error = (two(found).double() - exact).abs()
    roundoff = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}[found.dtype]
    bound = roundoff * exact.abs() + (left.shape[1] + 4) * 2.0**-24 * magnitude
    assert bool((error <= bound).all()), float((error / bound).max())


def same(quantizer: Quantizer) -> tuple[Quantizer, Quantizer, Quantizer]:
    return quantizer, quantizer, quantizer


# The quantizers of input, weight and gradient, written out for each recipe.
USED: dict[str, tuple[Any, Quantizer, Quantizer, Quantizer]] = {
    "current": (
        Float8CurrentScaling(),
        CurrentQuantizer(format=E4M3),
        CurrentQuantizer(format=E4M3),
        CurrentQuantizer(format=E5M2),
    ),
    "current-e4m3": (Float8CurrentScaling(fp8_format=Format.E4M3), *same(CurrentQuantizer(format=E4M3))),
    "block": (
        Float8BlockScaling(),
        BlockQuantizer(format=E4M3, block=(1, 128)),
        BlockQuantizer(format=E4M3, block=(128, 128)),
        BlockQuantizer(format=E4M3, block=(1, 128)),
    ),
    "mx": (MXFP8BlockScaling(), *same(MXQuantizer(format=E4M3))),
    "mx-hybrid": (
        MXFP8BlockScaling(fp8_format=Format.HYBRID),
        MXQuantizer(format=E4M3),
        MXQuantizer(format=E4M3),
        MXQuantizer(format=E5M2),
    ),
    "nvfp4": (
        NVFP4BlockScaling(disable_stochastic_rounding=True),
        NVFP4Quantizer(transform=True),
        NVFP4Quantizer(block=(16, 16)),
        NVFP4Quantizer(transform=True),
    ),
    "nvfp4-plain": (
        NVFP4BlockScaling(disable_stochastic_rounding=True, disable_rht=True, disable_2d_quantization=True),
        *same(NVFP4Quantizer()),
    ),
}


@pytest.mark.parametrize("name", USED)
def test_forward_dgrad_and_wgrad_are_of_the_right_usages(name: str) -> None:
    recipe, inputs, weights, grads = USED[name]
    unit = Unit.of(3, orders=8)
    out = unit.run(Module(), recipe)
    x, weight, grad = two(unit.x), unit.weight.detach(), two(unit.grad)
    held(out, inputs.quantize(x).dequantize(), weights.quantize(weight).dequantize(), unit.bias)
    held(unit.x.grad, grads.quantize(grad).dequantize(), weights.quantize(weight, columnwise=True).dequantize())
    held(
        unit.weight.grad,
        grads.quantize(grad, columnwise=True).dequantize(),
        inputs.quantize(x, columnwise=True).dequantize(),
    )
    assert unit.bias.grad is not None
    torch.testing.assert_close(unit.bias.grad, grad.float().sum(0).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mx", "nvfp4-plain", "block"])
def test_another_usage_would_show(name: str) -> None:
    """The statement above tells usages apart: the rows' values, transposed, do not pass for the columns'."""
    recipe, inputs, _, grads = USED[name]
    unit = Unit.of(4, orders=8)
    unit.run(Module(), recipe)
    with pytest.raises(AssertionError):
        held(
            unit.weight.grad, grads.quantize(two(unit.grad)).dequantize().T, inputs.quantize(two(unit.x)).dequantize().T
        )


@ALL
def test_quantisation_shows_and_is_small(precision: str) -> None:
    unit = Unit.of(5)
    out = unit.run(Module(), recipe_of(precision))
    exact = torch.nn.functional.linear(unit.x.double(), unit.weight.double(), unit.bias.double()).detach()
    relative = float((out.detach().double() - exact).norm() / exact.norm())
    assert 0.005 < relative < (0.2 if precision == "nvfp4" else 0.08)
    assert out.dtype == torch.bfloat16
    assert unit.x.grad is not None
    assert unit.x.grad.shape == unit.x.shape


@ALL
def test_without_an_enabled_autocast_it_is_the_plain_layer(precision: str) -> None:
    unit, module = Unit.of(6), Module()
    plain = torch.nn.functional.linear(unit.x, unit.weight, unit.bias)
    assert torch.equal(module.gemm(unit.x, unit.weight, unit.bias), plain)
    with autocast(enabled=False, recipe=recipe_of(precision)):
        assert torch.equal(module.gemm(unit.x, unit.weight, unit.bias), plain)
    with autocast(recipe=recipe_of(precision)):
        with autocast(enabled=False):
            assert torch.equal(module.gemm(unit.x, unit.weight, unit.bias), plain)
        assert not torch.equal(module.gemm(unit.x, unit.weight, unit.bias), plain)


@ALL
def test_without_gradients_the_result_is_the_same_and_a_changed_weight_is_seen(precision: str) -> None:
    unit, module, recipe = Unit.of(7), Module(), recipe_of(precision)
    with autocast(recipe=recipe):
        learning = module.gemm(unit.x, unit.weight, unit.bias).detach()
        with torch.no_grad():
            first = module.gemm(unit.x, unit.weight, unit.bias)
            again = module.gemm(unit.x, unit.weight, unit.bias)
            assert torch.equal(first, learning)
            assert torch.equal(again, learning)
            unit.weight.mul_(-2)
            assert torch.equal(module.gemm(unit.x, unit.weight), Module().gemm(unit.x, unit.weight))
            unit.weight.data = unit.weight.data.flip(0)
            assert torch.equal(module.gemm(unit.x, unit.weight), Module().gemm(unit.x, unit.weight))
            other = torch.nn.Parameter(unit.weight.detach() * 3)
            assert torch.equal(module.gemm(unit.x, other), Module().gemm(unit.x, other))


def test_a_kept_weight_is_of_its_recipe_and_its_gemm() -> None:
    unit, module = Unit.of(8), Module(gemms=2)
    with torch.no_grad():
        for precision in ("fp8-block", "mxfp8", "fp8-current"):
            for index in (0, 1):
                with autocast(recipe=recipe_of(precision)):
                    weight = torch.nn.Parameter(unit.weight * (index + 1.7))
                    expected = Module(gemms=2).gemm(unit.x, weight)
                    assert torch.equal(module.gemm(unit.x, weight, index=index), expected)
    copied = copy.deepcopy(module)
    assert copied._quantized == {}


def test_a_kept_weight_is_not_another_one_in_its_place() -> None:
    unit, module, place = Unit.of(17), Module(), Unit.of(17).weight.detach()
    with torch.no_grad(), autocast(recipe=Float8BlockScaling()):
        first = torch.nn.Parameter(place)
        module.gemm(unit.x, first)
        # The same memory and the same count of changes, other values, another parameter.
        place.data.copy_(place.flip(0))
        second = torch.nn.Parameter(place)
        assert (second.data_ptr(), second._version) == (first.data_ptr(), first._version)
        assert torch.equal(module.gemm(unit.x, second), Module().gemm(unit.x, second))


def test_a_kept_weight_follows_its_delayed_scale() -> None:
    unit, module = Unit.of(18), Module()
    with torch.no_grad(), autocast(recipe=DelayedScaling()):
        module.gemm(unit.x, unit.weight)
        assert module.delayed is not None
        module.delayed.forward.scale[1] = 37.0
        fresh = copy.deepcopy(module)
        assert torch.equal(module.gemm(unit.x, unit.weight), fresh.gemm(unit.x, unit.weight))


def test_stochastic_rounding_follows_the_seed() -> None:
    grads: list[Tensor] = []
    for seed in (1, 1, 2):
        unit = Unit.of(9)
        torch.manual_seed(seed)
        unit.run(Module(), recipe_of("nvfp4"))
        assert unit.weight.grad is not None
        grads.append(unit.weight.grad)
    assert torch.equal(grads[0], grads[1])
    assert not torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    unit, whole = Unit.of(10), Unit.of(10)
    getattr(unit, frozen).requires_grad_(False)
    unit.run(Module(), Float8CurrentScaling())
    whole.run(Module(), Float8CurrentScaling())
    for name in ("x", "weight", "bias"):
        grad, expected = getattr(unit, name).grad, getattr(whole, name).grad
        assert grad is None if name == frozen else torch.equal(grad, expected)


def test_fp32_layers_add_a_bias_rounded_to_bf16() -> None:
    unit = Unit.of(11, dtype=torch.float32)
    out = unit.run(Module(), Float8CurrentScaling())
    quantizer = CurrentQuantizer(format=E4M3)
    left, right = (quantizer.quantize(two(each)).dequantize() for each in (unit.x, unit.weight))
    held(out, left, right, unit.bias.bfloat16())
    with pytest.raises(AssertionError):
        held(out, left, right, unit.bias)


def test_unrounded_activations_are_quantised_as_kernels_before_them_do() -> None:
    unit, module = Unit.of(12), Module()
    wide = unit.x.detach().float() * 1.001
    with autocast(recipe=Float8CurrentScaling()):
        assert (module.wants_unrounded("norm"), module.wants_unrounded("activation")) == (False, True)
        out = module.gemm(wide, unit.weight)
    quantizer = CurrentQuantizer(format=E4M3, rounded=torch.bfloat16)
    held(
        out,
        quantizer.quantize(two(wide)).dequantize(),
        CurrentQuantizer(format=E4M3).quantize(unit.weight).dequantize(),
    )
    with autocast(recipe=DelayedScaling()):
        assert module.wants_unrounded("norm")
        out = module.gemm(wide, unit.weight)
    held(out, E4M3.decode(E4M3.encode(two(wide))), E4M3.decode(E4M3.encode(unit.weight.detach().float())))
    assert not module.wants_unrounded("norm")


def test_layers_quantise_their_norm_before_it_is_rounded_where_the_scale_is_known() -> None:
    from converters.te.reference.layernorm_linear import LayerNormLinear
    from converters.te.reference.norm import normalize

    layer = LayerNormLinear(160, 96, normalization="RMSNorm", bias=False, params_dtype=torch.bfloat16)
    x = Unit.of(16).x.detach()
    with autocast(recipe=DelayedScaling()):
        out = layer(x)
    assert isinstance(out, torch.Tensor)
    norm = normalize(
        two(x), layer.layer_norm_weight, None, eps=layer.eps, zero_centered_gamma=False, rounded=False
    ).detach()
    weight = E4M3.decode(E4M3.encode(layer.get_parameter("weight").detach().float()))
    held(out, E4M3.decode(E4M3.encode(norm)), weight)
    assert layer.delayed is not None
    assert layer.delayed.forward.amax_history[-1, 0] == norm.abs().max()
    with pytest.raises(AssertionError):
        held(out, E4M3.decode(E4M3.encode(norm.bfloat16().float())), weight)


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "message"),
    [
        (12, 32, 16, "12 tokens .*: a multiple of 8 is needed, 4 short.*pad_to_multiple_of"),
        (16, 24, 16, "24 input features: a multiple of 16 is needed, 8 short.*Pad the layer"),
        (16, 32, 12, "12 output features: a multiple of 8 is needed, 4 short"),
    ],
)
def test_sizes_that_no_fp8_gemm_takes_are_refused(tokens: int, inputs: int, outputs: int, message: str) -> None:
    unit = Unit.of(13, tokens, inputs, outputs)
    with autocast(recipe=Float8CurrentScaling()), pytest.raises(ConversionError, match=message):
        Module().gemm(unit.x, unit.weight)


@pytest.mark.parametrize(("precision", "multiple"), [("mxfp8", 32), ("nvfp4", 16)])
def test_blocks_need_more_tokens(precision: str, multiple: int) -> None:
    unit = Unit.of(14, tokens=8, inputs=32, outputs=32)
    with autocast(recipe=recipe_of(precision)), pytest.raises(ConversionError, match=f"pad_to_multiple_of={multiple}"):
        Module().gemm(unit.x, unit.weight)


def test_what_the_reference_does_not_compute_is_refused() -> None:
    class CustomRecipe:
        """A recipe by name only."""

    for recipe, message in (
        (NVFP4BlockScaling(row_scaled_activation=True), "row_scaled_activation=True"),
        (NVFP4BlockScaling(nvfp4_4over6="weights"), "nvfp4_4over6='weights'"),
        (Float8CurrentScaling(backward_override="high_precision"), "backward_override='high_precision'"),
        (DelayedScaling(fp8_dpa=True), "fp8_dpa=True"),
        (CustomRecipe(), "no recipe CustomRecipe"),
    ):
        with pytest.raises(ConversionError, match=message):
            autocast(recipe=recipe)
    with pytest.raises(ConversionError, match=r"no recipe is called 'mxfp9'.*'mxfp8'"):
        recipe_of("mxfp9")


def test_precisions_name_recipes_and_the_devices_they_need() -> None:
    assert [scheme_of(recipe_of(each)) for each in PRECISIONS] == list(PRECISIONS)
    assert [compute_capability(each) for each in PRECISIONS] == [(8, 9), (8, 9), (9, 0), (10, 0), (10, 0)]


def test_recipes_equal_those_of_transformer_engine() -> None:
    """Names, fields and defaults, of the classes that stand in where it is not installed."""
    from converters.te.quantization import recipe_classes

    try:
        from transformer_engine.common import recipe as real
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"Transformer Engine's recipes cannot be imported: {error}")
    for name in (
        "DelayedScaling",
        "Float8CurrentScaling",
        "Float8BlockScaling",
        "MXFP8BlockScaling",
        "NVFP4BlockScaling",
    ):
        ours, theirs = getattr(recipe_classes, name)(), getattr(real, name)()
        derived = {"fp4_quant_fwd_inp", "fp4_quant_fwd_weight", "fp4_quant_bwd_grad"}
        names = set(recipe_classes.fields_of(ours)) - derived
        assert names == set(recipe_classes.fields_of(theirs))
        names |= {each for each in dir(theirs) if each.startswith(("fp8_quant", "fp4_quant"))}
        for field in names:
            expected, found = getattr(theirs, field), getattr(ours, field)
            if hasattr(expected, "__dataclass_fields__"):
                assert recipe_classes.fields_of(expected) == recipe_classes.fields_of(found), (name, field)
            elif hasattr(expected, "value"):
                assert (expected.name, tuple(expected.value)) == (found.name, tuple(found.value)), (name, field)
            else:
                assert expected == found, (name, field)


def test_quantised_parameters_hold_values_of_the_grid_and_stay_as_they_were_rounded() -> None:
    unit = Unit.of(15)
    recipe = Float8CurrentScaling()
    with quantized_model_init(recipe=recipe):
        module = Module()
    module.register_parameter("weight", torch.nn.Parameter(unit.weight.detach().clone()))
    rounded = CurrentQuantizer(format=E4M3).quantize(unit.weight.detach())
    saved = module.state_dict()["weight"]
    assert torch.equal(saved, rounded.dequantize(torch.bfloat16))
    weight = module.get_parameter("weight")
    with torch.no_grad():
        assert torch.equal(module.gemm(unit.x, weight), torch.nn.functional.linear(unit.x, saved))
    with autocast(recipe=recipe):
        out = module.gemm(unit.x, weight)
    held(out, CurrentQuantizer(format=E4M3).quantize(two(unit.x)).dequantize(), rounded.dequantize())
    with torch.no_grad():
        weight.add_(unit.weight * 0.3)
    again = CurrentQuantizer(format=E4M3).quantize(weight.detach()).dequantize(torch.bfloat16)
    assert torch.equal(module.state_dict()["weight"], again)
    with autocast(recipe=MXFP8BlockScaling()), pytest.raises(ConversionError, match="held in Float8CurrentScaling"):
        module.gemm(unit.x, weight)
