"""The reference's quantizers and their state against Transformer Engine's kernels: every code and scale to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from on_gpu import DEVICE, lacking, precisions, reset_recipes, transformer_engine
from side_by_side import distances, flat, random, trio
from torch import Tensor

from converters.te import quantization
from converters.te.quantization.formats import E4M3, E5M2, FloatFormat
from converters.te.quantization.quantizers import BlockQuantizer, CurrentQuantizer, DelayedQuantizer
from converters.te.quantization.recipes import DelayedScaling, recipe_of
from converters.te.reference import module as reference_module
from parity import bounds

Record = Callable[[str, object], None]
DTYPES = (torch.bfloat16, torch.float32)
FORMATS = {"e4m3": E4M3, "e5m2": E5M2}


@pytest.fixture(autouse=True)
def _no_state() -> Iterator[None]:
    yield
    if not lacking():
        reset_recipes()


# --- tensors ----------------------------------------------------------------------------------------------------------


def spread(rows: int, cols: int, seed: int, orders: int) -> Tensor:
    """Magnitudes that differ by up to 2^(4 orders) between rows and between columns: no two scales are alike."""
    generator = torch.Generator().manual_seed(seed)

    def powers(size: int) -> Tensor:
        return 2.0 ** torch.randint(-orders, orders + 1, (size,), generator=generator)

    return torch.randn(rows, cols, generator=generator) * powers(rows)[:, None] * powers(cols)[None]


def tensors() -> dict[str, Tensor]:
    """By what is special about them; float32."""
    zeros = spread(256, 384, 5, 4)
    zeros[:130], zeros[:, 7], zeros[200] = 0.0, -0.0, 0.0
    tiny = spread(128, 256, 6, 2) * 2.0**-132  # subnormal in float32 and in bf16
    near = torch.linspace(-500, 500, 128 * 256).view(128, 256)  # through every tie of E4M3 once it is scaled
    return {
        "ordinary": spread(256, 384, 1, 0),
        "many magnitudes": spread(256, 384, 2, 6),
        "short blocks": spread(208, 336, 3, 6),
        "zeros": zeros,
        "all zero": torch.zeros(128, 256),
        "subnormal": tiny,
        "near the largest float": spread(128, 256, 7, 3) * 2.0**112,
        "ties": near,
    }


TENSORS = tensors()


def bits(tensor: Tensor) -> Tensor:
    """On the CPU, as integers: equal zeros of other sign are not equal."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor.view(torch.uint8)


def assert_same(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)}, expected {tuple(expected.shape)}"
    one, two = bits(found), bits(expected)
    differ = (one != two).nonzero()
    if len(differ):
        at = tuple(differ[0].tolist())
        pytest.fail(
            f"{what}: {len(differ)} of {one.numel()} differ, the first at {at}: {found.cpu()[at]} "
            f"({int(one[at]) & 0xFFFFFFFF:#x}), expected {expected[at]} ({int(two[at]) & 0xFFFFFFFF:#x})"
        )


def te_format(target: FloatFormat) -> Any:
    import transformer_engine_torch as tex

    return tex.DType.kFloat8E4M3 if target is E4M3 else tex.DType.kFloat8E5M2


def made(quantizer: Any, x: Tensor) -> Any:
    """What a real quantizer makes of `x`, for both usages."""
    quantizer.set_usage(rowwise=True, columnwise=True)
    return quantizer(x.to(DEVICE))


# --- quantizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("precision", precisions("fp8-delayed"))
def test_delayed_scaling(precision: str, name: str, dtype: torch.dtype, kind: str) -> None:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    x, target = TENSORS[name].to(dtype), FORMATS[kind]
    for scale in (1.0, 3.7, 0.011):
        placed = torch.tensor([scale], device=DEVICE)
        real = Float8Quantizer(scale=placed, amax=torch.zeros(1, device=DEVICE), fp8_dtype=te_format(target))
        ours = DelayedQuantizer(format=target, scale=torch.tensor(scale), amax=torch.zeros(()))
        found, expected = made(real, x), ours.quantize(x)
        data, scales = expected.stored()
        assert_same(found._data, data, f"codes at scale {scale}")
        assert_same(found._transpose, ours.quantize(x, columnwise=True).stored()[0], f"transposed, scale {scale}")
        assert_same(found._scale_inv, scales, "inverse scale")
        assert_same(real.amax, ours.amax.reshape(1), "largest magnitude")
        assert_same(found.dequantize(dtype=torch.float32), expected.dequantize(), "dequantised")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("precision", precisions("fp8-current"))
