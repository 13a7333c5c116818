"""The command `parity`: `parity check MODEL` is `pytest --model MODEL` from anywhere, with the same options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import pytest

from parity.options import OPTIONS, add_to_argparse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status (pytest's own for `check`: 0 passed, 1 failed, 4 wrong usage, 5 nothing ran)."""
    parser = argparse.ArgumentParser(prog="parity", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check",
        allow_abbrev=False,
        help="check a model against its backends",
        usage="%(prog)s MODEL [options] [pytest options, such as -n 2 or -k logits]",
        description="Check a model against its backends, in every case of the matrix that the options span.",
    )
    check.add_argument("model", metavar="MODEL", help=OPTIONS[0].meaning)
    add_to_argparse(check)
    asked, rest = parser.parse_known_args(arguments)

    line = ["-p", "parity.plugin", f"--model={asked.model}"]
    for option in OPTIONS[1:]:
        given = getattr(asked, option.dest)
        if given is not None:
            line.append(f"--{option.name}" if option.flag else f"--{option.name}={given}")
    return int(pytest.main([*line, *rest]))


if __name__ == "__main__":
    sys.exit(main())
