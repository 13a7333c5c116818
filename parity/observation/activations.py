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
        floor: In float32 the largest difference between evaluations that are equal in exact arithmetic; in bfloat16
            transformers' own rms distance from the oracle.
    """

    expected: Floats
    floor: float


def yardstick(evaluations: Sequence[Floats], oracle: Floats | None) -> Yardstick:
    """The yardstick of one tap, from `evaluations` of which eager attention is the first."""
    if oracle is None:
        return Yardstick(
            expected=evaluations[0], floor=max(bounds.largest(one, evaluations[0]).value for one in evaluations[1:])
        )
    return Yardstick(expected=oracle, floor=max(bounds.rms(one, oracle).value for one in evaluations))


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far from transformers a candidate is at one tap.

    Args:
        tap: Its name.
        measured: Largest difference; in bfloat16 the rms distance from the oracle.
        floor: As in the yardstick.
        bound: What is allowed.
        where: Sequence, token and channel of the largest difference.
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
            distance = bounds.largest(actual[tap], stick.expected)
            bound = bounds.allowed(stick.floor, float(np.abs(stick.expected).max()), floors)
        else:
            distance = bounds.rms(actual[tap], stick.expected)
            bound = bounds.nearness(stick.floor, tp, floors)
        out.append(Reach(tap=tap, measured=distance.value, floor=stick.floor, bound=bound, where=distance.where))
    return out


def first_wrong(found: Iterable[Reach]) -> Reach | None:
    """The first tap that is not within its bound."""
    return next((reach for reach in found if not reach.within), None)
