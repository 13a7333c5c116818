"""`python -m converters convert`: a checkpoint folder from one column to another, on the command line."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from converters.errors import ConversionError

if TYPE_CHECKING:
    from converters.convert import Conversion

COLUMNS = ("hf", "te")
DTYPES = ("float32", "bfloat16")


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    text = "convert a checkpoint folder, every bit of every weight (without --dtype) and every other file kept"
    sub = commands.add_parser("convert", help=text, description=text)
    sub.set_defaults(command=_convert)
    sub.add_argument("--from", dest="source_column", choices=COLUMNS, help="format to read (default: what it is)")
    sub.add_argument("--to", dest="target_column", choices=COLUMNS, required=True, help="format to write")
    sub.add_argument("--overwrite", action="store_true", help="replace TARGET where it exists")
    sub.add_argument("--dtype", choices=DTYPES, help="round every tensor to it (default: each keeps its own)")
    sub.add_argument("--quiet", action="store_true", help="print nothing but errors")
    sub.add_argument("--trust-remote-code", action="store_true", help="take Python files over too")
    sub.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="with --to te, a field of its config: attn_input_format=bshd (a VALUE that reads as JSON is JSON)",
    )
    sub.add_argument("source", metavar="SOURCE", help="folder, or hub id")
    sub.add_argument("target", metavar="TARGET", help="folder to make")


def _convert(options: argparse.Namespace) -> int:
    from converters.convert import convert_folder  # imports torch

    done = convert_folder(
        options.source,
        options.target,
        source_column=options.source_column,
        target_column=options.target_column,
        dtype=options.dtype,
        overwrite=options.overwrite,
        quiet=options.quiet,
        options=dict(map(_option, options.option)),
        trust_remote_code=options.trust_remote_code,
    )
    if not options.quiet:
        _print(done)
    return 0


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConversionError(f"--option {text!r}: expected NAME=VALUE, as in attn_input_format=bshd")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _print(done: Conversion) -> None:
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
    rate = done.bytes / max(done.seconds, 1e-9) / 1e6
    kept = f"all in {done.dtype}" if done.dtype else "every bit kept"
    row("bytes", f"{done.bytes:,} in {done.seconds:.1f} s, {rate:,.0f} MB/s; {kept}")
    if done.constants:
        row("constants", f"{done.constants:,} elements that one side lacks, all zero")
    reasons: dict[str, list[str]] = {}
    for key, reason in done.dropped.items():
        reasons.setdefault(reason, []).append(key)
    for reason, keys in reasons.items():
        row("dropped", f"{keys[0]}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''}: {reason}")
    for name, value in done.options.items():
        row("config", f"{name}: {json.dumps(value)}")
    for what, why in done.let_go.items():
        row("let go", f"{what}: {why}")
    row("carried", ", ".join(map(str, done.carried)) or "no other files")
    Console(width=None if sys.stdout.isatty() else 160, soft_wrap=True).print(table)
