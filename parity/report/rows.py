"""The lines of a report: one a measurement, and one for a test that ended without one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from parity.causes import KINDS, Cause
from parity.findings import quantity, times

VERDICTS = ("pass", "FAIL", "error", "skip", "xfail")
ALIKE = 4
"""So many passing measurements of one kind become one line."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line: a measurement, or a test that ended without one.

    Args:
        case: The id of the case.
        test: The test that it belongs to.
        check: What was checked.
        verdict: `pass`, `FAIL`, `error` (before or beside a measurement), `skip` or `xfail`.
        seconds: Time taken.
        measurement: The fields of a `Measurement`; empty for a test that measured nothing.
        cause: Why it did not pass, or why it was skipped.
        command: The command line that repeats it.
    """

    case: str
    test: str
    check: str
    verdict: str
    seconds: float
    measurement: Mapping[str, Any] = field(default_factory=dict)
    cause: str = ""
    command: str = ""

    @property
    def failed(self) -> bool:
        """Whether this row makes the run fail."""
        return self.verdict in ("FAIL", "error")

    @property
    def measured(self) -> str:
        """What was found, as text."""
        return quantity(self.measurement["measured"]) if self.measurement else "-"

    @property
    def bound(self) -> str:
        """What is allowed, as text."""
        return quantity(self.measurement["bound"]) if self.measurement else "-"

    @property
    def margin(self) -> str:
        """How many times the measured value fits into its bound; `exact` where nothing was found at all."""
        if self.measurement and self.measurement["measured"] == 0:
            return "exact"
        margin = self.ratio
        if not margin:
            return "-"
        return times(margin) if margin >= 1 else f"{times(1 / margin)} over"

    @property
    def ratio(self) -> float | None:
        """The margin as a number."""
        margin = self.measurement.get("margin")
        return margin if isinstance(margin, int | float) else None

    @property
    def unit(self) -> str:
        """What is counted."""
        return str(self.measurement.get("unit", ""))

    @property
    def where(self) -> str:
        """The worst place."""
        return str(self.measurement.get("where", ""))

    @property
    def causes(self) -> list[Mapping[str, Any]]:
        """What a diagnosis says: mappings of `kind`, `what`, `where` and `detail`, each possibly missing."""
        return list(self.measurement.get("causes") or ())

    @property
    def sentence(self) -> str:
        """What happened, in one line."""
        if not self.measurement:
            return next(iter(self.cause.strip().splitlines()), "nothing measured")
        over = f", {self.margin}" if self.failed and self.ratio else ""
        return f"{self.check}: measured {self.measured} {self.unit}, allowed {self.bound}{over}"


def rows_of(record: Mapping[str, Any]) -> list[Row]:
    """The lines of a run record, by case and test."""
    return [row for case in record["cases"] for row in case_rows(case)]


def case_rows(case: Mapping[str, Any]) -> Iterator[Row]:
    """The lines of one case of a run record."""
    for test in case["tests"]:
        row = Row(
            case=case["id"],
            test=test["name"],
            check=test["name"],
            verdict=test["verdict"],
            seconds=test["seconds"],
            cause=test["cause"],
            command=test["command"],
        )
        found = [measurement for measurement in case["measurements"] if measurement["test"] == test["name"]]
        for one in found:
            cause = "" if one["verdict"] == "pass" else one["detail"]
            yield replace(
                row,
                check=one["check"],
                verdict=one["verdict"],
                seconds=one["seconds"],
                measurement=one,
                cause=cause,
            )
        explained = any(one["verdict"] != "pass" for one in found)
        if row.verdict == "error" or not found or (row.verdict in ("skip", "xfail") and not explained):
            yield row


def cause_line(cause: Mapping[str, Any]) -> str:
    """One cause of a diagnosis in one line: `k and v are exchanged, in layer 3: every row`."""
    what = cause.get("what") or ()
    names = (what,) if isinstance(what, str) else tuple(map(str, what))
    kind, where, detail = (str(cause.get(name) or "") for name in ("kind", "where", "detail"))
    if kind in KINDS:
        return str(Cause(kind=kind, what=names, where=where, detail=detail))
    text = ": ".join(part for part in (kind, ", ".join(names)) if part) or "unknown"
    return text + f", in {where}" * bool(where) + f": {detail}" * bool(detail)


def failures(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows that failed, those of one check and of the same causes together, whatever their case."""
    alike: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.failed:
            causes = sorted(f"{cause.get('kind')} {cause.get('what')}" for cause in row.causes)
            alike.setdefault((row.verdict, row.test, row.check, *causes), []).append(row)
    return list(alike.values())