def test_current_scaling(precision: str, power_of_two: bool, name: str, dtype: torch.dtype, kind: str) -> None:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    x, target = TENSORS[name].to(dtype), FORMATS[kind]
    for epsilon in (0.0, 0.25):
        real = Float8CurrentScalingQuantizer(
            te_format(target),
            device=torch.device(DEVICE),
            force_pow_2_scales=power_of_two,
            amax_epsilon=epsilon,
        )
        ours = CurrentQuantizer(format=target, epsilon=epsilon, power_of_two=power_of_two)
        found, expected = made(real, x), ours.quantize(x)
        data, scales = expected.stored()
        assert_same(found._scale_inv, scales, f"inverse scale, epsilon {epsilon}")
        assert_same(found._data, data, f"codes, epsilon {epsilon}")
        assert_same(found._transpose, ours.quantize(x, columnwise=True).stored()[0], "transposed")


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("precision", precisions("fp8-block"))
def test_block_scaling(precision: str, power_of_two: bool, name: str, dtype: torch.dtype, dims: int) -> None:
    """Scales beyond the matrix are padding for GEMMs and mean nothing."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    x = TENSORS[name].to(dtype)
    for kind, epsilon in (("e4m3", 0.0), ("e4m3", 0.25), ("e5m2", 0.0)):
        target = FORMATS[kind]
        real = Float8BlockQuantizer(
            te_format(target),
            rowwise=True,
            columnwise=True,
            amax_epsilon=epsilon,
            force_pow_2_scales=power_of_two,
            block_scaling_dim=dims,
        )
        ours = BlockQuantizer(
            format=target, block=(128 if dims == 2 else 1, 128), epsilon=epsilon, power_of_two=power_of_two
        )
        found, what = made(real, x), f"{kind}, epsilon {epsilon}"
        for usage in ("rowwise", "columnwise"):
            data, scales = ours.quantize(x, columnwise=usage == "columnwise").stored()
            stored = getattr(found, f"_{usage}_scale_inv")
            assert_same(stored[: scales.shape[0], : scales.shape[1]], scales, f"{usage} scales, {what}")
            assert_same(getattr(found, f"_{usage}_data"), data, f"{usage} codes, {what}")


# --- GEMMs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", precisions())
@pytest.mark.parametrize("sizes", [(128, 256, 384), (96, 192, 320)], ids=["whole blocks", "short blocks"])
def test_products_of_the_same_codes(sizes: tuple[int, int, int], precision: str, record_property: Record) -> None:
    """Forward, dgrad and wgrad against exact products (float64) of what the reference's codes stand for."""
    tokens, inputs, outputs = sizes
    recipe = recipe_of(precision)
    real, ours, _ = trio("Linear", torch.bfloat16, in_features=inputs, out_features=outputs, bias=False)
    x = (spread(tokens, inputs, 1, 3) / 8).bfloat16()
    gradient = (spread(tokens, outputs, 2, 3) / 8).bfloat16()
    found = step(transformer_engine(), real, recipe, x, gradient, DEVICE)
    expected = step(quantization, ours, recipe, x, gradient, "cpu")
    if precision == "fp8-delayed":  # of the first step: every scale is one
        operands = quantization.delayed.DelayedState(recipe, 1).operands(0)
    else:
        operands = quantization.recipes.operands_of(recipe)

    def values(quantizer: Any, tensor: Tensor, columnwise: bool) -> Tensor:
        return quantizer.quantize(tensor.detach(), columnwise=columnwise).dequantize().double()

    weight = ours.weight
    exact = {
        "output": values(operands.input, x, False) @ values(operands.weight, weight, False).T,
        "dgrad": values(operands.grad, gradient, False) @ values(operands.weight, weight, True).T,
        "wgrad": values(operands.grad, gradient, True) @ values(operands.input, x, True).T,
    }
    wrong = []
    for name, wanted in exact.items():
        limit, distance = distances(found[name], expected[name], wanted)
        record_property(f"{name}, share of its bound", distance / limit)
        same = float((found[name] == expected[name]).float().mean())
        record_property(f"{name}, share of elements equal to the reference's bit for bit", same)
        if not distance <= limit:
            wrong.append(f"{name}: {distance:.3g} from the exact product, allowed {limit:.3g}")
    assert not wrong, "\n".join(wrong)


def step(
    library: Any, layer: Any, recipe: Any, x: Tensor, gradient: Tensor, device: str, **options: Any
) -> dict[str, Tensor]:
    """One training step of a layer: what came of it, on the CPU."""
    layer.zero_grad()
    own = x.detach().to(device, copy=True).requires_grad_()
    with library.autocast(enabled=True, recipe=recipe):
        out = layer(own, **options)
    out.backward(gradient.to(device))
    weight = layer.weight if hasattr(layer, "weight") else layer.fc1_weight
    found = {"output": out, "dgrad": own.grad, "wgrad": weight.grad}
    return {name: each.detach().cpu() for name, each in found.items()}


# --- the state of delayed scaling -------------------------------------------------------------------------------------

