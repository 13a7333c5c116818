"""`verify`: whether two checkpoints hold the same model, on the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from typing import TYPE_CHECKING, Any

from converters.commands.sizes import count, natural, size
from converters.errors import ConversionError, listing

if TYPE_CHECKING:
    from converters.files.compare import Comparison, Element
    from converters.files.verify import Verification

TEXT = (
    "compare two checkpoints of any formats, element by element and to the bit: Hugging Face, Megatron and Transformer "
    "Engine, in any files and layouts. All that differs is listed, in the names of B; the exit status is 1 if anything "
    "does, 2 if they cannot be compared. What .distcp and .pt files note as checksums is checked too, but of a sample"
)


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add it."""
    sub = commands.add_parser(
        "verify", help="compare two checkpoints of any formats to the bit", description=TEXT + "."
    )
    sub.set_defaults(command=_verify)
    sub.add_argument("first", metavar="A", help="folder, or hub id")
    sub.add_argument("second", metavar="B", nargs="?", help="folder, or hub id")
    sub.add_argument(
        "--digests",
        metavar="FILE.json",
        help="instead of B: hold A against the digests that a conversion wrote of it with --digests",
    )
    sub.add_argument(
        "--sample",
        nargs="?",
        type=size,
        const=1 << 16,
        metavar="SIZE",
        help="a quick look: about so many bytes of each tensor, of a stacked one of each layer (default: 64KiB)",
    )
    sub.add_argument(
        "--like",
        metavar="SOURCE",
        help="the Hugging Face model that a Megatron checkpoint is of, where it does not say (default: the other one)",
    )
    sub.add_argument(
        "--show", type=natural, default=3, metavar="N", help="elements to show of each tensor (default: 3)"
    )
    sub.add_argument("--json", action="store_true", help="print what was found as JSON")
    sub.add_argument("--workers", type=count, default=2, metavar="N", help="threads (default: 2)")
    sub.add_argument("--quiet", action="store_true", help="print nothing: the exit status tells")


def _verify(options: argparse.Namespace) -> int:
    from converters.files.verify import verify, verify_digests
    from converters.progress import speaks

    if (options.second is None) == (options.digests is None) or (options.digests and options.sample):
        raise ConversionError("expected A and B, or A and --digests FILE.json, which is held against all of A")
    how = {name: getattr(options, name) for name in ("like", "workers", "quiet")}
    if options.digests is not None:
        found = verify_digests(options.first, options.digests, **how)
    else:
        found = verify(options.first, options.second, sample=options.sample, show=options.show, **how)
    if speaks() and options.json:
        print(json.dumps(_account(found), indent=2))
    elif speaks() and not options.quiet:
        _print(found)
    return 0 if found.equal else 1


def _account(found: Verification) -> dict[str, Any]:
    out = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    out |= {"equal": found.equal, "different": [_tensor(each) for each in found.different]}
    return {name: str(value) if name in ("first", "second") else _finite(value) for name, value in out.items()}


def _tensor(found: Comparison) -> dict[str, Any]:
    elements = [
        {"index": list(at.index), "values": [at.made, at.found], "bits": [hex(bits) for bits in at.bits]}
        for at in found.first
    ]
    return {
        "key": found.key,
        "elements": found.elements,
        "differing": found.differing,
        "largest_difference": found.largest,
        "first": elements,
        "faults": list(found.faults),
    }


def _finite(value: Any) -> Any:
    """JSON knows no infinities: they are strings there."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def _print(found: Verification) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 200, soft_wrap=True)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()

    def row(name: str, text: str) -> None:
        table.add_row(name, Text(text))

    row("A", f"{found.first} ({found.columns[0]})")
    row("B", f"{found.second} ({found.columns[1]})")
    part = "a sample: " if found.sampled else ""
    rate = found.bytes / max(found.seconds, 1e-9) / 1e6
    row("compared", f"{part}{found.tensors:,} tensors, {found.elements:,} elements, {found.bytes:,} bytes in "
        f"{found.seconds:.1f} s, {rate:,.0f} MB/s")  # fmt: skip
    if found.constants:
        row("constants", f"{found.constants:,} elements that one side lacks, held against zero")
    for key, why in found.ignored.items():
        row("left out", f"{key} of {found.names}: {why}")
    for side, left in zip("AB", found.left_alone, strict=True):
        for what, why in left.items():
            row("left alone", f"{what} of {side}: {why}")
    for remark in found.remarks:
        row("note", remark)
    if found.nonfinite:
        counts = [f"{key}: {ours:,} in A, {theirs:,} in B" for key, (ours, theirs) in found.nonfinite.items()]
        row("not finite", listing("NaN or infinite elements, of tensors", counts))
    if found.checksums:
        row("checksums", f"{found.checksums:,} records, {len(found.damaged):,} damaged")
    console.print(table)
    if found.equal and found.second.is_file():
        console.print("[bold green]equal[/]  every tensor has the digest that was written of it")
        return
    if found.equal:
        kept = "what was looked at is equal to the bit" if found.sampled else "equal to the bit"
        console.print(f"[bold green]equal[/]  every tensor and every field of the config: {kept}")
        return
    for name, (ours, theirs) in found.config.items():
        console.print(Text(f"config.json: {name} is {ours!r} in A, {theirs!r} in B"))
    if found.damaged:
        console.print(Text(listing("bytes that are not those that were written", found.damaged)))
    if found.different:
        console.print(_differences(found.different))
    console.print(
        f"[bold red]different[/]  {len(found.different):,} tensors and {len(found.config):,} fields of the config"
        + (f", {len(found.damaged):,} records damaged" if found.damaged else "")
    )


def _differences(different: tuple[Comparison, ...]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, justify in (("tensor", "left"), ("differing", "right"), ("of", "right"), ("largest difference", "right")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for name in ("first at", "A", "B"):
        table.add_column(name, overflow="fold")
    for each in different:
        counts = (
            (f"{each.differing:,}", f"{each.elements:,}", f"{each.largest:.6g}") if each.differing else ("", "", "")
        )
        shown = [_shown(at) for at in each.first] or [("", "", "")]
        for number, cells in enumerate(shown):
            lead = (each.key, *counts) if number == 0 else ("", "", "", "")
            table.add_row(*map(Text, (*lead, *cells)))
        for fault in each.faults:
            table.add_row(Text("" if each.differing else each.key), "", "", "", Text(fault))
    return table


def _shown(at: Element) -> tuple[str, str, str]:
    values = zip((at.made, at.found), at.bits, strict=True)
    ours, theirs = (f"{value:.9g} ({bits:#x})" for value, bits in values)
    return str(list(at.index)), ours, theirs