def stem(check: str) -> str:
    """`logits, packed` and `logits [long]` are both about `logits`."""
    return re.split(r",? \[|, |: | \(", check, maxsplit=1)[0]


def grouped(rows: Sequence[Row]) -> list[Row]:
    """`rows` with the passing measurements of one kind, where there are many, in the line of the tightest."""
    kinds: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.verdict == "pass" and row.measurement:
            kinds.setdefault(_kind(row), []).append(row)
    out: list[Row] = []
    for row in rows:
        alike = kinds.get(_kind(row), []) if row.verdict == "pass" else []
        if len(alike) < ALIKE:
            out.append(row)
        elif row is alike[0]:
            tightest = min(alike, key=lambda one: float("inf") if one.ratio is None else one.ratio)
            about = tightest.check.removeprefix(stem(row.check)).strip(" ,:[]()")
            unit = f"{tightest.unit}; the tightest: {about}" if tightest.ratio is not None and about else tightest.unit
            out.append(
                replace(
                    tightest,
                    check=f"{stem(row.check)} ({len(alike)} checks)",
                    seconds=sum(one.seconds for one in alike),
                    measurement={**tightest.measurement, "unit": unit},
                )
            )
    return out


def _kind(row: Row) -> tuple[str, ...]:
    unit = re.sub(r"[\d,]+", "", row.unit)
    return (row.case, row.test, stem(row.check), unit)


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """Counts of a run record, and its conclusion in one line."""
    rows = rows_of(record)
    counts = {name: sum(row.verdict == name for row in rows) for name in VERDICTS}
    failed = counts["FAIL"] + counts["error"] + len(record.get("errors", ()))
    whole = bool(rows) and not record.get("interrupted")
    return {
        "verdict": "fail" if failed else "pass" if whole and counts["pass"] == len(rows) else "incomplete",
        "line": conclusion(record, rows),
        "checks": len(rows),
        "passed": counts["pass"],
        "failed": failed,
        "skipped": counts["skip"] + counts["xfail"],
        "cases": len({row.case for row in rows}),
        "left_out": len(record["left_out"]),
    }


def conclusion(record: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """One line, e.g. `14 checks in 2 cases: all passed`."""
    counts = {name: sum(row.verdict == name for row in rows) for name in VERDICTS}
    failed, skipped = counts["FAIL"] + counts["error"], counts["skip"] + counts["xfail"]
    parts = [f"{counts['pass']} passed"] * bool(counts["pass"])
    parts += [f"{failed} failed"] * bool(failed) + [f"{skipped} skipped"] * bool(skipped)
    verdict = "all passed" if rows and counts["pass"] == len(rows) else ", ".join(parts) or "nothing ran"
    cases = len({row.case for row in rows})
    left_out = len(record["left_out"])
    line = f"{plural(len(rows), 'check')} in {plural(cases, 'case')}: {verdict}"
    line += f"; {left_out} left out" if left_out else ""
    errors = len(record.get("errors", ()))
    line += f"; {plural(errors, 'module')} could not be collected" if errors else ""
    return line + ("; interrupted, so not everything ran" if record.get("interrupted") else "")


def plural(count: int, noun: str) -> str:
    """`1 case`, `2 cases`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
