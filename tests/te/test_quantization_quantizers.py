"""The quantizers: vectors by hand, a slow statement of each rule, Transformer Engine's own references, and laws.

Inputs spread over many orders of magnitude, by row and by column, so that no two scales are alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from converters.errors import ConversionError
from converters.te.quantization import hadamard
from converters.te.quantization.formats import E2M1, E4M3, E5M2, FloatFormat, pack
from converters.te.quantization.quantized import Quantized
from converters.te.quantization.quantizers import (
    BlockQuantizer,
    CurrentQuantizer,
    DelayedQuantizer,
    MXQuantizer,
    NVFP4Quantizer,
    Quantizer,
)

BIG = np.float32(np.finfo(np.float32).max)


def delayed(scale: float = 3.7) -> DelayedQuantizer:
    return DelayedQuantizer(format=E4M3, scale=torch.tensor(scale), amax=torch.zeros(()))


EVERY: dict[str, Quantizer] = {
    "delayed": delayed(),
    "current-e4m3": CurrentQuantizer(format=E4M3),
    "current-e5m2": CurrentQuantizer(format=E5M2),
    "current-power": CurrentQuantizer(format=E4M3, power_of_two=True),
    "block-1x128": BlockQuantizer(format=E4M3, block=(1, 128)),
    "block-128x128": BlockQuantizer(format=E4M3, block=(128, 128)),
    "block-fp32": BlockQuantizer(format=E5M2, block=(1, 128), power_of_two=False),
    "mx": MXQuantizer(format=E4M3),
    "mx-e5m2": MXQuantizer(format=E5M2),
    "mx-32x32": MXQuantizer(format=E4M3, block=(32, 32)),
    "nvfp4": NVFP4Quantizer(),
    "nvfp4-16x16": NVFP4Quantizer(block=(16, 16)),
    "nvfp4-stochastic": NVFP4Quantizer(stochastic=True, generator=torch.Generator().manual_seed(5)),
}
ALL = pytest.mark.parametrize("name", EVERY)


def spread(rows: int, cols: int, seed: int, orders: int = 12) -> Tensor:
    """bf16 whose magnitudes differ by up to 2^(2 orders) between rows and between columns."""
    generator = torch.Generator().manual_seed(seed)

    def powers(size: int) -> Tensor:
        return 2.0 ** torch.randint(-orders, orders + 1, (size,), generator=generator)

    x = torch.randn(rows, cols, generator=generator) * powers(rows)[:, None] * powers(cols)[None]
    return x.bfloat16()


# --- a slow statement -------------------------------------------------------------------------------------------------


def nearest(value: np.float32, target: FloatFormat) -> float:
    """The value of the format nearest to `value`, by search; ties to the even code."""
    codes = range(8 if target is E2M1 else 127 if target is E4M3 else 124)
    grid = target.decode(torch.tensor(list(codes), dtype=torch.uint8)).tolist()
    magnitude = min(abs(float(value)), grid[-1])
    best = min(codes, key=lambda code: (abs(grid[code] - magnitude), code % 2))
    return math.copysign(grid[best], float(value))


def tiles(x: np.ndarray[Any, Any], block: tuple[int, int]) -> list[tuple[slice, slice]]:
    return [
        (slice(i, i + block[0]), slice(j, j + block[1]))
        for i in range(0, x.shape[0], block[0])
        for j in range(0, x.shape[1], block[1])
    ]


def slow_block(
    x: Tensor, target: FloatFormat, block: tuple[int, int], scale: Callable[[np.float32], np.float32]
) -> Tensor:
    """Dequantised values, tile by tile and element by element."""
    values = x.float().numpy()
    out = np.zeros_like(values)
    for where in tiles(values, block):
        factor = scale(np.float32(np.abs(values[where]).max()))
        codes = [[nearest(np.float32(v) * factor, target) for v in row] for row in values[where]]
        out[where] = np.array(codes, dtype=np.float32) * (np.float32(1) / factor)
    return torch.from_numpy(out)


def power_below(value: float) -> np.float32:
    return np.float32(2.0 ** math.floor(math.log2(value)))


def test_block_scales_are_powers_of_two_below_the_quotient() -> None:
    x = spread(40, 160, 1)
    found = BlockQuantizer(format=E4M3, block=(1, 128)).quantize(x)
    expected = slow_block(x, E4M3, (1, 128), lambda amax: power_below(float(np.float32(448) / amax)))
    assert torch.equal(found.dequantize(), expected)
    assert found.scale_inv.shape == (40, 2)
    assert found.scale_inv.unique().numel() > 10


def test_square_blocks_share_a_scale_over_rows_and_columns_short_at_the_edges() -> None:
    x = spread(136, 144, 2)
    found = BlockQuantizer(format=E4M3, block=(128, 128)).quantize(x)
    expected = slow_block(x, E4M3, (128, 128), lambda amax: power_below(float(np.float32(448) / amax)))
    assert torch.equal(found.dequantize(), expected)
    assert found.scale_inv.unique().numel() == 4


def test_mx_scales_are_the_least_power_that_fits() -> None:
    x = spread(32, 64, 3)
    for target in (E4M3, E5M2):
        found = MXQuantizer(format=target).quantize(x)
        assert torch.equal(
            found.dequantize(), slow_block(x, target, (1, 32), functools.partial(power_that_fits, target))
        )
        assert found.scale_inv.unique().numel() > 10
        assert float(found.dequantize().abs().max()) <= float(x.float().abs().max()) * 1.07


def power_that_fits(target: FloatFormat, amax: np.float32) -> np.float32:
    return np.float32(2.0 ** -math.ceil(math.log2(float(amax * np.float32(1 / target.largest)))))


def test_current_scaling_by_hand() -> None:
    x = torch.tensor([[0.5, -7.0, 0.01, 3.0]]).bfloat16()
    found = CurrentQuantizer(format=E4M3).quantize(x)
    # 448 / 7 = 64: 32, -448, .64 (bf16 .010009766 * 64 = .640625, of .0625 steps: .625), 192
    assert E4M3.decode(found.codes).tolist() == [[32.0, -448.0, 0.625, 192.0]]
    assert found.scale_inv.tolist() == [[1 / 64]]
    data, scale = found.stored()
    assert data.tolist() == [[0x60, 0xFE, 0x32, 0x74]]
    assert scale.tolist() == [1 / 64]


def test_current_scaling_options() -> None:
    x = torch.tensor([[0.5, -5.0]])
    assert float(CurrentQuantizer(format=E4M3).quantize(x).scale_inv) == float(1 / (torch.tensor(448.0) / 5))
    assert float(CurrentQuantizer(format=E4M3, power_of_two=True).quantize(x).scale_inv) == 1 / 64
    assert float(CurrentQuantizer(format=E4M3, epsilon=7.0).quantize(x).scale_inv) == 1 / 64
    assert float(CurrentQuantizer(format=E5M2, epsilon=3.0).quantize(x).scale_inv) == float(
        1 / (torch.tensor(57344.0) / 5)
    )


@pytest.mark.parametrize(
    ("values", "scale"),
    [([0.0, 0.0], 1.0), ([math.inf, 1.0], 1.0), ([math.nan, 2.0], 224.0), ([2.0**-149, 0.0], float(BIG))],
)
def test_current_scaling_at_the_edges(values: list[float], scale: float) -> None:
    found = CurrentQuantizer(format=E4M3).quantize(torch.tensor([values]))
    assert float(found.scale_inv) == float(1 / torch.tensor(scale))


def test_current_scaling_after_an_activation_takes_amax_before_rounding() -> None:
    x = spread(64, 160, 8, orders=3).float() * (1 + 2.0**-9.3)
    found = CurrentQuantizer(format=E4M3, rounded=torch.bfloat16).quantize(x)
    scale = torch.tensor(448.0) / x.abs().max()
    assert float(found.scale_inv) == float(1 / scale) != float(x.bfloat16().abs().max() / 448)
    assert torch.equal(found.codes, E4M3.encode(x.bfloat16().float() * scale))
    assert not torch.equal(found.codes, E4M3.encode(x * scale))


def test_delayed_scaling_uses_the_old_scale_saturates_and_records() -> None:
    quantizer = delayed(2.0)
    found = quantizer.quantize(torch.tensor([[1.5, -300.0, 0.0]]))
    assert E4M3.decode(found.codes).tolist() == [[3.0, -448.0, 0.0]]
    assert found.dequantize().tolist() == [[1.5, -224.0, 0.0]]
    assert float(quantizer.amax) == 300.0
    quantizer.quantize(torch.tensor([[8.0]]))
    assert float(quantizer.amax) == 300.0
    assert float(found.bound()[0, 1]) == pytest.approx(76.0, rel=1e-4)


def test_nvfp4_by_hand() -> None:
    x = torch.zeros(16, 32)
    x[0, :4] = torch.tensor([12.0, 6.0, -1.0, 0.4])
    x[0, 16:19] = torch.tensor([0.375, -0.25, 0.03])
    found = NVFP4Quantizer().quantize(x)
    # Of the whole: 448 * 6 / 12 = 224. First block: 12 / 6 * 224 = 448, second: .375 / 6 * 224 = 14.
    assert found.scale_inv[0].tolist() == [448.0, 14.0]
    # Elements: 12 / 2 = 6, 3, -.5, .2 -> 0 ; .375 / .0625 = 6, -4, .48 -> .5
    assert E2M1.decode(found.codes)[0, :4].tolist() == [6.0, 3.0, -0.5, 0.0]
    assert E2M1.decode(found.codes)[0, 16:19].tolist() == [6.0, -4.0, 0.5]
    assert found.dequantize()[0, :4].tolist() == pytest.approx([12.0, 6.0, -1.0, 0.0], rel=1e-6)
    data, scales = found.stored()
    assert data.shape == (16, 16)
    assert data[0, :2].tolist() == [0x57, 0x09]
    assert scales.dtype == torch.uint8
    assert scales[0].tolist() == [0x7E, 0x56]


@pytest.mark.parametrize("block", [(1, 16), (16, 16)])
def test_nvfp4_scales_at_two_levels(block: tuple[int, int]) -> None:
    x = spread(32, 96, 10, orders=3)
    whole = np.float32(448 * 6) / np.float32(float(x.abs().max()))

    def scale(amax: np.float32) -> np.float32:
        level = np.float32(nearest(amax * (whole * np.float32(1 / 6)), E4M3))
        return min(np.float32(1) / (level * (np.float32(1) / whole)), BIG) if level else BIG

    found = NVFP4Quantizer(block=block).quantize(x)
    torch.testing.assert_close(found.dequantize(), slow_block(x, E2M1, block, scale), rtol=2.0**-21, atol=0)
    assert found.scale_inv.unique().numel() > 6


def test_hadamard_transform_is_orthogonal_and_has_the_fixed_signs() -> None:
    matrix = hadamard.matrix()
    assert torch.equal(matrix @ matrix.T, torch.eye(16))
    assert (matrix[:, 0] * 4).tolist() == [1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]
    x = torch.zeros(1, 32).bfloat16()
    x[0, 16] = 8.0
    assert hadamard.transform(x)[0].tolist() == [0.0] * 16 + [2.0] * 16


def test_the_transform_is_of_columnwise_usage_alone() -> None:
    x = spread(32, 48, 4, orders=3)
    plain, turned = NVFP4Quantizer(), NVFP4Quantizer(transform=True)
    assert torch.equal(plain.quantize(x).codes, turned.quantize(x).codes)
    expected = plain.quantize(hadamard.transform(x.T.contiguous()))
    found = turned.quantize(x, columnwise=True)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale_inv, expected.scale_inv)
    assert not torch.equal(found.codes, plain.quantize(x, columnwise=True).codes)
    with pytest.raises(ConversionError, match=r"bfloat16 tensors alone, found torch\.float32"):
        turned.quantize(x.float())


@pytest.mark.parametrize(
    ("quantizer", "rows", "cols"), [(MXQuantizer(format=E4M3), 48, 64), (NVFP4Quantizer(), 16, 24)]
)
def test_sizes_that_blocks_do_not_divide_are_refused(quantizer: Quantizer, rows: int, cols: int) -> None:
    with pytest.raises(ConversionError, match=f"{rows} rows .* and {cols} columns .*pad_to_multiple_of"):
        quantizer.quantize(torch.ones(rows, cols).bfloat16())


def test_layouts_are_those_of_transformer_engine() -> None:
    x = spread(64, 160, 6)

    def shapes(quantizer: Quantizer, columnwise: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        data, scales = quantizer.quantize(x, columnwise=columnwise).stored()
        return tuple(data.shape), tuple(scales.shape)

    assert shapes(CurrentQuantizer(format=E4M3), True) == ((160, 64), (1,))
    assert shapes(BlockQuantizer(format=E4M3, block=(1, 128)), False) == ((64, 160), (2, 64))
    assert shapes(BlockQuantizer(format=E4M3, block=(1, 128)), True) == ((160, 64), (1, 160))
    assert shapes(BlockQuantizer(format=E4M3, block=(128, 128)), True) == ((160, 64), (2, 1))
    assert shapes(MXQuantizer(format=E4M3), False) == ((64, 160), (64, 5))
    assert shapes(MXQuantizer(format=E4M3), True) == ((64, 160), (2, 160))
    assert shapes(NVFP4Quantizer(), True) == ((160, 32), (160, 4))
    assert shapes(NVFP4Quantizer(block=(16, 16)), False) == ((64, 80), (64, 10))


# --- Transformer Engine's references in torch -------------------------------------------------------------------------


def reference(module: str) -> Any:
    """A module of Transformer Engine's custom recipes."""
    import importlib

    try:
        return importlib.import_module(f"transformer_engine.pytorch.custom_recipes.{module}")
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"Transformer Engine's references cannot be imported: {error}")


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("target", [E4M3, E5M2], ids=lambda each: each.name)
@pytest.mark.parametrize("seed", range(4))
def test_current_scaling_equals_the_reference_of_transformer_engine(
    target: FloatFormat, power_of_two: bool, seed: int
) -> None:
    theirs = reference("reference_current_scaling").CurrentScalingQuantizerRef(
        dtype=target.dtype, pow_2_scales=power_of_two
    )
    x = spread(48, 80, seed, orders=seed * 3)
    expected = theirs.quantize(x)
    for columnwise, data, scale in ((False, expected.data, expected.scale), (True, expected.data_t, expected.scale_t)):
        found = CurrentQuantizer(format=target, power_of_two=power_of_two).quantize(x, columnwise=columnwise)
        assert torch.equal(found.stored()[0], data.view(torch.uint8))
        assert torch.equal(found.stored()[1], scale.reshape(1))


