"""The run record as one HTML page that needs nothing else: no script of others, no font, no request."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from importlib import resources
from typing import Any

from parity.report.facts import NO_CASE
from parity.report.pictures import number, picture
from parity.report.rows import Row, case_rows, cause_line, failures, grouped, rows_of, stem

DECADES = 4.0
"""A bar spans so many powers of ten on either side of the gate."""
ACCOUNT_ROWS = 1500
"""A longer account is cut, and says so."""
EVIDENCE_LINES = 7
"""So many lines of a failure's detail are in sight, and so many more on a click."""
REST_LINES = 200
PICTURES = 40
"""So many pictures a case; more of them stay in the JSON."""

NO_FAULT = "no fault"

SEARCH = """
document.querySelectorAll('input[type=search]').forEach(function (box) {
  box.addEventListener('input', function () {
    var asked = box.value.toLowerCase();
    box.closest('details').querySelectorAll('tbody tr').forEach(function (row) {
      row.hidden = row.textContent.toLowerCase().indexOf(asked) < 0;
    });
  });
});
"""


def html(record: Mapping[str, Any]) -> str:
    """The page. Every text of the record is escaped, and no script but the page's own may run."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files("parity.report").joinpath("page.html.jinja").read_text("utf-8"))
    hashed = base64.b64encode(hashlib.sha256(SEARCH.encode()).digest()).decode()
    rows = rows_of(record)
    seen: dict[str, str] = {}
    return template.render(
        record=record,
        summary=record["summary"],
        grid=_grid(record),
        causes=_causes(rows),
        failures=_failures(record, rows),
        cases=[_case(case, seen) for case in record["cases"]],
        left_out=_by_reason(record["left_out"]),
        self_test=_self_test(record.get("self_test")),
        script=Markup(SEARCH),
        script_hash=Markup(hashed),
    )


def _causes(rows: list[Row]) -> list[dict[str, Any]]:
    """Each cause that a diagnosis named, and the checks that it explains."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        for cause in row.causes:
            found.setdefault(cause_line(cause), []).append(row)
    return [
        {
            "line": line,
            "checks": list(dict.fromkeys(row.check for row in explained)),
            "cases": len({row.case for row in explained}),
        }
        for line, explained in found.items()
    ]


def _failures(record: Mapping[str, Any], rows: list[Row]) -> list[dict[str, Any]]:
    """One a check and set of causes: the first case's evidence, and the other cases that failed alike."""
    anchors = {case["id"]: index for index, case in enumerate(record["cases"])}
    told: list[dict[str, Any]] = []
    for found in failures(rows):
        # What else the same test found is a click away, unless it has a cause of its own.
        opened = bool(found[0].causes) or not any(one["row"].test == found[0].test for one in told)
        lines = found[0].cause.strip().splitlines()
        told.append(
            {
                "row": found[0],
                "opened": opened,
                "causes": [cause_line(cause) for cause in found[0].causes],
                "evidence": "\n".join(lines[:EVIDENCE_LINES]),
                "rest": "\n".join(lines[EVIDENCE_LINES:REST_LINES]),
                "more": max(len(lines) - EVIDENCE_LINES, 0),
                "cases": [{"row": row, "anchor": anchors[row.case]} for row in found],
            }
        )
    return told


def _case(case: Mapping[str, Any], seen: dict[str, str]) -> dict[str, Any]:
    """One case; an account that an earlier case has as well refers to it."""
    accounts = []
    for account in case["accounts"]:
        same = json.dumps([account["title"], account["rows"]], sort_keys=True)
        first = seen.setdefault(same, case["id"])
        accounts.append(
            {
                "title": account["title"],
                "count": len(account["rows"]),
                "rows": account["rows"][:ACCOUNT_ROWS] if first == case["id"] else [],
                "more": max(len(account["rows"]) - ACCOUNT_ROWS, 0),
                "like": first if first != case["id"] else "",
            }
        )
    rows = list(case_rows(case))
    return {
        "case": case,
        "known": case["id"] != NO_CASE,
        "failed": any(row.failed for row in rows),
        "verdict": _worst(rows),
        "tightest": min((row for row in rows if row.ratio and not row.failed), key=_ratio, default=None),
        "rows": [{"row": row, "bar": _bar(row, case["floors"])} for row in rows],
        "pictures": [{"title": one["title"], "svg": picture(one)} for one in case["pictures"][:PICTURES]],
        "hidden": max(len(case["pictures"]) - PICTURES, 0),
        "accounts": accounts,
    }


def _ratio(row: Row) -> float:
    return math.inf if row.ratio is None else row.ratio


def _worst(rows: list[Row]) -> str:
    found = {row.verdict for row in rows}
    return next((verdict for verdict in ("error", "FAIL", "xfail", "skip") if verdict in found), "pass")


