"""The formats below bf16: every code, every bf16 value, and vectors worked out by hand from the specifications."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from converters.te.quantization.formats import (
    E2M1,
    E4M3,
    E5M2,
    FloatFormat,
    decode_e8m0,
    decode_e8m0_inverse,
    encode_e2m1_stochastic,
    encode_e8m0,
    pack,
    unpack,
)

FORMATS = pytest.mark.parametrize("target", [E4M3, E5M2, E2M1], ids=lambda each: each.name)


def by_hand(target: FloatFormat, code: int) -> float:
    """What a code stands for, from the layout: sign, exponent, mantissa."""
    bits = {"e4m3": 8, "e5m2": 8, "e2m1": 4}[target.name]
    sign = -1.0 if code >> (bits - 1) else 1.0
    code &= (1 << (bits - 1)) - 1
    exponent, mantissa = code >> target.mantissa, code & ((1 << target.mantissa) - 1)
    if target.name == "e4m3" and code == 0x7F:
        return math.nan
    if target.name == "e5m2" and exponent == 31:
        return math.nan if mantissa else sign * math.inf
    fraction = mantissa / (1 << target.mantissa)
    if exponent == 0:
        return sign * fraction * 2.0**target.exponent
    return sign * (1 + fraction) * 2.0 ** (exponent - 1 + target.exponent)


def every_bf16() -> Tensor:
    return torch.arange(-32768, 32768).to(torch.int16).view(torch.bfloat16).float()


@FORMATS
def test_every_code_decodes_to_the_value_of_its_bits(target: FloatFormat) -> None:
    codes = torch.arange(16 if target is E2M1 else 256).to(torch.uint8)
    expected = torch.tensor([by_hand(target, int(code)) for code in codes])
    found = target.decode(codes)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit()[expected == 0], expected.signbit()[expected == 0])


@FORMATS
def test_every_bf16_value_goes_to_the_nearest_with_ties_to_the_even_code(target: FloatFormat) -> None:
    values = every_bf16()
    values = values[~values.isnan()]
    codes = torch.arange(8 if target is E2M1 else 128)
    grid = torch.tensor([by_hand(target, int(code)) for code in codes], dtype=torch.float64)
    codes, grid = codes[grid.isfinite()], grid[grid.isfinite()]
    # Nearest by search in fp64: where two are equally near, the even code; beyond the largest, the largest.
    magnitude = values.abs().double().clamp(max=float(grid[-1]))
    above = torch.searchsorted(grid, magnitude).clamp(max=len(grid) - 1)
    below = (above - 1).clamp(min=0)
    up, down = grid[above] - magnitude, magnitude - grid[below]
    nearest = torch.where((up < down) | ((up == down) & (codes[above] % 2 == 0)), above, below)
    sign = values.signbit().int() * (8 if target is E2M1 else 128)
    assert torch.equal(target.encode(values).int(), codes[nearest].int() + sign)


@FORMATS
def test_a_code_is_encoded_to_itself(target: FloatFormat) -> None:
    codes = torch.arange(16 if target is E2M1 else 256).to(torch.uint8)
    values = target.decode(codes)
    finite = values.isfinite()
    assert torch.equal(target.encode(values)[finite], codes[finite])


@pytest.mark.parametrize(("target", "code"), [(E4M3, 0x7F), (E5M2, 0x7F), (E2M1, 7)])
def test_nan_has_one_code(target: FloatFormat, code: int) -> None:
    values = torch.tensor([math.nan, 1.0])
    assert int(target.encode(values)[0]) == code
    negative = torch.tensor([-4194304], dtype=torch.int32).view(torch.float32)
    assert bool(negative.isnan())
    assert int(target.encode(negative)[0]) == (code | 8 if target is E2M1 else code)


def test_infinity_saturates() -> None:
    infinite = torch.tensor([math.inf, -math.inf])
    assert E4M3.decode(E4M3.encode(infinite)).tolist() == [448.0, -448.0]
    assert E5M2.decode(E5M2.encode(infinite)).tolist() == [57344.0, -57344.0]
    assert E2M1.decode(E2M1.encode(infinite)).tolist() == [6.0, -6.0]


def test_spacing_of_hand_worked_values() -> None:
    values = torch.tensor([0.0, 2.0**-9, 2.0**-6, 1.0, 1.875, 240.0, 448.0])
    assert E4M3.spacing(values).tolist() == [2.0**-9, 2.0**-9, 2.0**-9, 0.125, 0.125, 16.0, 32.0]
    assert E2M1.spacing(torch.tensor([0.0, 0.5, -1.5, 2.0, 6.0])).tolist() == [0.5, 0.5, 0.5, 1.0, 2.0]


def test_two_codes_a_byte_the_first_in_the_low_half() -> None:
    codes = torch.tensor([[1, 2, 15, 8]], dtype=torch.uint8)
    assert pack(codes).tolist() == [[0x21, 0x8F]]
    every = torch.arange(256).to(torch.uint8)
    assert torch.equal(pack(unpack(every)), every)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0.0, 0),
        (2.0**-149, 0),
        (2.0**-127, 0),
        (math.ldexp(1 + 2.0**-20, -127), 1),
        (2.0**-126, 1),
        (math.ldexp(1 + 2.0**-23, -126), 2),
        (1.0, 127),
        (1.0 + 2.0**-23, 128),
        (1.5, 128),
        (2.0, 128),
        (2.0**127, 254),
        (2.0**127 * 1.5, 254),
        (math.inf, 254),
        (math.nan, 255),
    ],
)
def test_e8m0_rounds_up(value: float, code: int) -> None:
    assert int(encode_e8m0(torch.tensor([value]))) == code


def test_e8m0_codes_are_powers_of_two_and_their_inverses() -> None:
    codes = torch.arange(256).to(torch.uint8)
    powers, inverses = decode_e8m0(codes), decode_e8m0_inverse(codes)
    assert powers[:-1].double().tolist() == [2.0 ** (code - 127) for code in range(255)]
    assert bool((powers[:-1].double() * inverses[:-1].double() == 1).all())
    assert bool(powers[-1].isnan())
    assert bool(inverses[-1].isnan())
    assert torch.equal(encode_e8m0(powers), codes)


@given(st.floats(min_value=2.0**-126, max_value=2.0**127, width=32))
def test_e8m0_is_the_least_power_not_below(value: float) -> None:
    power = float(decode_e8m0(encode_e8m0(torch.tensor([value]))))
    assert power / 2 < value <= power


@pytest.mark.parametrize("value", [0.1, 0.6, 1.3, -1.75, 2.25, -3.9, 4.5, 5.9])
def test_stochastic_rounding_takes_the_neighbours_and_keeps_the_mean(value: float) -> None:
    generator = torch.Generator().manual_seed(7)
    found = E2M1.decode(encode_e2m1_stochastic(torch.full((40000,), value), generator))
    grid = sorted({by_hand(E2M1, code) for code in range(16)})
    around = {max(g for g in grid if g <= value), min(g for g in grid if g >= value)}
    assert set(found.tolist()) == around
    # Five standard deviations of a mean of 40000 draws, each at most one gap (2) apart.
    assert abs(float(found.mean()) - value) < 5 * (max(around) - min(around)) / 2 / 200


def test_stochastic_rounding_is_reproducible_and_exact_on_the_grid() -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(1)) * 3
    first, second = (encode_e2m1_stochastic(values, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    codes = torch.arange(16).to(torch.uint8)
    assert torch.equal(encode_e2m1_stochastic(E2M1.decode(codes)), codes)
