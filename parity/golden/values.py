"""From logits to the quantities of a golden, and what it means for two quantities to agree.

A vocabulary is too wide to keep every logit as text. Kept are the largest ones of each token, the log of the sum of
exponentials, and sums over the whole row under fixed random signs: whichever logit changes, each of these sums changes
by as much.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from parity.bounds import FLOORS, Distance, allowed, largest
from parity.golden.file import Quantity, Values, scale_of
from parity.probes import PROSE, Probe

TOP = 8
SUMS = 4
PROSE_TOKENS, RANDOM_TOKENS = 32, 48
FROM_LOGITS = ("logits, largest", "logits, log-sum-exp", "logits, signed sums", "loss")
"""The quantities that any backend can be asked for."""


def asked(config: Mapping[str, Any], folder: Path, *, prose: bool) -> Probe:
    """What a new golden asks: two short sequences, of text where the weights are real; few, for a person to read."""
    if prose and (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        ids = np.array(
            [tokenizer.encode(text, add_special_tokens=False).ids[: PROSE_TOKENS + 1] for text in PROSE[:2]],
            dtype=np.int64,
        )
        name = "prose"
    else:
        shape = (2, RANDOM_TOKENS + 1)
        raw = np.asarray(np.random.Philox(key=20).random_raw(shape[0] * shape[1]), dtype="<u8")
        ids = (raw % np.uint64(config["vocab_size"])).astype(np.int64).reshape(shape)
        name = "random ids"
    return Probe(name=name, tokens=ids[:, :-1], labels=ids[:, 1:])


def signs(name: str, count: int) -> npt.NDArray[np.int8]:
    """`count` fixed random signs, a function of `name` alone: the raw stream of a bit generator never changes."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    raw = np.asarray(np.random.Philox(key=seed).random_raw(-(-count // 64)), dtype="<u8")
    bits = np.unpackbits(raw.view(np.uint8), count=count, bitorder="little")
    return (1 - 2 * bits.astype(np.int8)).astype(np.int8)


