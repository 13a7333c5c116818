"""Which field of a rope, or which few, another value of which gives the frequencies that were found.

To find a cause, never to judge: frequencies are computed in float64, by formulas written down once more.

Source: huggingface/transformers 5.23.0, modeling_rope_utils.py (`_compute_llama3_parameters`,
    `_compute_linear_scaling_rope_parameters`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from parity.causes import Cause, field_name

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Rope = dict[str, Any]
FACTORS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
NEAR = 1e-5
"""Frequencies are the same within this: float32 formulas differ by 2^-23, bfloat16 by 2^-9."""
FIELDS = 4
"""So many fields may be wrong at a time."""


def rope_cause(wanted: Floats, found: Floats, config: Mapping[str, Any]) -> Cause:
    """Why a model turns by the frequencies `found` where its config demands `wanted`, `[head_dim / 2]` float32."""
    if found.shape != wanted.shape:
        detail = f"{len(found)} frequencies, of a head of {2 * len(found)}, for {len(wanted)}"
        return Cause(kind="config", what=("head_dim",), detail=detail)
    if not (np.isfinite(found).all() and (found > 0).all()):
        return Cause(kind="computation", what=("rope",), detail="frequencies are zero, negative or no numbers")
    if np.allclose(found, wanted, rtol=2**-8, atol=0) and not (found.view(np.uint32) & np.uint32(0xFFFF)).any():
        return Cause(kind="computation", what=("rope",), detail="the frequencies are rounded to bfloat16")
    true = fields(config)
    guesses = _guesses(true, found.astype(np.float64), config.get("max_position_embeddings"))
    for count in range(1, FIELDS + 1):
        for names in itertools.combinations(guesses, count):
            for values in itertools.product(*(guesses[name] for name in names)):
                changed = {**true, **dict(zip(names, values, strict=True))}
                if np.allclose(frequencies(changed, len(found)), found, rtol=NEAR, atol=0):
                    texts = (f"{name} {_text(changed[name])} for {_text(true[name])}" for name in names)
                    return Cause(kind="config", what=tuple(sorted(map(_in_full, names))), detail=", ".join(texts))
    what = "rope_theta" if true["rope_type"] == "default" else "rope_scaling"
    first = int(np.argmax(np.abs(found / wanted - 1)))
    detail = f"frequency {first} is {found[first]:.6g} for {wanted[first]:.6g}, which no field explains by itself"
    return Cause(kind="config", what=(what,), detail=detail)


def fields(config: Mapping[str, Any]) -> Rope:
    """The rope's fields, in whichever spelling."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    return {"rope_theta": theta, "rope_type": kind, **{name: rope.get(name) for name in FACTORS}}


def frequencies(rope: Rope, count: int) -> Doubles:
    """Inverse frequencies of a rope of type `default`, `linear` or `llama3`, `[count]`."""
    plain: Doubles = float(rope["rope_theta"]) ** (-np.arange(count) / count)
    if rope["rope_type"] != "llama3":
        return plain / float(rope["factor"] if rope["rope_type"] == "linear" else 1.0)
    turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1) if high != low else (turns > high).astype(float)
    scaled: Doubles = plain * (kept + (1 - kept) / rope["factor"])
    return scaled


def _guesses(true: Rope, found: Doubles, longest: int | None) -> dict[str, list[Any]]:
    """Values that a field may have: what converters are known to hard-code, and what `found` says if all else holds."""
    guesses: dict[str, list[Any]] = {"rope_theta": [10000.0, 500000.0, 1e6]}
    if len(found) > 1:
        guesses["rope_theta"] += _near(float(found[1]) ** -len(found))
    if true["rope_type"] == "default":
        return guesses
    guesses = {"rope_type": ["default", "linear"], **guesses}  # a scaling lost, before a factor of one
    count = len(found)
    if count > 1 and true["factor"]:  # the last one is scaled by all of the factor
        guesses["rope_theta"] += _near(float(found[-1] * true["factor"]) ** (-count / (count - 1)))
    plain = frequencies({**true, "rope_type": "default"}, count)
    guesses["factor"] = [*_near(float(plain[-1] / found[-1])), 8.0, 1.0, 32.0]
    if true["rope_type"] != "llama3":
        return guesses
    factor, low, high, length = (float(true[name]) for name in FACTORS)
    lengths = [8192, *([longest] if longest else [])]
    guesses |= {"low_freq_factor": [1.0], "high_freq_factor": [4.0], "original_max_position_embeddings": lengths}
    # Between the two factors a frequency is a mixture, and the share of its own in it gives each of the others away.
    share = (found / plain - 1 / factor) / (1 - 1 / factor) if factor != 1 else np.zeros_like(found)
    mixed = np.flatnonzero((share > 0.01) & (share < 0.99))
    if len(mixed):
        at = mixed[len(mixed) // 2]
        turns, kept = length * float(plain[at]) / (2 * math.pi), float(share[at])
        guesses["low_freq_factor"] += _near((turns - kept * high) / (1 - kept))
        guesses["high_freq_factor"] += _near(low + (turns - low) / kept)
        lengths.append(round((low + kept * (high - low)) * 2 * math.pi / float(plain[at])))
    return guesses


def _near(value: float) -> list[float]:
    """A measured value as a person would have written it, and itself."""
    return [float(f"{value:.3g}"), float(f"{value:.5g}"), value]


def _in_full(name: str) -> str:
    """As a config spells it. The type is what a scaling is known by: another type is another scaling."""
    return "rope_scaling" if name == "rope_type" else field_name(f"rope_scaling.{name}")


def _text(value: Any) -> str:
    return f"{value:.7g}" if isinstance(value, float) else repr(value)