@pytest.mark.parametrize(("block", "transform"), [((1, 16), False), ((1, 16), True), ((16, 16), False)])
@pytest.mark.parametrize("seed", range(4))
def test_nvfp4_equals_the_reference_of_transformer_engine(block: tuple[int, int], transform: bool, seed: int) -> None:
    formats = reference("reference_utils").Fp4Formats
    theirs = reference("reference_nvfp4").NVFP4QuantizerRef(
        dtype=formats.E2M1, quant_tile_shape=block, with_rht=transform
    )
    # Sums of 16 are exact in fp32 where magnitudes differ by less than 2^12, so no order of summation shows.
    x = spread(64, 96, seed, orders=2 if transform else seed * 3)
    expected = theirs.quantize(x)
    ours = NVFP4Quantizer(block=block, transform=transform)
    sides = (
        (False, expected.data, expected.scale, expected.global_amax_row),
        (True, expected.data_t, expected.scale_t, expected.global_amax_col),
    )
    for columnwise, data, scale, amax in sides:
        found = ours.quantize(x, columnwise=columnwise)
        assert found.global_amax is not None
        assert float(found.global_amax) == float(amax)
        # The reference gives negative zero the code of zero; the hardware keeps its sign.
        zero = found.codes == 8
        negative = (x.T if columnwise else x).signbit() & ((x.T if columnwise else x) == 0)
        codes = torch.where(zero & negative, 0, found.codes).to(torch.uint8)
        assert torch.equal(pack(codes), data)
        assert torch.equal(found.stored()[1], scale.view(torch.uint8))


