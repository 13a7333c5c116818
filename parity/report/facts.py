"""The run record: what every test stored and how it ended, as one JSON-able value that all reports are written from."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from parity.options import OPTIONS
from parity.record import PICTURE, PROPERTY

if TYPE_CHECKING:
    from parity.case import Case

SCHEMA = "llama-parity/report/1"
CASE_PROPERTY = "parity_case"
"""Name of the user property that says which case a test belongs to."""
ACCOUNT = "parity_account"
"""Name of the user property that carries one account: a title, and rows of name, side, class and reason."""
NO_CASE = "(without a case)"

Record = dict[str, Any]
"""What `schema.json` describes."""


@dataclass
class _Test:
    """The reports of one test: set-up, call and tear-down."""

    reports: list[pytest.TestReport] = field(default_factory=list)

    @property
    def given(self) -> list[tuple[str, Any]]:
        """The user properties, once each."""
        calls = [report for report in self.reports if report.when == "call"] or self.reports
        return list(calls[0].user_properties)

    @property
    def case(self) -> str:
        properties = [pair for report in self.reports for pair in report.user_properties]
        return next((str(value) for name, value in properties if name == CASE_PROPERTY), "")

    @property
    def order(self) -> tuple[str, int, str]:
        path, line, name = self.reports[0].location
        return path, line or 0, name

    def facts(self, case: str, taken: Collection[str]) -> tuple[Record, list[Record]]:
        """The test itself, under a name that is not `taken` in its case, and its measurements."""
        failed = [report for report in self.reports if report.failed]
        skipped = [report for report in self.reports if report.skipped]
        xfailed = any(hasattr(report, "wasxfail") for report in skipped)
        name = _check_name(self.reports[0].nodeid, case)
        if name in taken:
            name = f"{name} ({self.reports[0].nodeid.partition('[')[0]})"
        measurements = []
        for given in (value for key, value in self.given if key == PROPERTY):
            verdict = "pass" if given["passed"] else "xfail" if xfailed else "FAIL"
            measurements.append({"test": name, **given, "verdict": verdict})
        explained = any(measurement["verdict"] != "pass" for measurement in measurements)
        beyond = [report for report in failed if not (explained and report.when == "call")]
        verdict = "error" if beyond else "FAIL" if failed else "pass"
        if verdict == "pass" and skipped:
            verdict = "xfail" if xfailed else "skip"
        test = {
            "name": name,
            "nodeid": self.reports[0].nodeid,
            "verdict": verdict,
            "seconds": sum(report.duration for report in beyond or failed or self.reports),
            "cause": _cause(beyond or failed or skipped),
        }
        return test, measurements


def cases_of(
    stats: Mapping[str, Iterable[Any]], cases: Sequence[Case] = (), *, suite: bool = True, command: str = "pytest"
) -> list[Record]:
    """What every case was found to be, in the order of `cases`; those that no test reached are left out.

    Args:
        stats: `TerminalReporter.stats`. Under xdist the tests arrive in any order; the result does not depend on it.
        cases: The matrix.
        suite: Whether the shipped suite ran, so that a test is repeated by its name alone.
        command: What a line that repeats a case begins with.
    """
    tests: dict[str, _Test] = {}
    for reports in stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                tests.setdefault(report.nodeid, _Test()).reports.append(report)
    known = {case.id: case for case in cases}
    rank = {name: index for index, name in enumerate(known)}
    found: dict[str, Record] = {}
    for test in sorted(tests.values(), key=lambda test: (rank.get(test.case, len(rank)), test.case, test.order)):
        given = test.given
        if not test.case and not any(name == PROPERTY for name, _ in given):
            continue
        case = found.setdefault(test.case or NO_CASE, _case(test.case, known.get(test.case), command))
        facts, measurements = test.facts(test.case, {one["name"] for one in case["tests"]})
        place = facts["nodeid"].partition("[")[0]
        again = f"-k {place.rpartition('::')[2]}" if suite else shlex.quote(place)
        case["tests"].append({**facts, "command": f"{case['command'] or command} {again}"})
        case["measurements"] += measurements
        for kind, name in (("pictures", PICTURE), ("accounts", ACCOUNT)):
            case[kind] += [{"test": facts["name"], **value} for key, value in given if key == name]
    return list(found.values())


def errors_of(stats: Mapping[str, Iterable[Any]]) -> list[Record]:
    """What could not be collected, so that its tests never ran."""
    return [
        {"where": report.nodeid, "text": report.longreprtext}
        for report in stats.get("error", ())
        if isinstance(report, pytest.CollectReport)
    ]


def record_of(cases: list[Record], *, left_out: Sequence[tuple[str, str]] = (), **facts: Any) -> Record:
    """The run record.

    Args:
        cases: As `cases_of` returns them.
        left_out: `(id, reason)` of the combinations that cannot exist, and of the golden values that are not there.
        facts: `started`, `seconds`, `command`, `versions`, `machine`, `models`, `interrupted`, `errors`.
    """
    from parity.report.rows import rows_of, summary

    record: Record = {
        "schema": SCHEMA,
        **facts,
        "summary": {},
        "cases": cases,
        "left_out": [{"id": name, "reason": reason} for name, reason in left_out],
        "skipped": [
            {"case": row.case, "check": row.check, "reason": row.cause}
            for row in rows_of({"cases": cases})
            if row.verdict in ("skip", "xfail")
        ],
        "self_test": None,
    }
    record["summary"] = summary(record)
    jsonable: Record = finite(record)
    return jsonable


def finite(value: Any) -> Any:
    """`value` with lists for tuples and, as JSON has no such numbers, text for NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def machine(device: str) -> Record:
    """Where the run took place; `device` is `cpu`, `cuda`, or both of them."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count() or 1,
        "device": device,
    }


def digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a config, whatever the order of its fields."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def repeat(case: Case) -> str:
    """The command line that runs `case` alone; options at their default stay out."""
    parts = ["pytest"]
    for option in OPTIONS:
        value = getattr(case, option.key, getattr(case.topology, option.key, None))
        text = {True: "on", False: "off"}[value] if isinstance(value, bool) else _plain(value)
        if option.name == "size":
            text = text.removesuffix("-aligned")  # which the precision implies
        if option.name == "backend" and case.against is not None:  # which stands there in its place
            continue
        if value is None or text == option.default or (option.name == "weights" and _implied(case, text)):
            continue
        parts += [f"--{option.name}"] if option.flag else [f"--{option.name}", text]
    return shlex.join(parts)


def _implied(case: Case, weights: str) -> bool:
    return weights == ("seeded" if case.size != "full" else "checkpoint")


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _case(name: str, case: Case | None, command: str) -> Record:
    from parity.devices import device_of

    fields: Record = {"id": name or NO_CASE, "model": "", "topology": "", "precision": "", "backend": ""}
    fields |= {"converter": "", "device": "", "floors": None, "note": "", "command": ""}
    if case is not None:
        fields |= {key: getattr(case, key) for key in ("model", "precision", "backend", "converter", "note")}
        fields |= {"topology": str(case.topology), "device": device_of(case), "floors": case.max_floors}
        fields["command"] = command + repeat(case).removeprefix("pytest")
    return {**fields, "tests": [], "measurements": [], "pictures": [], "accounts": []}


def _check_name(nodeid: str, case: str) -> str:
    """`test_logits[<case>-probe]` as `logits [probe]`."""
    name = nodeid.rsplit("::", 1)[-1]
    name, bracket, parameters = name.partition("[")
    rest = parameters.rpartition("]")[0].replace(case, "").strip("-") if bracket else ""
    return name.removeprefix("test_").replace("_", " ") + (f" [{rest}]" if rest else "")


def _cause(reports: Sequence[pytest.TestReport]) -> str:
    """Why the first of `reports` ended as it did: pytest's own text, or the reason of a skip."""
    if not reports:
        return ""
    report = reports[0]
    if hasattr(report, "wasxfail"):
        return str(report.wasxfail)
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message).removeprefix("Failed: ") if crash is not None else report.longreprtext