def top(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """`[b s k]`: the vocabulary rows of the largest logits `[b s v]`, largest first, of equal ones the lower row."""
    order = np.argsort(-logits, axis=-1, kind="stable")
    return order[..., : min(TOP, logits.shape[-1])].astype(np.int64)


def from_logits(
    logits: npt.NDArray[np.float32], loss: npt.NDArray[np.float32], places: npt.NDArray[np.int64]
) -> dict[str, Values]:
    """What a golden keeps of logits `[b s v]` and loss `[b s]`: the values of `FROM_LOGITS`.

    Args:
        logits: Without vocabulary padding.
        loss: Of each token, in nats.
        places: `[b s k]`: which logits to keep; the golden's, so that near ties do not exchange places.
    """
    wide = logits.astype(np.float64)
    most = wide.max(axis=-1, keepdims=True)
    by = np.stack([signs(f"logits {i}", logits.shape[-1]) for i in range(SUMS)], axis=-1)
    return {
        "logits, largest": np.take_along_axis(logits, places, axis=-1),
        "logits, log-sum-exp": most[..., 0] + np.log(np.exp(wide - most).sum(axis=-1)),
        "logits, signed sums": wide @ by.astype(np.float64),
        "loss": loss,
    }


def relative_floor(evaluations: Sequence[Values], alike: int) -> float:
    """The largest difference between `evaluations`, relative to the size of what is alike in the first of them."""
    return max(_distance(other, evaluations[0], scale_of(evaluations[0], alike)).value for other in evaluations[1:])


def _distance(actual: Values, expected: Values, scale: Values) -> Distance:
    return largest((actual / scale).astype(np.float64), (expected / scale).astype(np.float64))


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One quantity beside its golden value.

    Args:
        name: The quantity.
        distance: The largest difference, relative to the size of what is alike.
        bound: What is allowed, in the same unit.
        where: The worst place.
        then: The golden value there.
        now: The value found.
    """

    name: str
    distance: float
    bound: float
    where: str
    then: float
    now: float

    @property
    def ratio(self) -> float:
        """Distance over bound: at most one passes."""
        return self.distance / self.bound

    @property
    def passed(self) -> bool:
        """Whether the values agree; one that is no number agrees with nothing."""
        return self.distance <= self.bound


def compare(name: str, expected: Quantity, actual: Values, floor_now: float, floors: float) -> Compared:
    """Hold `actual` to a golden quantity: within `floors` noise floors.

    The golden and the run are one computation on two machines, equal in exact arithmetic, and so are the evaluations
    that each of the two measured its floor between. The floor here is the geometric mean of both: of a floor that grew
    with the very loss of precision that is to be found, less than all of the growth widens the bound, and `Noise` says
    how far floors may grow at all. Up to there the bound is still three times the larger floor, which two honest
    measurements need.

    Args:
        name: The quantity.
        expected: The golden's, with the floor that was measured when it was made.
        actual: The values found.
        floor_now: The floor that was measured in this run.
        floors: How many floors are allowed.
    """
    if actual.shape != expected.values.shape:
        return Compared(
            name=name,
            distance=float("inf"),
            bound=1.0,
            where=f"shape {actual.shape} where the golden has {expected.values.shape}",
            then=float("nan"),
            now=float("nan"),
        )
    found = _distance(actual, expected.values, expected.scale)
    names = [
        expected.names[at] if axis == 0 and expected.names else f"{kind} {at}"
        for axis, (kind, at) in enumerate(zip(expected.axes, found.where, strict=True))
    ]
    return Compared(
        name=name,
        distance=found.value,
        bound=floors * math.sqrt(_floor(expected.floor) * _floor(floor_now)),
        where=", ".join(names),
        then=float(expected.values[found.where]),
        now=float(actual[found.where]),
    )


def _floor(measured: float) -> float:
    """At least one rounding step, as in `allowed`: evaluations that agree to the bit still round."""
    return allowed(measured, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The noise floor that grew the most since the golden was made.

    A floor is the error of float32 itself. It depends on a machine's kernels, but one that grew by more than `FLOORS`
    means that something lost precision, whatever the values are.

    Args:
        name: The quantity.
        then: Its floor when the golden was made.
        now: Its floor in this run.
    """

    name: str
    then: float
    now: float

    @property
    def growth(self) -> float:
        """How many times as high it is; NaN where it is no number."""
        return _floor(self.now) / _floor(self.then) if self.now == self.now else self.now

    @property
    def unmet(self) -> list[str]:
        """What is wrong with it: one line, or none."""
        if self.growth <= FLOORS:
            return []
        return [
            f"{self.name}: the noise floor is {self.now:.2e} and was {self.then:.2e} when the golden was made: float32 "
            f"is computed {self.growth:.3g} times as coarsely, at most {FLOORS:g} is a machine's own way"
        ]


def noise(expected: Mapping[str, Quantity], actual: Mapping[str, Quantity]) -> Noise | None:
    """The floor that grew the most, of the quantities that both sides have; one that is no number is the worst."""
    both = [
        Noise(name=name, then=one.floor, now=actual[name].floor) for name, one in expected.items() if name in actual
    ]
    return max(both, key=lambda one: one.growth if one.growth == one.growth else math.inf, default=None)


def compare_all(expected: Mapping[str, Quantity], actual: Mapping[str, Quantity], floors: float) -> list[Compared]:
    """Every quantity that both sides have, worst first."""
    both = [name for name in expected if name in actual]
    found = [compare(name, expected[name], actual[name].values, actual[name].floor, floors) for name in both]
    return sorted(found, key=lambda one: -one.ratio if one.ratio == one.ratio else float("-inf"))


def unmatched(expected: Mapping[str, Quantity], actual: Mapping[str, Quantity]) -> list[str]:
    """Quantities that only one side has, a line each."""
    lines = [f"{name}: unused: the golden has it and nothing measures it" for name in expected if name not in actual]
    return lines + [
        f"{name}: missing: it is measured and the golden has none" for name in actual if name not in expected
    ]
