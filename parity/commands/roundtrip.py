"""`parity check --roundtrip DIR`: what `parity.roundtrip` finds, as a table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import ConversionError
from parity.commands.rows import show

if TYPE_CHECKING:
    from rich.console import Console

    from parity.roundtrip import RoundTrip


def run(asked: argparse.Namespace, wrong: Sequence[str] = ()) -> int:
    """0 passed, 1 failed, 4 wrong usage.

    Args:
        asked: `model`, `scratch`, `json`, `no_load`, `parity_trust_remote_code`.
        wrong: What is wrong with the command line, if anything.
    """
    from rich.console import Console

    from parity.roundtrip import round_trip

    console, errors = Console(highlight=False), Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        if wrong:
            raise ConversionError("; ".join(wrong))
        found = round_trip(
            Path(asked.model),
            scratch=asked.scratch,
            loading=not asked.no_load,
            quiet=False,
            code=bool(asked.parity_trust_remote_code),
            say=lambda text: console.print(text, style="dim", markup=False),
        )
        if asked.json is not None:
            asked.json.write_text(json.dumps(found.as_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except (ConversionError, OSError) as error:
        errors.print(f"parity check --roundtrip: {error}", markup=False)
        return 4
    _show(console, found)
    return 0 if found.passed else 1


def _show(console: Console, found: RoundTrip) -> None:
    failed = sum(not row.passed for row in found.rows)
    said = f"{len(found.rows)} checks: all passed" if not failed else f"{failed} of {len(found.rows)} checks failed"
    for name, why in found.left.items():
        console.print(f"not taken along: {name}: {why}", style="yellow", markup=False, soft_wrap=True)
    if mild := [remark.rule for remark in found.remarks if remark.severity == "warning"]:
        text = f"lint warns: {', '.join(mild)} (parity lint {found.folder})"
        console.print(text, style="yellow", markup=False, soft_wrap=True)
    show(console, found.rows, f"{found.folder.name}, to Megatron files and back: {said}")
