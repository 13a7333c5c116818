"""`parity check MODEL` is `pytest --model MODEL`; with `--roundtrip`, files alone are checked."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from parity.options import OPTIONS, add_to_argparse


def add(commands: Any) -> None:
    """Declare `check`."""
    check = commands.add_parser(
        "check",
        allow_abbrev=False,
        help="check a model against its backends",
        usage="%(prog)s MODEL [options] [pytest options, such as -n 2 or -k logits]",
        description="Check a model against its backends, in every case of the matrix that the options span.",
    )
    check.add_argument("model", metavar="MODEL", help=OPTIONS[0].meaning)
    add_to_argparse(check)
    files = check.add_argument_group("files alone")
    files.add_argument(
        "--roundtrip",
        action="store_true",
        help="MODEL is a folder: to Megatron files and back, every byte of every file held to its own, the plan "
        "proved, the config ledger complete, and the result linted; runs no model, and nothing of pytest.",
    )
    files.add_argument("--scratch", metavar="DIR", type=Path, help="Where the copies are made (default: beside MODEL).")
    files.add_argument("--json", metavar="FILE", type=Path, help="Write everything to FILE.")
    files.add_argument("--no-load", action="store_true", help="Do not ask transformers about the result.")
    check.set_defaults(run=_check, takes_rest=True)


def _check(asked: argparse.Namespace) -> int:
    """As `run_pytest`, or of a round trip of files: 0 passed, 1 failed, 4 wrong usage."""
    own = [name for name in ("scratch", "json", "no_load") if getattr(asked, name)]
    given = [f"--{name.replace('_', '-')}" for name in own]
    if not asked.roundtrip and not given:
        return run_pytest(asked)
    wrong = [f"{name} goes with --roundtrip" for name in given if not asked.roundtrip]
    wrong += [f"{name} does not go with --roundtrip, which runs no model" for name in of_models(asked)]
    from parity.commands.roundtrip import run

    return run(asked, wrong)


def of_models(asked: argparse.Namespace) -> list[str]:
    """What was given on the command line that says how models are run, pytest's own options included."""
    given = [f"--{option.name}" for option in OPTIONS[1:] if getattr(asked, option.dest, None) not in (None, False)]
    return [name for name in (*given, *asked.rest) if name not in ("--trust-remote-code", "--against")]


def run_pytest(asked: argparse.Namespace) -> int:
    """Pytest's own exit status: 0 passed, 1 failed, 4 wrong usage, 5 nothing ran."""
    line = ["-p", "parity.plugin", f"--model={asked.model}"]
    for option in OPTIONS[1:]:
        given = getattr(asked, option.dest)
        if given is not None:
            line.append(f"--{option.name}" if option.flag else f"--{option.name}={given}")
    return int(pytest.main([*line, *asked.rest]))
