"""Quantising to FP8: scales and codes by hand, the bound, and that it is idempotent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.quantized import e4m3
from converters.te.quantization.formats import E4M3
from converters.values import Quantize


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_codes_by_hand() -> None:
    """Scale 1/2; ties go to the even mantissa; the last subnormal step is 2^-9; 448 is the end."""
    values = torch.tensor([[224.0, -224.0, 0.5, 8.5, 9.5, -0.0, 2.0**-10, 2.0**-11, 3 * 2.0**-11, 1.05, 231.0]])
    scales = e4m3.scales_for(torch.tensor([[224.0]]))
    assert scales.item() == 0.5
    codes = e4m3.encode(values, scales)
    assert codes.view(torch.uint8).tolist() == [[0x7E, 0xFE, 0x38, 0x58, 0x5A, 0x80, 0x01, 0x00, 0x02, 0x40, 0x7E]]
    back = e4m3.decode(codes, scales, torch.float32)
    assert back.tolist() == [[224.0, -224.0, 0.5, 8.0, 10.0, -0.0, 2.0**-10, 0.0, 2.0**-9, 1.0, 224.0]]
    assert torch.equal(codes.view(torch.uint8), E4M3.encode(values / scales))
    beyond = torch.tensor([[500.0, -1e38, float("inf")]])
    assert e4m3.encode(beyond, torch.ones(1, 1)).float().tolist() == [[448.0, -448.0, 448.0]]


@pytest.mark.parametrize(
    ("magnitude", "scale"),
    [
        (448.0, 1.0),
        (1.0, 146 / 128 * 2.0**-9),  # 1/448 = 1.142857 * 2^-9 = 146.29/128 * 2^-9
        (0.0, 2.0**-120),
        (1e-45, 2.0**-120),
        (3.4028235e38, 145 / 128 * 2.0**119),
    ],
)
def test_scales_by_hand(magnitude: float, scale: float) -> None:
    assert e4m3.scales_for(torch.tensor([magnitude])).item() == scale


def test_every_scale_comes_back_from_what_448_of_it_rounds_to() -> None:
    """All magnitudes that bfloat16 has."""
    magnitudes = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    scales = e4m3.scales_for(magnitudes)
    assert torch.equal(scales.to(torch.bfloat16).float(), scales)
    codes = e4m3.encode(magnitudes, scales)
    for dtype in (torch.float32, torch.bfloat16):
        again = e4m3.scales_for(e4m3.decode(codes, scales, dtype).float())
        assert torch.equal(again, scales)


@settings(max_examples=120, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from([(None, None), (1, None), (128, 128), (16, 32)]),
    st.integers(-149, 127),
    st.integers(0, 40),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.integers(0, 2**31),
)
def test_there_and_back_and_there(
    rows: int, columns: int, block: e4m3.Block, exponent: int, spread: int, dtype: torch.dtype, seed: int
) -> None:
    """The bound holds for every element, and codes and scales are those of what they stand for, in both dtypes."""
    numbers = torch.Generator().manual_seed(seed)
    exponents = exponent - torch.randint(0, spread + 1, (rows, columns), generator=numbers)
    exact = (1 + torch.rand(rows, columns, generator=numbers, dtype=torch.float64)) * 2.0 ** exponents.double()
    exact *= torch.randint(-1, 2, (rows, columns), generator=numbers)  # with zeros
    weight = exact.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    scales = e4m3.scales_for(e4m3.largest(weight, block))
    each = e4m3.spread(scales, block, slice(0, rows), weight.shape)
    codes = e4m3.encode(weight, each)
    for back in (torch.float32, torch.bfloat16):
        restored = e4m3.decode(codes, each, back)
        assert e4m3.worst(weight, restored, each) <= 1
        again = e4m3.scales_for(e4m3.largest(restored, block))
        assert torch.equal(again, scales)
        assert torch.equal(e4m3.encode(restored, each).view(torch.uint8), codes.view(torch.uint8))
        row, column = seed % rows, seed % columns
        error = abs(weight[row, column].double() - restored[row, column].double()).item()
        scale = each.expand(rows, columns)[row, column].item()
        declared = Quantize(str(back).removeprefix("torch.")).bound(weight[row, column].item(), scale)
        assert error <= declared


@given(st.floats(2.0**-12, 460), st.integers(-100, 100))
def test_the_measured_fraction_is_of_the_declared_bound(value: float, exponent: int) -> None:
    values, scales = torch.tensor([value * 2.0**exponent]), torch.tensor([2.0**exponent])
    for dtype in (torch.float32, torch.bfloat16):
        wrong = (values * 1.5).to(dtype)
        declared = Quantize(str(dtype).removeprefix("torch.")).bound(values.item(), scales.item())
        expected = abs(values.item() - wrong.double().item()) / declared
        assert e4m3.worst(values, wrong, scales) == pytest.approx(expected, rel=1e-4)


def test_the_bound_is_reached() -> None:
    """It is no larger than it has to be: halfway between two codes, in every binade."""
    midpoints = torch.tensor([[2.0**e * (1 + 1 / 16) for e in range(-6, 9)] + [2.0**-10, 3 * 2.0**-10]])
    one = torch.ones(1, 1)
    codes = e4m3.encode(midpoints, one)
    for at in range(midpoints.shape[1]):
        part = midpoints[:, at : at + 1]
        assert e4m3.worst(part, e4m3.decode(codes[:, at : at + 1], one, torch.float32), one) > 0.9999


@pytest.mark.parametrize("block", [(None, None), (1, None), (128, 128)])
def test_scales_lie_as_the_weight_does(block: e4m3.Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against one block at a time, with a matrix that is no multiple of 128, in several chunks."""
    monkeypatch.setattr(e4m3, "CHUNK", 1000)
    weight = torch.from_numpy(np.random.default_rng(1).normal(size=(300, 200)).astype(np.float32))
    weight *= torch.exp2(-(torch.arange(300)[:, None] // 40 + 2.0 * (torch.arange(200)[None] // 70)))
    scales = e4m3.scales_for(e4m3.largest(weight, block))
    height, width = block[0] or 300, block[1] or 200
    assert scales.shape == (-(-300 // height), -(-200 // width))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            rows, columns = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
            assert scales[i, j] == e4m3.scales_for(weight[rows, columns].abs().max())
            for at in range(rows.start, min(rows.stop, 300), 37):
                spread = e4m3.spread(scales, block, slice(at, at + 1), weight.shape).expand(1, 200)
                assert bool((spread[:, columns] == scales[i, j]).all())
    assert len(scales.unique()) > scales.numel() // 20
