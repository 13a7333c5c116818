"""`parity report diff A.json B.json` and `parity report render A.json -o out.html`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from parity.report.files import ReportError, load, write


def add(commands: Any) -> None:
    """Declare `report` and what it can do."""
    report = commands.add_parser("report", allow_abbrev=False, help="compare the reports of two runs, or draw one")
    actions = report.add_subparsers(dest="action", required=True, metavar="ACTION")

    diff = actions.add_parser(
        "diff",
        allow_abbrev=False,
        help="what changed between two runs",
        description="What changed between two runs. Exit status 1 if something that passed fails now, or is gone.",
    )
    diff.add_argument("before", type=Path, metavar="A.json", help="The report of the earlier run.")
    diff.add_argument("after", type=Path, metavar="B.json", help="The report of the later run.")
    diff.add_argument("--json", action="store_true", help="Print the difference as JSON.")
    diff.set_defaults(run=_diff)

    render = actions.add_parser("render", allow_abbrev=False, help="write a report in JSON as HTML or Markdown")
    render.add_argument("report", type=Path, metavar="A.json", help="The report of a run.")
    render.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="Ends in .html, .md or .json.")
    render.add_argument("--self-test", type=Path, metavar="FILE", help="The JSON of a self-test, to show its matrix.")
    render.set_defaults(run=_render)


def _diff(asked: argparse.Namespace) -> int:
    from parity.report.diff import as_text, difference

    try:
        found = difference(load(asked.before), load(asked.after))
    except ReportError as error:
        return _wrong(error)
    print(json.dumps(found.as_json(), indent=1, allow_nan=False) if asked.json else as_text(found))
    return 1 if found.worse else 0


def _render(asked: argparse.Namespace) -> int:
    from parity.options import SUFFIXES

    try:
        if asked.output.suffix not in SUFFIXES:
            raise ReportError(f"{asked.output}: expected a file that ends in {', '.join(SUFFIXES)}")
        record = load(asked.report)
        if asked.self_test is not None:
            record["self_test"] = _self_test(asked.self_test)
        write(asked.output, record)
    except ReportError as error:
        return _wrong(error)
    print(f"parity: report written to {asked.output}")
    return 0


def _self_test(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: expected the JSON of a self-test: {error}") from error
    if not isinstance(found, dict):
        raise ReportError(f"{path}: expected the JSON of a self-test, found {type(found).__name__}")
    return found


def _wrong(error: ReportError) -> int:
    print(f"parity report: {error}", file=sys.stderr)
    return 2