# --- laws -------------------------------------------------------------------------------------------------------------

SEEDS = st.integers(0, 2**31)
ORDERS = st.sampled_from([0, 2, 9, 20])


@ALL
@given(seed=SEEDS, orders=ORDERS, columnwise=st.booleans())
@settings(max_examples=6, deadline=None)
def test_every_element_is_within_its_bound(name: str, seed: int, orders: int, columnwise: bool) -> None:
    x = spread(64, 160, seed, orders)
    found = EVERY[name].quantize(x, columnwise=columnwise)
    error = ((x.T if columnwise else x).double() - found.dequantize().double()).abs()
    assert bool((error <= found.bound()).all())


@ALL
def test_the_bound_is_not_idle(name: str) -> None:
    """Somewhere the error comes near its bound, and the bound is within the format's relative precision."""
    x = spread(64, 160, 9, 4)
    found = EVERY[name].quantize(x)
    error = (x.double() - found.dequantize().double()).abs()
    assert float((error / found.bound()).max()) > 0.8
    values = found.format.decode(found.codes).abs()
    usual = (values >= 2.0**found.format.exponent) & (values < found.format.largest)
    step = 2.0 ** -(found.format.mantissa + (0 if found.stochastic else 1))
    relative = found.bound() / found.dequantize().double().abs()
    assert float(relative[usual].max()) <= step * 1.0001


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("delayed", "nvfp4-stochastic")])
@given(seed=SEEDS, power=st.integers(-15, 15))
@settings(max_examples=5, deadline=None)
def test_scaling_by_a_power_of_two_changes_scales_alone(name: str, seed: int, power: int) -> None:
    x = spread(32, 64, seed, 5)
    plain, scaled = EVERY[name].quantize(x), EVERY[name].quantize(x * 2.0**power)
    assert torch.equal(plain.codes, scaled.codes)
    assert torch.equal(plain.dequantize() * 2.0**power, scaled.dequantize())


