"""`parity compare A B` is `pytest --model A --against B`, or, in formats that transformers does not load, of files."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.commands.sizes import size
from converters.errors import ConversionError
from converters.models import column_of
from converters.sources import read_config
from parity.commands.check import of_models, run_pytest
from parity.options import OPTIONS, add_to_argparse

if TYPE_CHECKING:
    from parity.findings import Measurement

SAMPLE = 1 << 16
HINT = "to have the cause named, export what is not in Hugging Face's format, and compare again"


def add(commands: Any) -> None:
    """Declare `compare`."""
    compare = commands.add_parser(
        "compare",
        allow_abbrev=False,
        help="hold one checkpoint against another",
        usage="%(prog)s A B [options] [pytest options]",
        description="Hold checkpoint B against A: tensors, config, other files, and what the two models compute. Where "
        "one of them is a folder of Megatron or Transformer Engine, tensors, config and other files, to the bit.",
    )
    compare.add_argument("model", metavar="A", help="The checkpoint that is right: " + OPTIONS[0].meaning)
    compare.add_argument("parity_against", metavar="B", help="The checkpoint to hold against it, likewise.")
    add_to_argparse(compare, but=("against",))
    files = compare.add_argument_group("files alone")
    files.add_argument("--files", action="store_true", help="Compare files to the bit and run no model, in any format.")
    files.add_argument(
        "--sample",
        type=size,
        nargs="?",
        const=SAMPLE,
        metavar="SIZE",
        help="Look at so many bytes of each tensor only.",
    )
    files.add_argument("--json", metavar="FILE", type=Path, help="Write everything to FILE.")
    compare.set_defaults(run=_run, takes_rest=True)


def _run(asked: argparse.Namespace) -> int:
    """As `run_pytest`, or of files: 0 equal, 1 different, 4 wrong usage."""
    from rich.console import Console

    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    both = (asked.model, asked.parity_against)
    try:
        others = [name for name in both if not _is_hf(name)]
        if not others and not asked.files:
            if asked.sample or asked.json:
                raise ConversionError("--sample and --json go with files: add --files")
            return run_pytest(asked)
        if wrong := of_models(asked):
            why = f"{others[0]} is not in Hugging Face's format" if others else "--files runs no model"
            raise ConversionError(f"{', '.join(wrong)}: {why}, and only files are compared")
        rows = _rows(*both, sample=asked.sample)
        if asked.json is not None:
            asked.json.write_text(json.dumps([row.as_json() for row in rows], indent=1) + "\n", encoding="utf-8")
    except (ConversionError, OSError) as error:
        errors.print(f"parity compare: {error}", markup=False)
        return 4
    from parity.commands.rows import show

    passed = all(row.passed for row in rows)
    show(Console(highlight=False), rows, "the second is the first" if passed else "they differ")
    if not passed and others:
        errors.print(HINT, style="dim", markup=False)
    return 0 if passed else 1


def _is_hf(name: str) -> bool:
    """Whether this is a checkpoint that transformers loads; what is no folder is a name, and a name is of one."""
    if not Path(name).is_dir():
        return True
    return (Path(name) / "config.json").is_file() and column_of(read_config(name)) == "hf"


def _rows(first: str, second: str, *, sample: int | None) -> list[Measurement]:
    from converters.files.verify import verify
    from parity import verified

    found = verify(first, second, sample=sample, quiet=False)
    tensors, config = verified.rows(found)
    return [replace(tensors, seconds=found.seconds), config, *_others(first, second)]


def _others(first: str, second: str) -> list[Measurement]:
    """The files that are neither config nor weights, where both have them."""
    from converters.artefacts import carried
    from converters.checkpoint import Checkpoint
    from converters.targets import HEADERS
    from parity.findings import Measurement
    from parity.verified import difference

    mine, theirs = (Checkpoint.open(path).artefacts for path in (first, second))
    if mine is None or theirs is None:
        return []
    names = {path for one in (mine, theirs) for path in carried(one, code=True) if path.parts[0] != HEADERS}
    differing = [text for path in sorted(names) if (text := difference(mine, theirs, path))]
    return [Measurement.equal("other files", count=len(names), unit="files", differing=differing)] if names else []