def _bar(row: Row, floors: float | None) -> dict[str, Any] | None:
    """Where measured, floor and gate stand on a logarithmic scale around the gate, in percent."""
    bound = number(row.measurement.get("bound"))
    measured = number(row.measurement.get("measured"))
    if not isinstance(row.measurement.get("measured"), float | str) or not bound > 0 or not math.isfinite(bound):
        return None

    def at(value: float) -> float:
        if not math.isfinite(value):
            return 100.0
        return round(min(max(50 + 50 * math.log10(value / bound) / DECADES, 1), 100), 1) if value > 0 else 0.0

    floor = number(row.measurement.get("floor"))
    if not floor > 0 and floors and "floor" in row.measurement["detail"]:
        floor = bound / floors
    return {"measured": at(measured), "gate": 50, "floor": at(floor) if floor > 0 else None, "kind": level(row)}


def level(row: Row) -> str:
    """The colour of a row: by verdict and, where it passes, by how much room there is."""
    if row.failed:
        return "fail"
    if row.verdict != "pass":
        return "skip"
    if row.ratio is None:
        return "exact" if row.measurement else "wide"
    return "exact" if row.ratio >= 100 else "wide" if row.ratio >= 3 else "near"


def _grid(record: Mapping[str, Any]) -> dict[str, Any]:
    """Cases by kinds of checks; each cell is the worst of its kind."""
    columns: list[str] = []
    lines = []
    for index, case in enumerate(record["cases"]):
        cells: dict[str, list[Row]] = {}
        shown = grouped(list(case_rows(case)))
        for row in shown:
            name = stem(row.check) if "(" in row.check or len(shown) > 24 else row.check
            cells.setdefault(name, []).append(row)
        columns += [name for name in cells if name not in columns]
        lines.append((index, case["id"], {name: _cell(rows) for name, rows in cells.items()}))
    return {
        "columns": columns,
        "lines": [
            {"anchor": index, "case": case, "cells": [cells.get(name) for name in columns]}
            for index, case, cells in lines
        ],
    }


def _cell(rows: list[Row]) -> dict[str, str]:
    ranks = ["fail", "skip", "near", "wide", "exact"]
    worst = min(rows, key=lambda row: (ranks.index(level(row)), _ratio(row)))
    text = worst.margin if worst.measurement and worst.margin != "-" else worst.verdict
    # Cells are narrow: `14,000x` is `14kx` there.
    text = text.removesuffix(" over").replace(",000,000,000x", "Gx").replace(",000,000x", "Mx").replace(",000x", "kx")
    return {"kind": level(worst), "text": text, "title": worst.sentence}


def _by_reason(left_out: list[Mapping[str, str]]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for one in left_out:
        reasons.setdefault(one["reason"], []).append(one["id"])
    return reasons


def _self_test(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The fault matrix of a self-test (`parity.selftest.report`), faults by checks; anything else as it stands."""
    if found is None:
        return None
    variants = found.get("variants")
    if not (
        isinstance(variants, list)
        and all(isinstance(one, dict) and isinstance(one.get("verdicts"), dict) for one in variants)
    ):
        return {"score": "", "columns": [], "lines": [], "text": json.dumps(found, indent=1)[:100_000]}
    columns = list(dict.fromkeys(check for one in variants for check in one["verdicts"]))
    faults: dict[str, list[Mapping[str, Any]]] = {}
    for one in variants:
        faults.setdefault(str(one.get("fault") or NO_FAULT), []).append(one)
    equivalent = {one["name"] for one in found.get("faults", ()) if one.get("equivalent")} | {NO_FAULT}
    lines = [
        {"name": name, "cells": [_fault_cell(group, check, name in equivalent) for check in columns]}
        for name, group in faults.items()
    ]
    counts = found.get("summary", {})
    names = {"caught": "variants caught", "survivors": "survive", "false_alarms": "false alarms"}
    score = ", ".join(f"{counts[key]} {words}" for key, words in names.items() if key in counts)
    return {"score": score, "columns": columns, "lines": lines, "text": ""}


def _fault_cell(group: list[Mapping[str, Any]], check: str, harmless: bool) -> tuple[str, str]:
    """What a check said to the variants of one fault, and its colour: red for a survivor, and for a false alarm."""
    said = [(one["verdicts"].get(check, "not applicable"), bool(one.get("killed"))) for one in group]
    said = [(verdict, killed) for verdict, killed in said if verdict != "not applicable"]
    if not said:
        return "", "none"
    if any(verdict == "broken" for verdict, _ in said):
        return "broken", "fail"
    caught = sum(verdict != "passed" for verdict, _ in said)
    if harmless:
        return ("false alarm", "fail") if caught else ("passed", "exact")
    if not all(killed for _, killed in said):
        return "missed" if not caught else f"{caught} of {len(said)}", "fail"
    return (
        ("·", "none")
        if not caught
        else ("caught", "exact")
        if caught == len(said)
        else (f"{caught} of {len(said)}", "wide")
    )
