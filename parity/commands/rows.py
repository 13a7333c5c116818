"""Measurements as a table, outside pytest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from parity.findings import Measurement

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 12  # lines of evidence a row


def show(console: Console, rows: Sequence[Measurement], conclusion: str) -> None:
    """Print a row for each, the evidence beneath, and one line at the end."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in ("check", "measured", "seconds", "verdict", "unit"):
        table.add_column(name, justify="right" if name in ("measured", "seconds") else "left", overflow="fold")
    for row in rows:
        unit = re.sub(r" (differ|unproved)$", "", row.unit) if row.passed else row.unit
        cells = (row.check, f"{row.measured}", f"{row.seconds:.2f}", "pass" if row.passed else "FAIL", unit)
        table.add_row(*map(Text, cells), style="green" if row.passed else "bold red")
    console.print(table)
    for row in rows:
        lines = row.detail.splitlines()
        for line in [f"{row.check}:", *lines[:SHOWN]] if lines else []:
            console.print(f"  {line}", style="" if row.passed else "red", markup=False, soft_wrap=True)
        if len(lines) > SHOWN:
            console.print(f"  ... {len(lines) - SHOWN} more lines", style="dim")
    style = "bold green" if all(row.passed for row in rows) else "bold red"
    console.print(conclusion, style=style, markup=False, soft_wrap=True)