RECIPES: dict[str, dict[str, Any]] = {
    "max of 4": {"amax_history_len": 4, "amax_compute_algo": "max"},
    "most recent of 3": {"amax_history_len": 3, "amax_compute_algo": "most_recent"},
    "margin 2": {"amax_history_len": 5, "margin": 2},
    "one row": {"amax_history_len": 1},
    "e4m3": {"amax_history_len": 4, "fp8_format": quantization.recipes.Format.E4M3},
}
MAGNITUDES = (1.0, 37.0, 0.02, 0.0, 5.0, 900.0, 1e-4, 3.0)
DELAYED = pytest.mark.parametrize("precision", precisions("fp8-delayed"))


def real_state(layer: Any) -> dict[str, Tensor]:
    return {
        f"{name} ({side})": getattr(layer.fp8_meta[f"scaling_{side}"], name).detach().cpu().clone()
        for side in ("fwd", "bwd")
        for name in ("scale", "amax_history")
    }


def our_state(layer: Any) -> dict[str, Tensor]:
    return {
        f"{name} ({side})": getattr(getattr(layer.delayed, direction), name).clone()
        for side, direction in (("fwd", "forward"), ("bwd", "backward"))
        for name in ("scale", "amax_history")
    }


def assert_same_state(real: Any, ours: Any, when: str) -> None:
    found, expected = real_state(real), our_state(ours)
    for name in expected:
        assert_same(found[name], expected[name], f"{name} {when}")


@pytest.mark.parametrize("fields", RECIPES.values(), ids=RECIPES)
@DELAYED
def test_scales_and_histories_over_steps(precision: str, fields: dict[str, Any]) -> None:
    """Both to the bit after each training step: magnitudes rise, fall, vanish, and drop out of the history."""
    recipe = DelayedScaling(**fields)
    real, ours, _ = trio("Linear", torch.bfloat16, in_features=128, out_features=96, bias=False)
    for index, magnitude in enumerate(MAGNITUDES):
        x = magnitude * random(64, 128, seed=index, dtype=torch.bfloat16)
        gradient = (magnitude + 1) * random(64, 96, seed=90 + index, dtype=torch.bfloat16)
        step(transformer_engine(), real, recipe, x, gradient, DEVICE)
        step(quantization, ours, recipe, x, gradient, "cpu")
        assert_same_state(real, ours, f"after step {index}")


@DELAYED
def test_steps_without_gradients_change_no_state(precision: str) -> None:
    recipe = DelayedScaling(amax_history_len=4)
    real, ours, _ = trio("Linear", torch.bfloat16, in_features=128, out_features=96, bias=False)
    for index, learning in enumerate((True, False, False, True)):
        x = (index + 1) * random(64, 128, seed=index, dtype=torch.bfloat16)
        gradient = random(64, 96, seed=90, dtype=torch.bfloat16)
        for library, layer, device in ((transformer_engine(), real, DEVICE), (quantization, ours, "cpu")):
            if learning:
                step(library, layer, recipe, x, gradient, device)
                continue
            with torch.no_grad(), library.autocast(enabled=True, recipe=recipe):
                layer(x.to(device))
        assert_same_state(real, ours, f"after step {index}")


@DELAYED
def test_weights_kept_between_microbatches(precision: str) -> None:
    """`is_first_microbatch=False`: the weight of the first microbatch, quantised with the scale of that time.

    Its scale has moved on since, and its largest magnitude is not recorded again.
    """
    recipe = DelayedScaling(amax_history_len=4)
    real, ours, _ = trio("Linear", torch.bfloat16, in_features=128, out_features=96, bias=False)
    gradient = random(64, 96, seed=90, dtype=torch.bfloat16)
    for index, first in enumerate((True, False, False, True, False)):
        x = (index + 1) * random(64, 128, seed=index, dtype=torch.bfloat16)
        given = {"is_first_microbatch": first}
        found = step(transformer_engine(), real, recipe, x, gradient, DEVICE, **given)
        expected = step(quantization, ours, recipe, x, gradient, "cpu", **given)
        assert_same_state(real, ours, f"after microbatch {index}")
        for name, value in found.items():
            # Equal codes leave the order of summation and one rounding to bf16; other codes are 2^-4 apart.
            wanted = expected[name]
            apart = bounds.rms(flat(value), flat(wanted)).value / float(wanted.double().pow(2).mean().sqrt())
            assert apart < 2.0**-8, f"{name} of microbatch {index}: {apart:.3g} apart"


