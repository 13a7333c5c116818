"""What a check measured: recorded first, so that the report has it, then judged."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any, SupportsFloat

import pytest

from converters.errors import listing

PROPERTY = "parity"
"""Name of the user property that carries one measurement from the test to the report."""


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


class Record:
    """The fixture `record`: each method stores a measurement, then fails the test if it does not pass.

    Args:
        store: Takes the name and value of a user property (as pytest's `record_property`).
        subject: What the test is about, for failure messages: the id of its case, or the test's own.
    """

    def __init__(self, store: Callable[[str, object], None], subject: str) -> None:
        self._store = store
        self._subject = subject
        self._since = time.perf_counter()

    def within(
        self,
        check: str,
        *,
        measured: SupportsFloat,
        bound: SupportsFloat,
        unit: str,
        where: str = "",
        detail: str = "",
    ) -> None:
        """A distance that must not exceed its bound. NaN never passes, nor does an infinite or missing bound."""
        value, limit = float(measured), float(bound)
        if not 0 <= limit < math.inf:
            detail = "\n".join(["a bound must be a finite number of at least 0"] + [detail] * bool(detail))
        passed = 0 <= value <= limit < math.inf
        margin = limit / value if value > 0 and math.isfinite(value) and math.isfinite(limit) else None
        self._keep(check, _jsonable(value), _jsonable(limit), unit, margin, passed, where, detail)

    def equal(
        self, check: str, *, count: int, unit: str, differing: Collection[str] = (), where: str = "", detail: str = ""
    ) -> None:
        """`count` things compared bit for bit; `differing` names those that differ. Comparing nothing does not pass."""
        self._none_of(check, count, unit, "differ", differing, where, detail)

    def proved(
        self, check: str, *, count: int, unit: str, unproved: Collection[str] = (), where: str = "", detail: str = ""
    ) -> None:
        """`count` things proved; `unproved` names the exceptions. Proving nothing does not pass."""
        self._none_of(check, count, unit, "unproved", unproved, where, detail)

    def _none_of(
        self, check: str, count: int, unit: str, verb: str, exceptions: Collection[str], where: str, detail: str
    ) -> None:
        lines = [detail] if detail else []
        if exceptions:
            lines.insert(0, listing(f"{unit} {verb}", exceptions))
        if count < 1:
            lines.insert(0, f"expected at least one of {unit}, found {count}: nothing was compared")
        passed = count >= 1 and not exceptions
        what = f"of {count:,} {unit} {verb}"
        self._keep(check, len(exceptions), 0, what, None, passed, where, "\n".join(lines))

    def _keep(
        self,
        check: str,
        measured: float | int | str,
        bound: float | int | str | None,
        unit: str,
        margin: float | None,
        passed: bool,
        where: str,
        detail: str,
    ) -> None:
        now = time.perf_counter()
        measurement = Measurement(
            check=check,
            measured=measured,
            bound=bound,
            unit=unit,
            margin=margin,
            passed=passed,
            where=where,
            detail=detail,
            seconds=now - self._since,
        )
        self._since = now
        self._store(PROPERTY, measurement.as_json())
        if not passed:
            lines = [measurement.verdict, f"  case   {self._subject}"]
            lines += [f"  where  {where}"] if where else []
            lines += [f"  {line}" for line in detail.splitlines()]
            pytest.fail("\n".join(lines), pytrace=False)


def _jsonable(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
