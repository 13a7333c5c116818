"""How far two evaluations of one model may differ: derived from what was measured in the same run, never chosen.

In float32 the *floor* is the largest difference between evaluations that are equal in exact arithmetic, and a candidate
passes within `FLOORS` of them: the subtlest real fault that is known stands at 280 floors (rms_norm_eps and its like),
the candidate's own reordering at one or two.

In bfloat16 rounding is as large as a fault, and the two sides round at different places. There both are held against a
float32 evaluation of the same rounded weights: the candidate must be about as near to it as the reference is. Over all
logits together, and also at its worst token and at its worst vocabulary row: one bad row of 128,256 is a hundredth of
the whole's rms even where it is wrong by forty times the noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from parity.backends import below_bf16

Floats = npt.NDArray[np.float32]

FLOORS = 10.0


@dataclass(frozen=True, kw_only=True)
class Distance:
    """A distance between two arrays of one shape.

    Args:
        value: In the units of the arrays.
        where: Index of the largest difference.
    """

    value: float
    where: tuple[int, ...]


def largest(actual: Floats, expected: Floats) -> Distance:
    """The largest absolute difference; NaN where either side has one.

    Raises:
        ValueError: Shapes differ.
    """
    difference = _difference(actual, expected)
    at = int(np.argmax(np.where(np.isnan(difference), np.inf, difference)))
    where = tuple(int(i) for i in np.unravel_index(at, difference.shape))
    return Distance(value=float(difference[where]), where=where)


def rms(actual: Floats, expected: Floats) -> Distance:
    """The root of the mean squared difference, and the index of the largest one."""
    difference = _difference(actual, expected).astype(np.float64)
    return Distance(value=float(np.sqrt(np.mean(difference**2))), where=largest(actual, expected).where)


HELD = 0.9
"""Of tokens, the share that is held one by one below bfloat16.

Trained models have a few tokens whose activations are a hundred times those of all others, and whose large numbers are
rounded a long way in a format of a few bits. What becomes of such a token hangs on a handful of roundings, and is
another draw in each evaluation of one model: in SmolLM2 the same token is off by 0.4 and by 15. They count in the root
mean square of all; the worst of the others is held by itself.
"""


def share_held(precision: str) -> float:
    """The share of tokens that are held one by one."""
    return HELD if below_bf16(precision) else 1.0


def worst(actual: Floats, expected: Floats, axis: int, share: float = 1.0) -> Distance:
    """The largest root mean square along `axis` of the differences of two matrices; NaN where either side has one.

    Args:
        actual: `[n v]`: tokens by vocabulary rows.
        expected: `[n v]`.
        axis: 1 for the worst token, 0 for the worst vocabulary row; `where` is that one index.
        share: Of the tokens or rows, those that count; what is no number always does.
    """
    difference = _difference(actual, expected)
    along = np.sqrt(np.mean(difference**2, axis=axis, dtype=np.float64))
    order = np.argsort(along)  # infinity comes last, and NaN behind it
    strange = not np.isfinite(along).all()
    at = int(order[-1 if strange else math.ceil(share * len(along)) - 1])
    return Distance(value=float(along[at]), where=(at,))


def _difference(actual: Floats, expected: Floats) -> Floats:
    if actual.shape != expected.shape:
        raise ValueError(f"expected shape {expected.shape}, found {actual.shape}")
    difference: Floats = np.abs(actual - expected)
    return difference


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How far a reference's own evaluations lie from what is expected, at their worst.

    Attributes:
        largest: The largest absolute difference: in float32, the floor.
        rms: The root mean square over all values.
        token: That of one token, over the vocabulary.
        row: That of one vocabulary row, over tokens.
    """

    largest: float
    rms: float
    token: float
    row: float


def spread(evaluations: Sequence[Floats], expected: Floats, share: float = 1.0) -> Spread:
    """The spread of `evaluations` around `expected`; a vector `[n]` has one row. `share` is as for `worst`, of tokens.

    Raises:
        ValueError: No evaluation, or one of another shape.
    """
    if not evaluations:
        raise ValueError("expected at least one evaluation to measure a floor with")
    wide = expected.reshape(len(expected), -1)
    others = [one.reshape(len(one), -1) for one in evaluations]
    return Spread(
        largest=max(largest(one, wide).value for one in others),
        rms=max(rms(one, wide).value for one in others),
        token=max(worst(one, wide, axis=1, share=share).value for one in others),
        row=max(worst(one, wide, axis=0).value for one in others),
    )


def allowed(floor_value: float, scale: float, floors: float = FLOORS) -> float:
    """The bound in float32: `floors` floors (a case may ask for fewer).

    Each is at least one rounding step of a number of size `scale`: a floor of zero would mean that the evaluations
    happened to agree to the bit, not that nothing rounds.
    """
    return floors * max(floor_value, scale * 2.0**-24)


def nearness(reference: float, tp: int, floors: float = FLOORS) -> float:
    """The bound in bfloat16, for the candidate's rms distance from the oracle, given the reference's.

    A row-parallel layer rounds each of its `tp` partial sums, and again at each of the `tp - 1` additions, where one
    rank rounds once; independent errors add as squares. The factor 2 is for two evaluations at one rank that round at
    different places. `floors` below `FLOORS` tightens it in proportion.

    The same factor holds for the worst of many tokens or rows: the candidate's errors and the reference's come from
    distributions of one shape, the first `sqrt(2 * tp - 1)` times as wide, and so do the largest of as many draws from
    each. The reference is evaluated three times, so its own largest is, if anything, drawn from more.
    """
    return floors / FLOORS * 2.0 * math.sqrt(2 * tp - 1) * reference