@DELAYED
def test_extra_state_is_read_on_either_side(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one wrote the other goes on from, to the bit of the steps that follow."""
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")  # these bytes were made a line ago
    recipe = DelayedScaling(amax_history_len=4, margin=1)
    real, ours, _ = trio("Linear", torch.bfloat16, in_features=128, out_features=96, bias=False)

    def go(layer: Any, library: Any, device: str, seeds: tuple[int, ...]) -> None:
        for seed in seeds:
            x, gradient = (random(64, n, seed=seed + n, dtype=torch.bfloat16) * (seed + 1) for n in (128, 96))
            step(library, layer, recipe, x, gradient, device)

    go(real, transformer_engine(), DEVICE, (0, 1, 2))
    ours.set_extra_state(real.get_extra_state())
    assert_same_state(real, ours, "read by the reference")
    go(ours, quantization, "cpu", (3,))
    other, _, _ = trio("Linear", torch.bfloat16, in_features=128, out_features=96, bias=False)
    other.set_extra_state(ours.get_extra_state())
    assert_same_state(other, ours, "read by Transformer Engine")
    go(ours, quantization, "cpu", (4, 5))
    go(other, transformer_engine(), DEVICE, (4, 5))
    assert_same_state(other, ours, "two steps later")


# --- what is quantised between a norm or an activation and its GEMM ---------------------------------------------------


@pytest.mark.parametrize("name", ["LayerNormLinear", "LayerNormMLP"])
@pytest.mark.parametrize("precision", precisions())
def test_what_comes_before_a_gemm_is_rounded_as_the_reference_has_it(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    """Results of norms and activations are quantised from float32, or from bf16: that of `wants_unrounded` is nearer.

    The other is tried as well; at least one of the two differs from the reference in many codes, or nothing is settled.
    """
    arguments: dict[str, Any] = {"eps": 3e-3, "normalization": "RMSNorm", "bias": False}
    if name == "LayerNormLinear":
        arguments |= {"in_features": 256, "out_features": 128}
    else:
        arguments |= {"hidden_size": 256, "ffn_hidden_size": 256, "activation": "swiglu"}
    real, ours, _ = trio(name, torch.bfloat16, **arguments)
    x = random(256, 256, seed=1, dtype=torch.bfloat16)
    recipe = recipe_of(precision)
    usual = reference_module.Module.wants_unrounded
    after = "norm" if name == "LayerNormLinear" else "activation"

    def run(library: Any, layer: Any, device: str) -> Tensor:
        for _ in range(2):  # the second with scales of delayed scaling
            with library.autocast(enabled=True, recipe=recipe):
                out: Tensor = layer(x.to(device))
        return out.detach().cpu()

    found, expected = run(transformer_engine(), real, DEVICE), run(quantization, ours, "cpu")
    _, ours, _ = trio(name, torch.bfloat16, **arguments)
    monkeypatch.setattr(
        reference_module.Module,
        "wants_unrounded",
        lambda self, place: usual(self, place) != (place == after),
    )
    other = run(quantization, ours, "cpu")
    shares = {
        "as the reference has it": float((found != expected).float().mean()),
        f"otherwise after the {after}": float((found != other).float().mean()),
    }
    for what, share in shares.items():
        record_property(f"share of outputs that differ, rounded {what}", share)
    as_is, otherwise = shares.values()
    assert not torch.equal(expected, other), "both ways give the same: the test settles nothing"
    assert as_is < otherwise, f"Transformer Engine rounds otherwise than the reference: {shares}"


@pytest.mark.parametrize("name", ["LayerNormLinear", "LayerNormMLP"])
@DELAYED
def test_the_largest_magnitude_is_that_of_the_unrounded_norm(precision: str, name: str) -> None:
    """Delayed scaling records it, and shows it: float32 to the sums' order (2^-20), which is no bf16 number."""
    recipe = DelayedScaling(amax_history_len=4)
    arguments: dict[str, Any] = {"eps": 3e-3, "normalization": "RMSNorm", "bias": False}
    if name == "LayerNormLinear":
        arguments |= {"in_features": 128, "out_features": 96}
    else:
        arguments |= {"hidden_size": 128, "ffn_hidden_size": 96, "activation": "swiglu"}
    real, ours, _ = trio(name, torch.bfloat16, **arguments)
    wrong, apart = [], 0.0
    for index in range(4):
        x = random(64, 128, seed=index, dtype=torch.bfloat16)
        gradient = random(64, 96 if name == "LayerNormLinear" else 128, seed=50 + index, dtype=torch.bfloat16)
        step(transformer_engine(), real, recipe, x, gradient, DEVICE)
        step(quantization, ours, recipe, x, gradient, "cpu")
        seen, expected = (
            float(state(layer)["amax_history (fwd)"][-1, 0]) for state, layer in ((real_state, real), (our_state, ours))
        )
        apart = max(apart, abs(float(torch.tensor(expected).bfloat16()) / expected - 1))
        if abs(seen / expected - 1) > 2.0**-20:
            wrong.append(f"step {index}: {seen!r}, the reference {expected!r}")
    assert apart > 2.0**-12, "these magnitudes are bf16 numbers: the test settles nothing"
    assert not wrong, "\n".join(wrong)
