"""The run record as Markdown, for a pull request or the summary of a CI job: failures first, passing cases folded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from parity.report.rows import Row, case_rows, cause_line, failures, grouped, plural, rows_of

EVIDENCE_LINES = 12
FAILURES = 25
"""So many kinds of failures are told in full; the tables have them all."""
CASES = 10


def markdown(record: Mapping[str, Any]) -> str:
    """The report; what a test said is escaped, so that it can neither format nor link."""
    return "\n".join(_lines(record)) + "\n"


def _lines(record: Mapping[str, Any]) -> Iterator[str]:
    summary = record["summary"]
    sign = {"pass": "✅", "fail": "❌"}.get(summary["verdict"], "⚠️")
    yield f"## {sign} parity: {text(summary['line'])}"
    yield ""
    models = [f"**{text(one['name'])}**, weights: {text(one['weights'])}" for one in record["models"]]
    versions = [f"{text(name)} {text(version)}" for name, version in record["versions"].items()]
    machine = record["machine"]
    where = f"Python {machine['python']}, {machine['cpus']} CPUs, {machine['device']}"
    yield f"{'; '.join(models)}. {', '.join(versions)}. {text(where)}, {record['seconds']:.1f} s."
    yield ""
    yield from fenced([record["command"]])
    failed = [row for row in rows_of(record) if row.failed]
    for error in record["errors"]:
        yield f"### {text(error['where'])} could not be collected"
        yield ""
        yield from fenced(error["text"].splitlines()[-EVIDENCE_LINES:])
    if failed:
        yield f"### {plural(len(failed), 'failure')}"
        yield ""
    alike = failures(failed)
    for rows in alike[:FAILURES]:
        yield from _failure(rows)
    if len(alike) > FAILURES:
        yield f"… and {len(alike) - FAILURES} more kinds in the tables below."
        yield ""
    for case in record["cases"]:
        yield from _case(case)
    if record["skipped"]:
        yield from _folded(
            f"{plural(len(record['skipped']), 'check')} skipped",
            _table(("case", "check", "reason"), [tuple(one.values()) for one in record["skipped"]]),
        )
    if record["left_out"]:
        yield from _folded(
            f"{len(record['left_out'])} left out",
            _table(("case", "reason"), [(one["id"], one["reason"]) for one in record["left_out"]]),
        )


def _failure(rows: Sequence[Row]) -> Iterator[str]:
    row = rows[0]
    yield f"**{text(row.sentence)}**"
    yield ""
    for cause in row.causes:
        yield f"- cause: **{text(cause_line(cause))}**"
    for one in rows[:CASES]:
        yield f"- case: `{ticked(one.case)}`" + (f", at {text(one.where)}" if one.where else "")
    if len(rows) > CASES:
        yield f"- and {len(rows) - CASES} more cases"
    yield ""
    lines = row.cause.strip().splitlines()
    more = [f"... {len(lines) - EVIDENCE_LINES} more lines"] * (len(lines) > EVIDENCE_LINES)
    if lines:
        yield from fenced([*lines[:EVIDENCE_LINES], *more])
    if row.command:
        yield from fenced([row.command], "bash")


def _case(case: Mapping[str, Any]) -> Iterator[str]:
    rows = list(case_rows(case))
    failed = sum(row.failed for row in rows)
    shown = grouped(rows)
    cells = [
        (row.check, row.measured, row.bound, row.margin, row.verdict, row.unit or row.sentence, row.where)
        for row in shown
    ]
    table = list(
        _table(("check", "measured", "bound", "margin", "verdict", "of what", "where"), cells, right=(1, 2, 3))
    )
    skipped = sum(row.verdict in ("skip", "xfail") for row in rows)
    sign = "❌" if failed else "⚠️" if skipped else "✅"
    title = f"{sign} {case['id']}: {plural(len(rows), 'check')}" + f", {failed} failed" * bool(failed)
    yield from _folded(title, [*([text(case["note"]), ""] if case["note"] else []), *table], opened=bool(failed))


def _folded(title: str, lines: Sequence[str] | Iterator[str], *, opened: bool = False) -> Iterator[str]:
    yield f"<details{' open' * opened}><summary>{text(title)}</summary>"
    yield ""
    yield from lines
    yield "</details>"
    yield ""


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> Iterator[str]:
    yield "| " + " | ".join(heading) + " |"
    yield "|" + "|".join("---:" if index in right else "---" for index in range(len(heading))) + "|"
    for row in rows:
        yield "| " + " | ".join(text(cell) for cell in row) + " |"
    yield ""


def text(said: object) -> str:
    """Plain text on one line of Markdown."""
    line = " ".join(str(said).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", line)
    return re.sub(r"(?i)(https?|www)(?=[:.])", r"\1&#8203;", line).replace("@", "&#64;")


def ticked(said: str) -> str:
    """Text that may stand between backticks."""
    return " ".join(said.replace("`", "'").split())


def fenced(lines: Sequence[str], language: str = "text") -> Iterator[str]:
    """A block of code whose fence is longer than any within."""
    body = "\n".join(lines)
    longest = max((len(run) for run in re.findall(r"`+", body)), default=0)
    fence = "`" * max(3, longest + 1)
    yield f"{fence}{language}"
    yield body
    yield fence
    yield ""
