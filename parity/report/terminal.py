"""The table at the end of a run: what was measured, against which bound, with how much room."""

from __future__ import annotations

import io
import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from parity.record import CAUSES
from parity.report.rows import Row, cause_line, grouped, rows_of

if TYPE_CHECKING:
    from rich.console import RenderableType

STYLES = {"pass": "green", "FAIL": "bold red", "error": "bold red", "skip": "yellow", "xfail": "yellow"}
HEADINGS = ("check", "measured", "bound", "margin", "seconds", "verdict", "unit")
INDENT = 2
CAUSE_LINES, LINES_BESIDE_A_CAUSE = 12, 4
"""Lines of evidence that are shown again at the end: more where no cause says what they come to."""
CHECK_SHARE = 0.28
"""Of the width, for the names of checks; a longer one is folded, as the last column is."""


def render(rows: Sequence[Row], *, colour: bool, width: int | None = None) -> str:
    """The table as text, one heading a case, with ANSI codes if `colour`.

    Args:
        rows: As `rows_of` or `grouped` returns them.
        colour: Whether the terminal shows markup.
        width: Columns; by default the terminal's, 100 where there is none (a log), and never more than 120.
    """
    from rich.console import Console, Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    columns = min(width or shutil.get_terminal_size((100, 24)).columns, 120)
    widest = [max(map(len, column)) for column in zip(HEADINGS, *(_cells(row, columns) for row in rows), strict=True)]
    widest[0] = min(widest[0], round(CHECK_SHARE * columns))
    widest[-1] = max(columns - INDENT - sum(widest[:-1]) - 2 * (len(HEADINGS) - 1), 12)

    def table(lines: Iterable[tuple[Sequence[str], str]]) -> RenderableType:
        out = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
        for heading, size in zip(HEADINGS, widest, strict=True):
            number = heading in ("measured", "bound", "margin", "seconds")
            out.add_column(width=size, justify="right" if number else "left", overflow="fold")
        for line, style in lines:
            out.add_row(*(Text(cell) for cell in line), style=style)
        return Padding(out, (0, 0, 0, INDENT))

    parts: list[RenderableType] = [table([(HEADINGS, "dim")])]
    for case in dict.fromkeys(row.case for row in rows):
        parts.append(Text(case, style="bold"))
        parts.append(table((_cells(row, widest[-1]), STYLES[row.verdict]) for row in rows if row.case == case))
    console = Console(
        file=io.StringIO(), width=columns, force_terminal=colour, color_system="standard" if colour else None
    )
    with console.capture() as capture:
        console.print(Group(*parts), highlight=False)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def write(terminal: pytest.TerminalReporter, record: Mapping[str, Any]) -> None:
    """Write the table, the first failure and the conclusion at the end of pytest's own report."""
    rows = rows_of(record)
    if not rows:
        terminal.write_line("parity: no check ran in any case", yellow=True)
        return
    terminal.write_sep("=", "parity")
    shown = rows if terminal.verbosity > 0 else grouped(rows)
    terminal.write_line(render(shown, colour=terminal.hasmarkup))
    first = next((row for row in rows if row.failed), None)
    if first is not None:
        terminal.write_line("")
        terminal.write_line(f"first failure: {first.case}, {first.check}", red=True, bold=True)
        width = min(shutil.get_terminal_size((100, 24)).columns, 120)
        terminal.write_line("\n".join(story(first, width)))
    terminal.write_line("")
    verdict = record["summary"]["verdict"]
    colours = {"fail": {"red": True}, "pass": {"green": True}, "incomplete": {"yellow": True}}
    terminal.write_line(record["summary"]["line"], bold=True, **colours[verdict])


def story(row: Row, width: int) -> list[str]:
    """A failure in lines of at most `width`: what, where, why, the evidence, and how to see it again.

    Lines are folded between words, so that the name of a tensor stays whole and can be copied.
    """
    lines = [row.sentence, f"case   {row.case}"]
    lines += [f"where  {row.where}"] * bool(row.where)
    lines += [f"cause  {cause_line(cause)}" for cause in row.causes[:CAUSES]]
    lines += [f"... and {len(row.causes) - CAUSES} further causes"] * (len(row.causes) > CAUSES)
    evidence = row.cause.strip().splitlines()
    evidence = evidence if row.measurement else evidence[1:]
    shown = LINES_BESIDE_A_CAUSE if row.causes else CAUSE_LINES
    lines += evidence[:shown]
    lines += [f"... {len(evidence) - shown} more lines above"] * (len(evidence) > shown)
    lines += [f"repeat {row.command}"] * bool(row.command)
    return [folded for line in lines for folded in _folded(line, width)]


def _folded(line: str, width: int) -> list[str]:
    inner = len(line) - len(line.lstrip())
    indent = " " * (INDENT + inner)
    return textwrap.wrap(
        line.strip(),
        max(width, 40),
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    ) or [""]


def _cells(row: Row, room: int) -> tuple[str, ...]:
    """The row as text, in the order of `HEADINGS`; the last in about `room` columns."""
    last = _unit(row, room) if row.measurement else textwrap.shorten(row.sentence, 100, placeholder=" ...")
    return (row.check, row.measured, row.bound, row.margin, f"{row.seconds:.2f}", row.verdict, last)


def _unit(row: Row, room: int) -> str:
    """What is counted; where that is too long, without what a passing row does not have to say."""
    unit, _, tightest = row.unit.partition("; the tightest: ")
    if tightest and len(unit) + len(tightest) + 2 <= max(room, 2 * room - 8):
        unit = f"{unit}; {tightest}"
    if len(unit) > room and row.verdict == "pass":
        unit = re.sub(r" (differ|unproved)$", "", unit)
    return unit
