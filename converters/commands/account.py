"""What a conversion did, as a table."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from converters.convert import Conversion

MANY = 20  # lines of one kind, after which only their number is told


def print_account(done: Conversion, digests: str | None = None) -> None:
    """Print it on standard output.

    Args:
        done: The conversion.
        digests: The file of digests that was written.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()

    def row(name: str, text: str) -> None:
        table.add_row(name, Text(text))

    row("source", f"{done.source} ({done.columns[0]})")
    row("target", f"{done.target} ({done.columns[1]})")
    row("tensors", f"{done.tensors[0]:,} -> {done.tensors[1]:,}")
    moved = done.bytes - done.resumed
    rate = moved / max(done.seconds, 1e-9) / 1e6
    kept = f"all in {done.dtype}" if done.dtype else "every bit kept"
    row("bytes", f"{done.bytes:,} in {done.seconds:.1f} s, {rate:,.0f} MB/s; {kept}")
    if done.resumed:
        row("resumed", f"{done.resumed:,} bytes that an interrupted run had written, read again and found right")
    if done.constants:
        row("constants", f"{done.constants:,} elements that one side lacks, all zero")
    for reason, keys in _by_reason(done.dropped).items():
        row("dropped", f"{keys[0]}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''}: {reason}")
    for what, why in done.left_alone.items():
        row("left alone", f"{what}: {why}")
    for name, value in done.options.items():
        row("config", f"{name}: {json.dumps(value)}")
    for what, why in done.let_go.items():
        row("let go", f"{what}: {why}")
    for key, count in list(done.nonfinite.items())[:MANY]:
        rounded = done.overflowed.get(key, 0)
        kept = f"{count - rounded:,} NaN or infinite, kept as they are" if count > rounded else ""
        became = f"{rounded:,} became infinite by rounding to {done.dtype}" if rounded else ""
        row("not finite", f"{key}: {'; '.join(filter(None, (kept, became)))}")
    if len(done.nonfinite) > MANY:
        row("not finite", f"and {len(done.nonfinite) - MANY} tensors more")
    for notice in done.notices:
        row("note", notice)
    row("carried", ", ".join(map(str, done.carried)) or "no other files")
    if digests is not None:
        row("digests", digests)
    Console(width=None if sys.stdout.isatty() else 160, soft_wrap=True).print(table)


def _by_reason(dropped: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for key, reason in dropped.items():
        reasons.setdefault(reason, []).append(key)
    return reasons
