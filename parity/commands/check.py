"""`parity check MODEL` is `pytest --model MODEL`, and `parity compare A B` is `pytest --model A --against B`."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from parity.options import OPTIONS, add_to_argparse


def add(commands: Any) -> None:
    """Declare `check` and `compare`."""
    check = commands.add_parser(
        "check",
        allow_abbrev=False,
        help="check a model against its backends",
        usage="%(prog)s MODEL [options] [pytest options, such as -n 2 or -k logits]",
        description="Check a model against its backends, in every case of the matrix that the options span.",
    )
    check.add_argument("model", metavar="MODEL", help=OPTIONS[0].meaning)
    add_to_argparse(check)
    check.set_defaults(run=_pytest, takes_rest=True)

    compare = commands.add_parser(
        "compare",
        allow_abbrev=False,
        help="hold one checkpoint against another",
        usage="%(prog)s A B [options] [pytest options]",
        description="Hold checkpoint B against A: tensors, config, other files, and what the two models compute.",
    )
    compare.add_argument("model", metavar="A", help="The checkpoint that is right: " + OPTIONS[0].meaning)
    compare.add_argument("parity_against", metavar="B", help="The checkpoint to hold against it, likewise.")
    add_to_argparse(compare, but=("against",))
    compare.set_defaults(run=_pytest, takes_rest=True)


def _pytest(asked: argparse.Namespace) -> int:
    """Pytest's own exit status: 0 passed, 1 failed, 4 wrong usage, 5 nothing ran."""
    line = ["-p", "parity.plugin", f"--model={asked.model}"]
    for option in OPTIONS[1:]:
        given = getattr(asked, option.dest)
        if given is not None:
            line.append(f"--{option.name}" if option.flag else f"--{option.name}={given}")
    return int(pytest.main([*line, *asked.rest]))
