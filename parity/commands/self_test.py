"""`parity self-test` injects every fault that is known into a conversion, and says which checks see it."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from converters.errors import ConversionError

RIGHTLY, ENOUGH = 0.9, 50
"""The share of causes to be named rightly unless another is asked for, of at least so many variants: of a few faults,
one is a large share."""


def add(commands: Any) -> None:
    """Declare `self-test`."""
    command = commands.add_parser(
        "self-test",
        allow_abbrev=False,
        help="inject faults, and see which checks find them",
        description="Inject each fault of the catalogue into an honest conversion, on import, on export and in both, "
        "in all layers and in one, and run the checks. Fails if a fault survives every check, or a clean run is "
        "flagged.",
    )
    command.add_argument("--model", metavar="MODEL", help="The model to do it on (default: packaged tiny ones).")
    command.add_argument("--size", choices=("tiny", "full"), default="tiny", help="Of MODEL (default: tiny).")
    command.add_argument(
        "--fault", metavar="GLOB", default="*", help="Faults by name, or FAMILY:NAME (default: all). 'list' lists them."
    )
    command.add_argument("--converter", metavar="NAME", help="The converter to make faulty (default: llama-parity).")
    command.add_argument("--json", metavar="FILE", type=Path, help="Write every verdict to FILE.")
    command.add_argument("--seeds", metavar="N", type=int, default=7, help="Clean runs, each of its own (default: 7).")
    command.add_argument(
        "--full", action="store_true", help="Every fault in every layout, and slow checks for every fault."
    )
    command.add_argument(
        "--require-diagnosis",
        metavar="SHARE",
        type=float,
        help=f"Fail if fewer of the diagnosed variants are named rightly (default: {RIGHTLY:g}, where {ENOUGH} or more "
        "are diagnosed).",
    )
    command.set_defaults(run=_run)


def _run(asked: argparse.Namespace) -> int:
    """0 every fault was seen and no clean run flagged, 1 otherwise, 2 wrong usage."""
    from parity.checks.bench import Shared
    from parity.converter import OWN, Named, require
    from parity.faults.catalogue import NOT_YET
    from parity.ranks import Zygote
    from parity.selftest import report as selftest_report
    from parity.selftest import run as selftest
    from parity.selftest.batch import MODULES
    from parity.selftest.models import of_model, packaged

    errors, console = Console(stderr=True, highlight=False, soft_wrap=True), Console(highlight=False, soft_wrap=True)
    if asked.fault == "list":
        for fault in selftest.selected("*"):
            console.print(f"{fault.family}:{fault.name}  ({fault.source})", markup=False)
        for name, reason in NOT_YET:
            console.print(f"not yet: {name}: {reason}", markup=False)
        return 0
    try:
        require(asked.converter or OWN)
        stock = of_model(asked.model, size=asked.size) if asked.model else packaged()
        if asked.seeds < 0:
            raise ConversionError(f"--seeds: expected a whole number of at least 0, found {asked.seeds}")
        if not selftest.selected(asked.fault):
            raise ConversionError(f"--fault {asked.fault!r} selects nothing; `--fault list` lists the names")
    except ConversionError as error:
        errors.print(f"parity self-test: {error}", markup=False)
        return 2
    since = time.perf_counter()
    with Zygote(preload=MODULES) as zygote, Zygote(preload=MODULES) as second:
        shared = Shared(zygote=zygote)
        text, left = TextColumn("{task.description}"), TextColumn("left", style="dim")
        columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), left)
        named = Named(asked.converter or OWN)
        try:
            test = selftest.SelfTest(shared, stock=stock, converter=named, full=asked.full, beside=(second,))
            if named.name != OWN:
                test.stock, unusable = selftest.usable(test)
                for bed, reason in unusable.items():
                    console.print(f"left out: {bed}: {named.name} cannot do it: {reason}", style="yellow", markup=False)
                if not test.stock.beds:
                    errors.print(f"parity self-test: {named.name} can do none of the models and layouts", markup=False)
                    return 2
            stock = test.stock
            wanted = selftest.variants(asked.fault, stock=stock, seeds=asked.seeds, full=asked.full)
            with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
                task = progress.add_task("variants", total=len(wanted))
                outcomes = test.run(wanted, lambda done, of: progress.update(task, completed=done, total=of))
        finally:
            shared.close()
    seconds = time.perf_counter() - since
    result = selftest_report.result(outcomes, asked.fault, stock, converter=asked.converter or OWN, seconds=seconds)
    selftest_report.show(console, outcomes, result)
    if asked.json is not None:
        try:
            selftest_report.write(asked.json, result)
        except OSError as error:
            errors.print(f"parity self-test: --json {asked.json}: {error}", markup=False)
            return 2
    summary = result["summary"]
    share = summary["diagnosed_rightly"] / summary["diagnosed"] if summary["diagnosed"] else 0.0
    wished = RIGHTLY if summary["diagnosed"] >= ENOUGH else 0.0
    required = wished if asked.require_diagnosis is None else asked.require_diagnosis
    if required > share:
        errors.print(f"diagnosis: {share:.1%} named rightly, {required:.0%} asked for", markup=False)
        return 1
    sys.stdout.flush()
    return 0 if summary["passed"] else 1
