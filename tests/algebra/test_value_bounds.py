"""The bounds that value maps declare hold, and are near what is measured."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from converters.values import ROUNDOFF, Cast, Shift

FLOATS = ("float16", "float32", "float64")


@given(arrays(np.float32, 20, elements=st.floats(-8, 8, width=32)), st.sampled_from((-1.0, 1.0, 0.5)))
def test_a_shift_comes_back_within_its_bound(values: np.ndarray, by: float) -> None:
    shift = Shift("megatron", by)
    back = (values + np.float32(by)) - np.float32(by)
    error = np.abs(back.astype(np.float64) - values).max()
    assert error <= shift.bound("float32", float(np.abs(values).max()))


def test_the_bound_of_a_shift_is_near_the_worst_case() -> None:
    values = (np.random.default_rng(0).random(100_000) * 0.5).astype(np.float32)
    error = np.abs((values - np.float32(1)) + np.float32(1) - values.astype(np.float64)).max()
    assert Shift("megatron", -1.0).bound("float32", 0.5) / 8 < error


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_a_cast_is_exact_exactly_where_no_bit_is_lost(source: str, target: str) -> None:
    cast = Cast(source, target)
    values = np.random.default_rng(1).uniform(0.5, 2.0, 20_000).astype(source)
    error = np.abs(values.astype(target).astype(np.float64) / values.astype(np.float64) - 1).max()
    if source == target:
        assert error == 0
        return
    assert cast.exact == (error == 0)
    assert cast.bound / 4 < error <= cast.bound if not cast.exact else cast.bound == 0


def test_bfloat16_has_eight_bits_of_precision() -> None:
    assert ROUNDOFF["bfloat16"] == Cast("float32", "bfloat16").bound == 2.0**-8
    assert Cast("bfloat16", "float32").exact
    assert not Cast("bfloat16", "float16").exact
    assert not Cast("float16", "bfloat16").exact
