"""The table at the end of a run: what was measured, against which bound, with how much room."""

from __future__ import annotations

import io
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest

from parity.findings import Measurement, quantity, times
from parity.record import PROPERTY

if TYPE_CHECKING:
    from rich.console import RenderableType

CASE_PROPERTY = "parity_case"
"""Name of the user property that says which case a test belongs to."""

STYLES = {"pass": "green", "FAIL": "bold red", "error": "bold red", "skip": "yellow", "xfail": "yellow"}
HEADINGS = ("check", "measured", "bound", "margin", "seconds", "verdict", "unit")
INDENT = 2
CAUSE_LINES = 12
CAUSE_WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: a measurement, or a test that ended without one.

    Args:
        case: The id of the case, or empty for a test without one.
        order: Position of the test among the others of its case, and of the measurement in its test.
        measurement: `None` for a test that measured nothing.
        check: What was checked.
        verdict: `pass`, `FAIL`, `error` (before or beside a measurement), `skip` or `xfail`.
        seconds: Time taken.
        cause: Why it did not pass, or why it was skipped.
    """

    case: str
    order: tuple[str, int, str, int]
    measurement: Measurement | None
    check: str
    verdict: str
    seconds: float
    cause: str = ""

    @property
    def failed(self) -> bool:
        """Whether this row makes the run fail."""
        return self.verdict in ("FAIL", "error")

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of `HEADINGS`."""
        seconds = f"{self.seconds:.2f}"
        m = self.measurement
        if m is None:
            line = next(iter(self.cause.strip().splitlines()), "nothing measured")
            short = textwrap.shorten(line, CAUSE_WIDTH, placeholder=" ...")
            return (self.check, "-", "-", "-", seconds, self.verdict, short)
        return (m.check, quantity(m.measured), quantity(m.bound), _margin(m), seconds, self.verdict, m.unit)


@dataclass
class _Test:
    """The reports of one test: set-up, call and tear-down."""

    reports: list[pytest.TestReport] = field(default_factory=list)

    def rows(self) -> list[Row]:
        """One row a measurement, and one more for an end that no measurement accounts for."""
        properties = [pair for report in self.reports for pair in report.user_properties]
        case = next((str(value) for name, value in properties if name == CASE_PROPERTY), "")
        calls = [report for report in self.reports if report.when == "call"] or self.reports
        given: list[tuple[str, Any]] = calls[0].user_properties
        found = [Measurement(**value) for name, value in given if name == PROPERTY]
        if not case and not found:
            return []
        failed = [report for report in self.reports if report.failed]
        skipped = [report for report in self.reports if report.skipped]
        xfailed = any(hasattr(report, "wasxfail") for report in skipped)
        path, line, _ = self.reports[0].location
        name = _check_name(self.reports[0].nodeid, case)
        row = Row(case=case, order=(path, line or 0, name, 0), measurement=None, check=name, verdict="", seconds=0.0)

        rows: list[Row] = []
        for index, measurement in enumerate(found):
            verdict = "pass" if measurement.passed else "xfail" if xfailed else "FAIL"
            cause = "" if measurement.passed else _cause(failed or skipped) or measurement.verdict
            order = (*row.order[:3], index)
            rows.append(
                replace(
                    row,
                    order=order,
                    measurement=measurement,
                    verdict=verdict,
                    seconds=measurement.seconds,
                    cause=cause,
                )
            )
        explained = sum(not measurement.passed for measurement in found)
        beyond = [report for report in failed if not (explained and report.when == "call")]
        last = replace(row, order=(*row.order[:3], len(found)))
        if beyond:
            seconds = sum(report.duration for report in beyond)
            rows.append(replace(last, verdict="error", seconds=seconds, cause=_cause(beyond)))
        elif skipped and not explained:
            rows.append(replace(last, verdict="xfail" if xfailed else "skip", cause=_cause(skipped)))
        elif not found and not failed:
            rows.append(replace(last, verdict="pass", seconds=calls[0].duration))
        return rows


def collect(stats: Mapping[str, Iterable[Any]], case_order: Sequence[str] = ()) -> list[Row]:
    """The rows of every finished test, by case (in `case_order`, then by id) and in the order of the checks.

    Args:
        stats: `TerminalReporter.stats`. Under xdist the tests arrive in any order; the rows do not depend on it.
        case_order: Ids of the cases as the matrix has them.
    """
    tests: dict[str, _Test] = {}
    for reports in stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                tests.setdefault(report.nodeid, _Test()).reports.append(report)
    rows = [row for test in tests.values() for row in test.rows()]
    rank = {case: index for index, case in enumerate(case_order)}
    return sorted(rows, key=lambda row: (rank.get(row.case, len(rank)), row.case, row.order))


