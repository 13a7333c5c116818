"""What a check found: a number beside its bound, or a picture. Plain data, and the verdict is part of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, SupportsFloat

from converters.errors import listing
from parity.causes import Cause


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number beside the bound it is held to; every field is JSON-able.

    Args:
        check: What was checked, e.g. `logits`.
        measured: What was found; text for a value that JSON has no number for (`nan`, `inf`).
        bound: What is allowed, the bound included.
        unit: What both count, e.g. `max |Δ|`, `of 290 tensors differ`.
        margin: bound / measured: above one is room to spare, below one a failure; `None` where it says nothing
            (measured 0, or not a number).
        passed: The verdict.
        where: The worst place, e.g. `layer 3 token 17`.
        detail: Further lines for the failure message.
        seconds: Time since the test, or its previous measurement.
        causes: What explains a failure, most telling first: `parity.causes.Cause.as_json` each.
    """

    check: str
    measured: float | int | str
    bound: float | int | str | None
    unit: str
    margin: float | None
    passed: bool
    where: str = ""
    detail: str = ""
    seconds: float = 0.0
    causes: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        # JSON has lists only, and a measurement read back is to equal the one written.
        object.__setattr__(self, "causes", tuple(self.causes))

    @classmethod
    def within(
        cls,
        check: str,
        *,
        measured: SupportsFloat,
        bound: SupportsFloat,
        unit: str,
        where: str = "",
        detail: str = "",
        causes: Sequence[Cause] = (),
    ) -> Measurement:
        """A distance that must not exceed its bound. NaN never passes, nor does an infinite or missing bound."""
        value, limit = float(measured), float(bound)
        if not 0 <= limit < math.inf:
            detail = "\n".join(["a bound must be a finite number of at least 0"] + [detail] * bool(detail))
        margin = limit / value if value > 0 and math.isfinite(value) and math.isfinite(limit) else None
        return cls(
            check=check,
            measured=_jsonable(value),
            bound=_jsonable(limit),
            unit=unit,
            margin=margin,
            passed=0 <= value <= limit < math.inf,
            where=where,
            detail=detail,
            causes=tuple(cause.as_json() for cause in causes),
        )

    @classmethod
    def equal(
        cls,
        check: str,
        *,
        count: int,
        unit: str,
        differing: Collection[str] = (),
        where: str = "",
        detail: str = "",
        causes: Sequence[Cause] = (),
    ) -> Measurement:
        """`count` things compared bit for bit; `differing` names those that differ. Comparing nothing does not pass."""
        return cls._none_of(check, count, unit, "differ", differing, where, detail, causes)

    @classmethod
    def proved(
        cls,
        check: str,
        *,
        count: int,
        unit: str,
        unproved: Collection[str] = (),
        where: str = "",
        detail: str = "",
        causes: Sequence[Cause] = (),
    ) -> Measurement:
        """`count` things proved; `unproved` names the exceptions. Proving nothing does not pass."""
        return cls._none_of(check, count, unit, "unproved", unproved, where, detail, causes)

    @classmethod
    def _none_of(
        cls,
        check: str,
        count: int,
        unit: str,
        verb: str,
        exceptions: Collection[str],
        where: str,
        detail: str,
        causes: Sequence[Cause],
    ) -> Measurement:
        lines = [detail] if detail else []
        if exceptions:
            lines.insert(0, listing(f"{unit} {verb}", exceptions))
        if count < 1:
            lines.insert(0, f"expected at least one of {unit}, found {count}: nothing was compared")
        return cls(
            check=check,
            measured=len(exceptions),
            bound=0,
            unit=f"of {count:,} {unit} {verb}",
            margin=None,
            passed=count >= 1 and not exceptions,
            where=where,
            detail="\n".join(lines),
            causes=tuple(cause.as_json() for cause in causes),
        )

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON-able values; `Measurement(**m.as_json()) == m`."""
        return asdict(self)

    @property
    def verdict(self) -> str:
        """One sentence: what was measured against which bound."""
        over = ""
        if not self.passed and self.margin:
            over = f", {times(1 / self.margin)} over"
        return f"{self.check}: measured {quantity(self.measured)} {self.unit}, allowed {quantity(self.bound)}{over}"


def quantity(value: float | int | str | None) -> str:
    """A number as the report writes it: counts in full, anything else to two significant digits."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0:
        return "0"
    return f"{value:.1e}" if not 0.1 <= abs(value) < 1000 else f"{value:.3g}"


def times(ratio: float) -> str:
    """A ratio of at least one, to two significant digits: `1.8x`, `12x`, `10,000x`."""
    rounded = float(f"{ratio:.2g}")
    return f"{rounded:,.0f}x" if rounded >= 10 else f"{rounded:.1f}x"


def _jsonable(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


@dataclass(frozen=True, kw_only=True)
class Lines:
    """A picture of curves over one axis; every field is JSON-able.

    Args:
        title: What is shown.
        x: What the horizontal axis counts; the points of a curve are 0, 1, 2, ...
        y: What the vertical axis measures, with its unit.
        curves: Name to values; NaN and infinity are gaps.
        marks: Name to the height of a level line, e.g. `floor`, `gate`.
        log: Logarithmic vertical axis.
        ticks: Names of the points on the horizontal axis, where they have names.
    """

    title: str
    x: str
    y: str
    curves: Mapping[str, Sequence[float]]
    marks: Mapping[str, float] = field(default_factory=dict)
    log: bool = True
    ticks: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Map:
    """A picture of a matrix; every field is JSON-able.

    Args:
        title: What is shown.
        x: What columns count.
        y: What rows count.
        values: Row after row.
        unit: Of a value.
        rows: Names of the rows, where they have names.
        columns: Names of the columns.
        log: Logarithmic colours.
    """

    title: str
    x: str
    y: str
    values: Sequence[Sequence[float]]
    unit: str = ""
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    log: bool = True


@dataclass(frozen=True, kw_only=True)
class Account:
    """What became of every name of both sides; every field is JSON-able.

    Args:
        title: What is accounted for: `tensors`, `config`.
        rows: `name`, `side` (`hf`, `megatron`), `class` (`exact`, `derived`, `constant`, `dropped`, `unaccounted`) and
            `reason` each.
    """

    title: str
    rows: Sequence[Mapping[str, str]]


Picture = Lines | Map
Finding = Measurement | Lines | Map | Account
"""What a check yields."""
