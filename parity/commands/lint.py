"""`parity lint DIR`: what can be said of an exported checkpoint without running it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.errors import ConversionError

if TYPE_CHECKING:
    from rich.console import Console

    from parity.lint.run import Linted


def add(commands: Any) -> None:
    """Declare `lint`."""
    lint = commands.add_parser(
        "lint",
        allow_abbrev=False,
        help="look at an exported checkpoint folder before it is released",
        description="Look at a Hugging Face checkpoint folder by itself: weights against index and config, tokenizer "
        "and token ids, generation config, chat template, and whether transformers loads it. Needs no GPU and runs no "
        "model. Exit status 1 if there is an error.",
    )
    lint.add_argument("folder", metavar="DIR", type=Path, nargs="?", help="A checkpoint folder.")
    lint.add_argument("--rules", action="store_true", help="List the rules.")
    lint.add_argument(
        "--ignore", metavar="RULE", action="append", default=[], help="A rule not to ask; may be given several times."
    )
    lint.add_argument("--strict", action="store_true", help="Exit status 1 if there is a warning, too.")
    lint.add_argument("--no-weights", action="store_true", help="Read the headers of the weights, not their values.")
    lint.add_argument("--no-load", action="store_true", help="Do not ask transformers.")
    lint.add_argument("--json", metavar="FILE", type=Path, help="Write everything to FILE.")
    lint.set_defaults(run=_run)


def _run(asked: argparse.Namespace) -> int:
    """0 nothing wrong, 1 errors (or, if strict, warnings), 2 wrong usage."""
    from rich.console import Console

    from parity.lint.run import lint, rules

    console, errors = Console(highlight=False), Console(stderr=True, highlight=False, soft_wrap=True)
    if asked.rules:
        _list(console, {name: rule.about for name, rule in rules().items()})
        return 0
    try:
        if asked.folder is None:
            raise ConversionError("expected a folder (or --rules)")
        ignored = [name for given in asked.ignore for name in given.split(",")]
        found = lint(asked.folder, ignore=ignored, weights=not asked.no_weights, loading=not asked.no_load)
        if asked.json is not None:
            asked.json.write_text(json.dumps(found.as_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except (ConversionError, OSError) as error:
        errors.print(f"parity lint: {error}", markup=False)
        return 2
    show(console, found, strict=asked.strict)
    return 0 if found.passed(strict=asked.strict) else 1


def show(console: Console, found: Linted, *, strict: bool = False) -> None:
    """Print what the rules say, the worst first, and one line of counts."""
    from rich.table import Table
    from rich.text import Text

    colours = {"error": "bold red", "warning": "yellow", "note": "dim"}
    if found.remarks:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0))
        for name in ("", "rule", "where", "what"):
            table.add_column(name, no_wrap=name in ("", "rule"), overflow="fold")
        for remark in found.remarks:
            said = Text()
            for word, text in (("expected", remark.expected), ("found", remark.found), ("next", remark.advice)):
                said.append(f"{word:9}", style="dim").append(text).append("\n" if word != "next" else "")
            colour = colours[remark.severity]
            table.add_row(Text(remark.severity, style=colour), Text(remark.rule), Text(remark.where), said)
        console.print(table)
    for name, reason in found.skipped.items():
        console.print(f"not asked: {name}: {reason}", style="dim", markup=False)
    if found.ignored:
        console.print(f"ignored: {', '.join(found.ignored)}", style="dim", markup=False)
    counts = ", ".join(f"{count} {name}{'s' * (count != 1)}" for name in colours if (count := found.count(name)))
    passed = found.passed(strict=strict)
    line = (
        f"{found.folder}: {counts or 'nothing to say'}; {len(found.clean)} rules hold, {len(found.skipped)} not asked"
    )
    console.print(line, style="green" if passed else "bold red", markup=False, soft_wrap=True)


def _list(console: Console, rules: dict[str, str]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, about in rules.items():
        table.add_row(name, about)
    console.print(table)