def conclusion(rows: Sequence[Row], left_out: int = 0) -> str:
    """One line, e.g. `14 checks in 2 cases: all passed`."""
    counts = {name: sum(row.verdict == name for row in rows) for name in STYLES}
    failed = counts["FAIL"] + counts["error"]
    skipped = counts["skip"] + counts["xfail"]
    cases = len({row.case for row in rows if row.case})
    parts = [f"{counts['pass']} passed"] * bool(counts["pass"])
    parts += [f"{failed} failed"] * bool(failed) + [f"{skipped} skipped"] * bool(skipped)
    verdict = "all passed" if rows and counts["pass"] == len(rows) else ", ".join(parts) or "nothing ran"
    line = f"{_plural(len(rows), 'check')} in {_plural(cases, 'case')}: {verdict}"
    return line + (f"; {_plural(left_out, 'combination')} left out" if left_out else "")


def render(rows: Sequence[Row], *, colour: bool, width: int | None = None) -> str:
    """The table as text, one heading a case, with ANSI codes if `colour`.

    Args:
        rows: As `collect` returns them.
        colour: Whether the terminal shows markup.
        width: Columns; by default the terminal's, 100 where there is none (a log), and never more than 120.
    """
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

    columns = min(width or shutil.get_terminal_size((100, 24)).columns, 120)
    cells = [row.cells() for row in rows]
    widest = [max(len(line[i]) for line in [HEADINGS, *cells]) for i in range(len(HEADINGS))]
    widest[0] = min(widest[0], 28)
    widest[-1] = max(columns - INDENT - sum(widest[:-1]) - 2 * (len(HEADINGS) - 1), 12)

    def table(lines: Iterable[tuple[Sequence[str], str]]) -> Table:
        out = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
        for heading, size in zip(HEADINGS, widest, strict=True):
            number = heading in ("measured", "bound", "margin", "seconds")
            out.add_column(width=size, justify="right" if number else "left", overflow="fold")
        for line, style in lines:
            out.add_row(*(Text(cell) for cell in line), style=style)
        return out

    def indented(inner: RenderableType) -> RenderableType:
        from rich.padding import Padding

        return Padding(inner, (0, 0, 0, INDENT))

    parts: list[RenderableType] = [indented(table([(HEADINGS, "dim")]))]
    for case in dict.fromkeys(row.case for row in rows):
        parts.append(Text(case or "(without a case)", style="bold"))
        parts.append(indented(table((row.cells(), STYLES[row.verdict]) for row in rows if row.case == case)))
    console = Console(
        file=io.StringIO(), width=columns, force_terminal=colour, color_system="standard" if colour else None
    )
    with console.capture() as capture:
        console.print(Group(*parts), highlight=False)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def write(terminal: pytest.TerminalReporter, case_order: Sequence[str], left_out: int) -> None:
    """Write the table, the first failure's cause and the conclusion at the end of pytest's own report."""
    rows = collect(terminal.stats, case_order)
    if not rows:
        terminal.write_line("parity: no check ran in any case", yellow=True)
        return
    terminal.write_sep("=", "parity")
    terminal.write_line(render(rows, colour=terminal.hasmarkup))
    first = next((row for row in rows if row.failed), None)
    if first is not None:
        terminal.write_line("")
        name = first.measurement.check if first.measurement else first.check
        terminal.write_line(f"first failure: {first.case or '(without a case)'}, {name}", red=True, bold=True)
        lines = first.cause.strip().splitlines()
        shown = lines[:CAUSE_LINES] + [f"... {len(lines) - CAUSE_LINES} more lines above"] * (len(lines) > CAUSE_LINES)
        terminal.write_line("\n".join(f"  {line}" for line in shown))
    terminal.write_line("")
    passed = all(row.verdict == "pass" for row in rows)
    colour = {"red": True} if first is not None else {"green": True} if passed else {"yellow": True}
    terminal.write_line(conclusion(rows, left_out), bold=True, **colour)


def _margin(measurement: Measurement) -> str:
    """How many times the measured value fits into its bound; `exact` where nothing was found at all."""
    if measurement.measured == 0:
        return "exact"
    margin = measurement.margin
    if not margin:
        return "-"
    return times(margin) if margin >= 1 else f"{times(1 / margin)} over"


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


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"
