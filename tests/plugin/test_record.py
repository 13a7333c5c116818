"""What is recorded, what passes, and what the failure says."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from parity.findings import Lines, Measurement, quantity, times
from parity.record import PROPERTY, Record


class Stored(list[tuple[str, Any]]):
    """Stands for pytest's `record_property`: keeps what it is given."""

    def __call__(self, name: str, value: object) -> None:
        self.append((name, value))

    @property
    def last(self) -> Measurement:
        name, value = self[-1]
        assert name == PROPERTY
        return Measurement(**json.loads(json.dumps(value, allow_nan=False)))


@pytest.fixture
def stored() -> Stored:
    return Stored()


@pytest.fixture
def record(stored: Stored) -> Record:
    return Record(stored, "llama-tp2-pp1-fp32-megatron")


def failure(record: Record, method: str, *arguments: object, **named: object) -> str:
    """The message that the test under `record` fails with."""
    with pytest.raises(pytest.fail.Exception) as caught:
        getattr(record, method)(*arguments, **named)
    return str(caught.value)


def test_a_check_that_measures_nothing_fails(record: Record) -> None:
    assert "the check measured nothing" in failure(record, "all", [])
    assert "the check measured nothing" in failure(record, "all", [Lines(title="t", x="x", y="y", curves={})])


def test_within_its_bound_passes(record: Record, stored: Stored) -> None:
    record.within("logits", measured=2e-5, bound=1e-4, unit="max |d|")
    assert stored.last.passed
    assert stored.last.margin == pytest.approx(5)
    record.within("logits", measured=1e-4, bound=1e-4, unit="max |d|")
    assert stored.last.passed, "the bound itself is allowed"
    record.within("logits", measured=0, bound=0, unit="max |d|")
    assert (stored.last.passed, stored.last.margin) == (True, None)


def test_beyond_its_bound_is_recorded_then_fails(record: Record, stored: Stored) -> None:
    message = failure(
        record, "within", "logits", measured=0.5, bound=1e-4, unit="max |d|", where="token 17", detail="one\ntwo"
    )
    assert message.splitlines() == [
        "logits: measured 0.5 max |d|, allowed 1.0e-04, 5,000x over",
        "  case   llama-tp2-pp1-fp32-megatron",
        "  where  token 17",
        "  one",
        "  two",
    ]
    assert not stored.last.passed
    assert stored.last.margin == pytest.approx(1 / 5000)
    assert math.nextafter(1e-4, 1) > 1e-4
    failure(record, "within", "logits", measured=math.nextafter(1e-4, 1), bound=1e-4, unit="max |d|")


@pytest.mark.parametrize(
    ("measured", "bound"),
    [
        (math.nan, 1.0),
        (math.inf, 1.0),
        (-1.0, 1.0),
        (0.0, math.nan),
        (0.0, math.inf),
        (math.inf, math.inf),
        (math.nan, math.nan),
        (0.0, -1.0),
    ],
)
def test_what_is_no_distance_or_no_bound_never_passes(
    record: Record, stored: Stored, measured: float, bound: float
) -> None:
    message = failure(record, "within", "logits", measured=measured, bound=bound, unit="max |d|")
    assert not stored.last.passed
    assert ("a bound must be a finite number" in message) == (not math.isfinite(bound) or bound < 0)


def test_tensors_are_taken_as_numbers(record: Record, stored: Stored) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch")
    record.within("logits", measured=torch.tensor(0.5), bound=torch.tensor(1.0), unit="max |d|")
    assert stored.last.measured == 0.5
    failure(record, "within", "logits", measured=torch.tensor(torch.nan), bound=1.0, unit="max |d|")
    assert stored.last.measured == "nan"


def test_equal(record: Record, stored: Stored) -> None:
    record.equal("weights", count=146, unit="tensors")
    assert (stored.last.measured, stored.last.bound, stored.last.unit) == (0, 0, "of 146 tensors differ")
    names = [f"layer.{index}" for index in range(30)]
    message = failure(record, "equal", "weights", count=146, unit="tensors", differing=names, detail="import")
    assert "weights: measured 30 of 146 tensors differ, allowed 0" in message
    assert "tensors differ (30):" in message
    assert "... and 10 more" in message
    assert message.endswith("import")
    assert stored.last.measured == 30


def test_proved(record: Record, stored: Stored) -> None:
    record.proved("plan", count=10**12, unit="elements")
    assert stored.last.unit == "of 1,000,000,000,000 elements unproved"
    assert "k_proj[0:4]" in failure(record, "proved", "plan", count=8, unit="elements", unproved=["k_proj[0:4]"])
    assert not stored.last.passed


@pytest.mark.parametrize("method", ["equal", "proved"])
def test_comparing_nothing_does_not_pass(record: Record, stored: Stored, method: str) -> None:
    assert "nothing was compared" in failure(record, method, "weights", count=0, unit="tensors")
    assert not stored.last.passed


def test_numbers_are_written_alike() -> None:
    numbers = (0.0, 0, 1234567, 5.5e-5, 0.25, 12.345, 40000.0, "nan", None)
    written = ["0", "0", "1,234,567", "5.5e-05", "0.25", "12.3", "4.0e+04", "nan", "-"]
    assert [quantity(number) for number in numbers] == written
    assert [times(ratio) for ratio in (1, 1.84, 9.96, 12.4, 12345)] == ["1.0x", "1.8x", "10x", "12x", "12,000x"]