@pytest.mark.parametrize("name", [name for name in EVERY if not name.startswith("nvfp4")])
@given(seed=SEEDS, orders=ORDERS)
@settings(max_examples=5, deadline=None)
def test_what_is_dequantised_quantises_to_the_same(name: str, seed: int, orders: int) -> None:
    """To the same codes under a scale that is kept or not a power of two; to the same values under all others.

    (A block whose largest element rounds down to half the format's range takes the next power of two, and twice the
    codes.) NVFP4 has no such law: its scales are rounded, so that the largest element moves.
    """
    first = EVERY[name].quantize(spread(32, 160, seed, orders))
    second = EVERY[name].quantize(first.dequantize())
    if name in ("delayed", "current-e4m3", "current-e5m2", "block-fp32"):
        assert torch.equal(first.codes, second.codes)
    else:
        assert torch.equal(first.dequantize(), second.dequantize())


@pytest.mark.parametrize("name", ["block-1x128", "mx", "nvfp4"])
def test_columnwise_is_of_the_original_and_not_of_the_rows(name: str) -> None:
    x = spread(64, 160, 11)
    rows, columns = EVERY[name].quantize(x), EVERY[name].quantize(x, columnwise=True)
    assert not torch.equal(rows.dequantize().T, columns.dequantize())
    expected = EVERY[name].quantize(x.T.contiguous())
    assert torch.equal(columns.codes, expected.codes)
    assert torch.equal(columns.scale_inv, expected.scale_inv)


@pytest.mark.parametrize("name", ["current-e4m3", "block-128x128", "mx-32x32", "nvfp4-16x16"])
def test_square_blocks_are_their_transpose(name: str) -> None:
    x = spread(96, 160, 12)
    turned, columns = EVERY[name].quantize(x).transposed(), EVERY[name].quantize(x, columnwise=True)
    assert torch.equal(turned.codes, columns.codes)
    assert torch.equal(turned.scale_inv, columns.scale_inv)
    assert turned.columnwise
    assert columns.columnwise


def test_operand_and_scale_of_the_whole_make_the_value() -> None:
    x = spread(32, 64, 13)
    for quantizer in EVERY.values():
        found: Quantized = quantizer.quantize(x)
        whole = found.scale_inv if found.block is None else torch.ones(())
        whole = whole if found.global_amax is None else found.global_amax.double() * found.unit
        torch.testing.assert_close(
            found.operand().double() * whole.double(), found.dequantize().double(), rtol=2.0**-21, atol=0
        )
