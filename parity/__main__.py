"""The command `parity`; each subcommand is a module of `parity.commands`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = ("check", "compare", "lint", "certify", "report", "golden", "self_test")
"""Modules of `parity.commands`, in the order of the help text."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status (`check` has pytest's own: 0 passed, 1 failed, 4 wrong usage, 5 nothing ran)."""
    parser = argparse.ArgumentParser(prog="parity", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"parity.commands.{name}").add(commands)
    asked, rest = parser.parse_known_args(arguments)
    if rest and not getattr(asked, "takes_rest", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    asked.rest = rest
    return int(asked.run(asked))


if __name__ == "__main__":
    sys.exit(main())
