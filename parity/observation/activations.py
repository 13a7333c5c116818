"""Activations of both sides held against one another, tap by tap: plain arrays, no torch.

The names of taps are common to both sides, and are these in the order of execution: `embedding`; for each layer n,
counted from 0 over the whole model, `layers.n.input_norm`, `layers.n.attention` (after o_proj, before the residual),
`layers.n.post_norm`, `layers.n.mlp` (after down_proj, before the residual), `layers.n` (what leaves the block); then
`final_norm`. `logits` may follow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from parity import bounds

Floats = npt.NDArray[np.float32]
PARTS = ("input_norm", "attention", "post_norm", "mlp")
"""The taps inside a block, in the order of execution."""


LOGITS = "logits"


def tap_names(layers: int) -> list[str]:
    """Every tap of a model of so many layers, in the order of execution."""
    inside = [[f"layers.{n}.{part}" for part in PARTS] + [f"layers.{n}"] for n in range(layers)]
    return ["embedding", *(name for names in inside for name in names), "final_norm"]


def everything(name: str) -> bool:
    """Wants every tap."""
    return bool(name)


def blocks(name: str) -> bool:
    """Wants what leaves the embedding, each block, and the final norm."""
    return name.rpartition(".")[2] not in PARTS


def merged(ranks: Iterable[Mapping[str, Floats]]) -> dict[str, Floats]:
    """The taps that each rank has whole, as one mapping in the order of execution."""
    found = {name: array for taps in ranks for name, array in taps.items()}
    layers = [int(name.split(".")[1]) for name in found if name.startswith("layers.")]
    return {name: found[name] for name in [*tap_names(1 + max(layers, default=-1)), LOGITS] if name in found}


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """What transformers computes at one tap, and how far evaluations of the same may be from it.

    Args:
        expected: `[b s h]`: by eager attention; in bfloat16 by the float32 oracle of the same rounded weights.
        spread: How far transformers' own evaluations are from it; the rows of the spread are channels. In bfloat16 and
            below in units of each token's own size.
    """

    expected: Floats
    spread: bounds.Spread


def yardstick(evaluations: Sequence[Floats], oracle: Floats | None) -> Yardstick:
    """The yardstick of one tap, from `evaluations` of which eager attention is the first."""
    expected = evaluations[0] if oracle is None else oracle
    others = evaluations[1:] if oracle is None else evaluations
    if oracle is None:
        return Yardstick(
            expected=expected, spread=bounds.spread([_by_token(one) for one in others], _by_token(expected))
        )
    own = _in_own_size(expected, expected)
    return Yardstick(
        expected=expected,
        spread=bounds.spread([_by_token(_in_own_size(one, expected)) for one in others], _by_token(own)),
    )


def _by_token(activations: Floats) -> Floats:
    """`[b s h]` as `[b*s h]`."""
    return activations.reshape(-1, activations.shape[-1])


def _in_own_size(activations: Floats, expected: Floats) -> Floats:
    """`[b s h]` in units of the root mean square of each token of `expected`.

    Trained models have tokens that are a hundred times larger than others, and what rounding makes of those few is
    another draw in each evaluation: they would drown all others, and decide by chance.
    """
    size = np.sqrt(np.mean(np.square(expected, dtype=np.float64), axis=-1, keepdims=True))
    scaled: Floats = (activations / np.where(size > 0, size, 1.0)).astype(np.float32)
    return scaled


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far from transformers a candidate is at one tap.

    Args:
        tap: Its name.
        measured: Largest difference; in bfloat16 and below the rms distance from the oracle in units of each token's
            own size, over everything or of the worst token, whichever is the larger share of its bound.
        floor: The same of transformers itself.
        bound: What is allowed.
        where: Sequence, token and channel of the largest difference; of a worst token, no channel.
    """

    tap: str
    measured: float
    floor: float
    bound: float
    where: tuple[int, ...]

    @property
    def share(self) -> float:
        """`measured` in units of `bound`; NaN counts as infinite."""
        if self.measured <= self.bound:
            return self.measured / self.bound if self.bound else 0.0
        return self.measured / self.bound if self.bound and not math.isnan(self.measured) else math.inf

    @property
    def place(self) -> str:
        """`where`, for people."""
        names = ("sequence", "token", "channel" if self.tap != LOGITS else "vocabulary row")
        return ", ".join(f"{name} {at}" for name, at in zip(names, self.where, strict=False))

    @property
    def within(self) -> bool:
        """Whether the candidate is as near as it must be."""
        return self.measured <= self.bound


def reached(
    yardsticks: Mapping[str, Yardstick],
    actual: Mapping[str, Floats],
    *,
    precision: str,
    tp: int,
    floors: float = bounds.FLOORS,
) -> list[Reach]:
    """Each tap that both sides have, in the order of `yardsticks`, which is that of execution."""
    out = []
    for tap, stick in yardsticks.items():
        if tap not in actual:
            continue
        if precision == "fp32":
            bound = bounds.allowed(stick.spread.largest, float(np.abs(stick.expected).max()), floors)
            held = [(bounds.largest(actual[tap], stick.expected), stick.spread.largest, bound)]
        else:
            mine, own_size = (_in_own_size(one, stick.expected) for one in (actual[tap], stick.expected))
            whole, token = bounds.rms(mine, own_size), _worst_token(mine, own_size)
            held = [
                (distance, own, bounds.nearness(own, tp, floors))
                for distance, own in ((whole, stick.spread.rms), (token, stick.spread.token))
            ]
        reaches = [
            Reach(tap=tap, measured=distance.value, floor=own, bound=bound, where=distance.where)
            for distance, own, bound in held
        ]
        out.append(max(reaches, key=lambda reach: reach.share))
    return out


def _worst_token(actual: Floats, expected: Floats) -> bounds.Distance:
    """The largest rms distance of one token, over its channels; `where` is its sequence and its place there."""
    found = bounds.worst(_by_token(actual), _by_token(expected), axis=1)
    where = tuple(int(at) for at in np.unravel_index(found.where[0], expected.shape[:2]))
    return bounds.Distance(value=found.value, where=where)


def first_wrong(found: Iterable[Reach]) -> Reach | None:
    """The first tap that is not within its bound."""
    return next((reach for reach in found if not reach.within), None)
