"""`python -m converters quantize` and `dequantize`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from converters.commands.sizes import folder

if TYPE_CHECKING:
    from converters.quantized.folder import Progress, Written

FORMATS = ("compressed-tensors", "compressed-tensors-channel", "fine-grained")


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both commands."""
    to = _sub(commands, "quantize", _quantize, "write a checkpoint with its linear layers in FP8")
    to.add_argument("--format", choices=FORMATS, required=True, help="what shares a scale: a tensor, a row, or 128x128")
    to.add_argument("--partial-blocks", action="store_true", help="allow blocks that reach over the edge of a weight")
    back = _sub(commands, "dequantize", _dequantize, "write an FP8 checkpoint as a plain one")
    back.add_argument("--dtype", choices=("bfloat16", "float32"), help="of every tensor (default: the config's)")


def _sub(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    command: Callable[[argparse.Namespace], int],
    text: str,
) -> argparse.ArgumentParser:
    sub = commands.add_parser(name, help=text, description=text)
    sub.set_defaults(command=command)
    sub.add_argument("source", metavar="SOURCE", type=folder, help="the folder to read")
    sub.add_argument("target", metavar="TARGET", type=folder, help="the folder to make")
    sub.add_argument("--overwrite", action="store_true", help="replace TARGET where it exists")
    return sub


def _quantize(options: argparse.Namespace) -> int:
    from converters.quantized.export import quantize

    written = _shown(
        "quantize",
        lambda progress: quantize(
            options.source,
            options.target,
            options.format,
            partial_blocks=options.partial_blocks,
            overwrite=options.overwrite,
            progress=progress,
        ),
    )
    _print(written, options.target)
    return 0


def _dequantize(options: argparse.Namespace) -> int:
    from converters.quantized.restore import dequantize

    written = _shown(
        "dequantize",
        lambda progress: dequantize(
            options.source, options.target, dtype=options.dtype, overwrite=options.overwrite, progress=progress
        ),
    )
    _print(written, options.target)
    return 0


def _shown(what: str, run: Callable[[Progress], list[Written]]) -> list[Written]:
    """Run it under a progress bar, on stderr and only on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(file=sys.stderr), transient=True, disable=not sys.stderr.isatty()) as bars:
        task = bars.add_task(what, total=None)
        return run(lambda done, total: bars.update(task, completed=done, total=total))


def _print(written: list[Written], target: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("what")
    for name in ("tensors", "bytes before", "bytes after", "worst error / bound"):
        table.add_column(name, justify="right")
    groups: dict[str, list[Written]] = {}
    for one in written:
        layer = one.key.split(".")[-2] if one.worst is not None else ""
        groups.setdefault(f"{layer} {one.kind}".strip(), []).append(one)
    for name, group in sorted(groups.items(), key=lambda item: (item[1][0].worst is None, item[0])):
        table.add_row(name, *_sums(group))
    table.add_row("all", *_sums(written), style="bold")
    console = Console(width=None if sys.stdout.isatty() else 160, soft_wrap=True)
    console.print(table)
    tried = [one for one in written if one.idempotent is not None]
    if tried:
        same = sum(bool(one.idempotent) for one in tried)
        console.print(f"quantised again, {same:,} of {len(tried):,} weights have the same codes and scales")
    console.print(f"written to {target}", markup=False)


def _sums(group: Iterable[Written]) -> tuple[str, str, str, str]:
    listed = list(group)
    worst = [one.worst for one in listed if one.worst is not None]
    return (
        f"{len(listed):,}",
        f"{sum(one.before for one in listed):,}",
        f"{sum(one.after for one in listed):,}",
        f"{max(worst):.3f}" if worst else "bits kept" if all(one.kind == "kept" for one in listed) else "-",
    )
