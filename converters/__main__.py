"""Checkpoints of one model in several formats: Hugging Face, Megatron-Core, Transformer Engine, and FP8.

`import` and `export` bring a Hugging Face folder into a Megatron checkpoint and back, `convert` writes a folder in any
other format, `reshard` writes it in other files, and `verify` compares two. `quantize` and `dequantize` write one in
FP8 and back. `plan` and `explain` say what a conversion does, from configs alone.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from converters.commands import folders, verify
from converters.errors import ConversionError, PlanError, TopologyError
from converters.models import Family, family_of
from converters.plan import Plan
from converters.proof import Proof
from converters.quantized import commands as quantized
from converters.sources import read_config
from converters.topology import Mesh, Topology

ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
T = TypeVar("T")
COLUMNS = ("hf", "megatron", "megatron_local", "megatron_dist", "te")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 when a plan does not hold, 2 when the question cannot be answered."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except PlanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m converters", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, text in (
        ("plan", _plan, "prove that a conversion moves every element exactly once, on every rank"),
        ("explain", _explain, "show what one tensor is made of"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        sub.add_argument("--model", required=True, help="hub id, folder, or the name of a packaged config")
        sub.add_argument("--revision", help="branch, tag or commit on the hub")
        sub.add_argument("--from", dest="source", choices=COLUMNS, default="hf", help="format to read (default: hf)")
        sub.add_argument("--to", choices=COLUMNS, default="megatron", help="format to write (default: megatron)")
        mesh = sub.add_argument_group("parallel layout of the Megatron or TE side")
        for dim, what in (
            ("tp", "tensor-parallel size"),
            ("pp", "pipeline stages"),
            ("vpp", "model chunks a stage"),
            ("cp", "context-parallel size"),
            ("dp", "data-parallel size"),
        ):
            mesh.add_argument(f"--{dim}", type=int, default=1, help=what)
        mesh.add_argument("--first-stage-layers", type=int, help="layers on the first stage")
        mesh.add_argument("--last-stage-layers", type=int, help="layers on the last stage")
        mesh.add_argument("--account-for-embedding", action="store_true", help="count the embedding as a layer")
        mesh.add_argument("--account-for-loss", action="store_true", help="count the output layer as a layer")
        mesh.add_argument(
            "--make-vocab-size-divisible-by", type=_positive, default=1, metavar="N", help="of each rank's part"
        )
        if name == "plan":
            sub.add_argument("--json", action="store_true", help="print the proof as JSON")
        else:
            sub.add_argument("key", help="a tensor of either side, or one element of it: 'lm_head.weight[3, 5]'")
            sub.add_argument("--rank", type=int, help="as held by this global rank (default: whole tensors)")
            sub.add_argument("--chunk", type=int, default=0, help="model chunk of that rank")
    folders.register(commands)
    verify.register(commands)
    quantized.register(commands)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {value}")
    return value


def _compiled(options: argparse.Namespace) -> tuple[dict[str, Any], Family, Topology, Plan]:
    config = read_config(options.model, revision=options.revision)
    family = family_of(config)
    config = family.hf_config(config)
    hf = family.fields.to_megatron(config).hf
    if "te" in (options.source, options.to) and (options.pp, options.vpp) != (1, 1):
        raise TopologyError(
            f"--pp {options.pp} --vpp {options.vpp}: a model on Transformer Engine's layers has no pipeline stages; "
            "cut it with --tp, or plan between hf and megatron"
        )
    topology = Topology(
        tp=options.tp,
        pp=options.pp,
        vpp=options.vpp,
        cp=options.cp,
        dp=options.dp,
        first_stage_layers=options.first_stage_layers,
        last_stage_layers=options.last_stage_layers,
        count_embedding=options.account_for_embedding,
        count_loss=options.account_for_loss,
    ).evenly(hf["num_hidden_layers"])
    multiple = options.make_vocab_size_divisible_by * options.tp
    padded = math.ceil(hf["vocab_size"] / multiple) * multiple
    groups = topology.query_groups(hf["num_key_value_heads"], hf["num_attention_heads"] // hf["num_key_value_heads"])
    if "te" in (options.source, options.to):
        groups = topology.whole_query_groups(hf["num_key_value_heads"])
    plan = family.plan(options.source, options.to, config, padded_vocab_size=padded, padded_query_groups=groups)
    return dict(hf), family, topology, plan


def _sides(options: argparse.Namespace, topology: Topology) -> dict[str, Topology]:
    """The mesh, on the side or sides that are cut over ranks."""
    sides = {"source": options.source, "target": options.to}
    return {side: topology for side, column in sides.items() if column != "hf"}


def _plan(options: argparse.Namespace) -> int:
    if options.source == options.to == "hf":
        raise ConversionError("--from hf --to hf moves nothing: there is one layout of it")
    hf, _, topology, plan = _compiled(options)
    proof = plan.prove(**_sides(options, topology))
    placement = _placement(options, topology, hf["num_hidden_layers"])
    itemsize = ITEMSIZE[hf["dtype"]]
    if options.json:
        account = proof.as_dict() | {
            "model": options.model,
            "topology": str(topology),
            "placement": placement,
            "ghost_query_groups": plan.sizes["ghost"],
            "dtype": hf["dtype"],
            "bytes": proof.elements * itemsize,
            "rank_bytes": [count * itemsize for count in proof.rank_elements],
        }
        print(json.dumps(account, indent=2))
    else:
        _print(options.model, hf, topology, placement, plan.sizes["ghost"], proof, itemsize)
    return 0 if proof.holds else 1


def _placement(options: argparse.Namespace, topology: Topology, layers: int) -> str:
    counts = [chunk.stop - chunk.start for chunk in topology.placement(layers)]
    spread = f"{counts[0]}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    text = f"{layers} layers in {len(counts)} chunk{'s' * (len(counts) > 1)}, {spread} in each"
    chosen = [
        name
        for name, counted, asked in (
            ("the embedding", topology.count_embedding, options.account_for_embedding),
            ("the loss", topology.count_loss, options.account_for_loss),
        )
        if counted and not asked
    ]
    if chosen:
        text += f"; they divide evenly only with {' and '.join(chosen)} counted as a layer{' each' * (len(chosen) > 1)}"
    return text


def _print(
    model: str, hf: dict[str, Any], topology: Topology, placement: str, ghosts: int, proof: Proof, itemsize: int
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    table.add_row("model", f"{model}, {proof.elements:,} parameters, {hf['dtype']}")
    table.add_row("ranks", f"{topology.world_size} ({topology})")
    table.add_row("placement", placement)
    if ghosts:
        many = "group of zeros is" if ghosts == 1 else "groups of zeros are"
        table.add_row("heads", f"they do not divide over tp={topology.tp}: {ghosts} key-value {many} added (exact)")
    table.add_row("tensors", f"{proof.source_tensors:,} {proof.source} -> {proof.target_tensors:,} {proof.target}")
    low, high = min(proof.rank_elements) * itemsize, max(proof.rank_elements) * itemsize
    table.add_row("bytes a rank", f"{low:,}" if low == high else f"{low:,} to {high:,}")
    for name, found, what in (
        ("padding", proof.padding, "constant elements, written"),
        ("constants", proof.constants, "constant elements, verified"),
        ("tied", proof.tied, "elements, a second copy"),
    ):
        for key, counts in _alike(found).items():
            each = f"{len(counts)} x " if len(counts) > 1 and len(set(counts)) == 1 else ""
            if sum(counts):
                table.add_row(name, f"{key}: {each}{counts[0] if each else sum(counts):,} {what}")
    for name, reasons in (("dropped", proof.dropped), ("not made", proof.lost)):
        for key, why in _alike(reasons).items():
            table.add_row(name, f"{key}: {why[0]}" + (f" ({len(why)} tensors)" if len(why) > 1 else ""))
    console = Console(width=None if sys.stdout.isatty() else 160, soft_wrap=True)
    console.print(table)
    if proof.holds:
        console.print(
            "[bold green]proved[/]  every element of every tensor is written exactly once, "
            "and read exactly once, on every rank"
        )
    else:
        console.print(f"[bold red]does not hold[/]  {len(proof.faults)} faults")
        for fault in proof.faults:
            console.print(f"  {fault}", markup=False)


def _alike(found: Mapping[str, T]) -> dict[str, list[T]]:
    """The values of keys that differ in numbers only, by the key with a star for each number."""
    grouped: dict[str, list[T]] = {}
    for key, value in found.items():
        grouped.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", key), []).append(value)
    return grouped


def _explain(options: argparse.Namespace) -> int:
    _, _, topology, plan = _compiled(options)
    match = re.fullmatch(r"(?P<key>[^\[\]]+)(?:\[(?P<index>\d+(?:\s*,\s*\d+)*)\])?", options.key)
    if match is None:
        raise ConversionError(f"expected KEY or KEY[i, j], found {options.key!r}")
    if options.rank is not None:
        mesh = Mesh(topology, replace(topology.coord(options.rank), chunk=options.chunk))
        plan = plan.restrict(**dict.fromkeys(_sides(options, topology), mesh))
    key = match["key"]
    if key not in plan.target_tensors and key in plan.source_tensors:
        plan = plan.inverse()
    pieces = plan.explain(key)
    shape = plan.target_tensors[key]
    if match["index"] is None:
        print(f"{key} {list(shape)}: offsets and strides in elements")
        for piece in pieces:
            print(f"  {piece}")
        return 0
    index = tuple(int(part) for part in match["index"].split(","))
    if len(index) != len(shape) or any(at >= extent for at, extent in zip(index, shape, strict=True)):
        raise ConversionError(f"{key} has shape {list(shape)}, and no element {list(index)}")
    position = 0
    for at, extent in zip(index, shape, strict=True):
        position = position * extent + at
    origin = plan.origin(key, position)
    if isinstance(origin, tuple):
        print(f"{key}{list(index)} <- {origin[0]}{_unravel(origin[1], plan.source_tensors[origin[0]])}")
    else:
        print(f"{key}{list(index)} = {origin:g}")
    return 0


def _unravel(position: int, shape: tuple[int, ...]) -> list[int]:
    index: list[int] = []
    for extent in reversed(shape):
        position, at = divmod(position, extent)
        index.insert(0, at)
    return index


if __name__ == "__main__":
    sys.exit(main())
