"""How answers are held against references: every compared token, nothing at padding, and no NaN gets by."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from parity.bounds import spread
from parity.case import Case, matrix
from parity.checks.forward import _compared, _numbers, held
from parity.findings import Lines, Measurement
from parity.observation.forward import Reference
from parity.observation.observe import Observation
from parity.options import resolve
from parity.probes import IGNORED, Probe
from parity.subjects import config_of

IDS = np.arange(10).reshape(2, 5)
PADDED = Probe(
    name="padded",
    tokens=IDS,
    labels=np.array([[IGNORED, IGNORED, 1, 2, IGNORED], [1, 2, 3, 4, IGNORED]]),
    positions=np.array([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]),
    segments=np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
    about="a test",
)


@pytest.fixture
def case() -> Case:
    (found,), _ = matrix(resolve({"model": "Llama-3.2-1B", "size": "tiny"}), config_of)
    return found


def said(noise: float, seed: int) -> Observation:
    random = np.random.default_rng(seed)
    logits = np.random.default_rng(0).normal(size=(2, 5, 30)) + noise * random.normal(size=(2, 5, 30))
    loss = np.where(PADDED.labelled, 1 + noise * random.normal(size=(2, 5)), 0)
    return Observation(logits=logits.astype(np.float32), loss=loss.astype(np.float32))


def reference(noise: float) -> Reference:
    expected, other = said(0, 1), said(noise, 2)
    seen, labelled = PADDED.compared, PADDED.labelled
    return Reference(
        expected=expected,
        logits=spread([other.logits[seen]], expected.logits[seen]),
        loss=spread([other.loss[labelled]], expected.loss[labelled]),
        together=said(noise, 3),
        finite=True,
    )


def found(case: Case, answer: Observation, noise: float) -> dict[str, Measurement]:
    all_of_it = list(_compared(case, PADDED, reference(noise), answer))
    assert sum(isinstance(one, Lines) for one in all_of_it) == 1
    return {one.check: one for one in all_of_it if isinstance(one, Measurement)}


def test_what_is_at_padding_is_not_compared(case: Case) -> None:
    answer = said(1e-4, 4)
    answer.logits[0, :2] = 1e6
    measurements = found(case, answer, 1e-4)
    assert list(measurements) == ["transformers, padded", "logits, padded", "loss, padded"]
    assert all(one.passed for one in measurements.values())


def test_one_wrong_logit_fails_and_its_place_is_in_the_probes_own_numbers(case: Case) -> None:
    answer = said(1e-4, 4)
    answer.logits[0, 3, 17] += 1
    failed = [one for one in found(case, answer, 1e-4).values() if not one.passed]
    assert [(one.check, one.where) for one in failed] == [("logits, padded", "sequence 0, token 3, vocabulary row 17")]
    assert "probe: padded; a test" in failed[0].detail


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nan_fails_every_distance_and_is_named(case: Case, precision: str) -> None:
    answer = said(1e-2, 4)
    answer.logits[1, 2, 3] = np.nan
    for check, one in found(replace(case, precision=precision), answer, 1e-2).items():
        assert one.passed == (not check.startswith("logits")), check
    numbers = _numbers((PADDED,), [answer])
    assert not numbers.passed
    assert "padded: 1; the first, nan, at sequence 1, token 2, vocabulary row 3" in numbers.detail


def test_nan_at_padding_is_named_too() -> None:
    answer = said(0, 4)
    answer.logits[0, 0] = np.inf
    assert not _numbers((PADDED,), [answer]).passed
    assert _numbers((PADDED,), [said(0, 4)]).passed


def test_in_bf16_one_bad_token_and_one_bad_row_are_named(case: Case) -> None:
    half = replace(case, precision="bf16")
    answer = said(1e-2, 4)
    answer.logits[1, :, 9] += 0.05
    measurements = found(half, answer, 1e-2)
    assert measurements["logits, padded"].passed
    assert not measurements["logits, padded, worst row"].passed
    assert measurements["logits, padded, worst row"].where == "vocabulary row 9"


def test_a_reference_that_leaks_is_found_out(case: Case) -> None:
    leaking = replace(reference(1e-4), together=said(1, 3))
    first = next(one for one in _compared(case, PADDED, leaking, said(1e-4, 4)) if isinstance(one, Measurement))
    assert first.check == "transformers, padded"
    assert not first.passed


def test_fewer_floors_are_a_tighter_bound(case: Case) -> None:
    one = reference(1e-4)
    at = np.argwhere(PADDED.compared)
    for precision in ("fp32", "bf16"):
        bounds = []
        for floors in (10.0, 5.0):
            asked = replace(case, precision=precision, max_floors=floors)
            (measured, *_) = held(
                "logits", said(1e-4, 4).logits, one.expected.logits, one.logits, at=at, case=asked, detail=""
            )
            assert isinstance(measured.bound, float)
            bounds.append(measured.bound)
        assert bounds[0] == pytest.approx(2 * bounds[1])
