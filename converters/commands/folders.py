"""`import`, `export`, `convert` and `reshard`: a checkpoint folder into another, on the command line."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from typing import Any

from converters.commands.sizes import count, size
from converters.errors import ConversionError

COLUMNS = ("hf", "te", "megatron")
DTYPES = ("float32", "bfloat16", "float16")
Parser = argparse.ArgumentParser
IMPORT = (
    "write a Hugging Face checkpoint as a Megatron one (torch_dist), file to file: Megatron-LM and Megatron-Bridge "
    "load it at any parallel layout. Config, tokenizer and the like are kept in it, and come back with an export"
)
EXPORT = (
    "write a Megatron checkpoint (torch_dist or legacy mp_rank_XX files, of any parallel layout) as a Hugging Face "
    "one. Config, tokenizer and the like are those that the checkpoint carries, or those of --like"
)
CONVERT = "convert a checkpoint folder, every bit of every weight (without --dtype) and every other file kept"
RESHARD = (
    "write a checkpoint in the format that it is in, in other files: Hugging Face shards of another size, Megatron "
    "layers stacked or each by itself, legacy Megatron as torch_dist, or in the layout that older Megatron-Core reads"
)


def register(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the four."""
    sub = _sub(commands, "import", _import, IMPORT)
    sub.add_argument("--hf", required=True, metavar="SOURCE", help="folder, or hub id")
    sub.add_argument("--megatron", required=True, metavar="TARGET", help="folder to make")
    sub.add_argument("--revision", help="branch, tag or commit on the hub")
    _megatron_target(sub)
    _dtype(sub)
    _how(sub)

    sub = _sub(commands, "export", _export, EXPORT)
    sub.add_argument(
        "--megatron", required=True, metavar="SOURCE", help="folder of the checkpoint, or of one iteration"
    )
    sub.add_argument("--hf", required=True, metavar="TARGET", help="folder to make")
    _megatron_source(sub)
    _hf_target(sub)
    _dtype(sub)
    _how(sub)

    sub = _sub(commands, "convert", _convert, CONVERT)
    sub.add_argument("--from", dest="source_column", choices=COLUMNS, help="format to read (default: what it is)")
    sub.add_argument("--to", dest="target_column", choices=COLUMNS, required=True, help="format to write")
    _places(sub)
    _megatron_source(sub)
    _megatron_target(sub)
    _hf_target(sub)
    sub.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="with --to te, a field of its config: attn_input_format=bshd (a VALUE that reads as JSON is JSON)",
    )
    _dtype(sub)
    _how(sub)

    sub = _sub(commands, "reshard", _reshard, RESHARD)
    _places(sub)
    _megatron_source(sub)
    _megatron_target(sub)
    _hf_target(sub)
    _how(sub)


def _sub(
    commands: argparse._SubParsersAction[Parser], name: str, command: Callable[[argparse.Namespace], int], text: str
) -> Parser:
    sub = commands.add_parser(name, help=text.partition(":")[0].partition("(")[0].strip(" ,"), description=text + ".")
    sub.set_defaults(command=command)
    return sub


def _places(sub: Parser) -> None:
    sub.add_argument("source", metavar="SOURCE", help="folder, or hub id")
    sub.add_argument("target", metavar="TARGET", help="folder to make")


def _megatron_source(sub: Parser) -> None:
    group = sub.add_argument_group("a Megatron source")
    group.add_argument(
        "--iteration",
        type=_iteration,
        metavar="N",
        help="which one, a number or `release` (default: the one that its tracker names)",
    )
    group.add_argument(
        "--like",
        metavar="SOURCE",
        help="the Hugging Face model that it is of, folder or hub id: for config, tokenizer and how tensors lie in "
        "files, where the checkpoint does not carry them or others are wanted",
    )


def _megatron_target(sub: Parser) -> None:
    group = sub.add_argument_group("a Megatron target")
    style = group.add_mutually_exclusive_group()
    style.add_argument(
        "--per-layer",
        dest="stacked",
        action="store_const",
        const=False,
        help="a tensor for each layer, as Megatron-Core writes with hetereogenous_dist_checkpoint",
    )
    style.add_argument("--stacked", action="store_const", const=True, help="all layers stacked in one tensor (default)")
    group.add_argument("--padded-vocab-size", type=count, metavar="ROWS", help="of the embedding (default: no padding)")
    group.add_argument(
        "--make-vocab-size-divisible-by",
        type=count,
        metavar="N",
        help="pad the embedding as Megatron-LM does with this option: to a multiple of N times --tp",
    )
    group.add_argument(
        "--tp",
        type=count,
        default=1,
        help="ranks to pad for: the embedding with the option above, and heads that do not divide over them with "
        "groups of zeros, which is exact; what needs no padding loads at any layout",
    )
    group.add_argument(
        "--layers",
        choices=("te", "local"),
        help="whose layers will load it: Transformer Engine's (default), or Megatron-Core's local ones, which refuse "
        "the one state more that the others demand, where the loader is strict",
    )


def _hf_target(sub: Parser) -> None:
    group = sub.add_argument_group("a Hugging Face or Transformer Engine target")
    group.add_argument(
        "--max-shard-size",
        type=size,
        metavar="SIZE",
        help="most bytes of tensors in a file, as 2GB (default: the files of the source, or 5GB)",
    )


def _dtype(sub: Parser) -> None:
    sub.add_argument("--dtype", choices=DTYPES, help="round every tensor to it (default: each keeps its own)")


def _how(sub: Parser) -> None:
    sub.add_argument("--overwrite", action="store_true", help="replace TARGET where it exists")
    sub.add_argument(
        "--resume", action="store_true", help="finish what an interrupted run has left; what it wrote is checked first"
    )
    sub.add_argument("--digests", metavar="FILE.json", help="write a digest of every tensor of the target to FILE")
    sub.add_argument(
        "--check-source",
        action="store_true",
        help="first hold all of SOURCE against the checksums that .distcp and .pt files note, and refuse what differs",
    )
    sub.add_argument("--workers", type=count, metavar="N", help="threads that write (default: 2)")
    sub.add_argument("--quiet", action="store_true", help="print nothing but errors")
    sub.add_argument("--trust-remote-code", action="store_true", help="take Python files over too")


def _import(options: argparse.Namespace) -> int:
    return _run(options, options.hf, options.megatron, source_column="hf", target_column="megatron")


def _export(options: argparse.Namespace) -> int:
    return _run(options, options.megatron, options.hf, source_column="megatron", target_column="hf")


def _convert(options: argparse.Namespace) -> int:
    chosen = {"source_column": options.source_column, "target_column": options.target_column}
    return _run(options, options.source, options.target, options=dict(map(_option, options.option)), **chosen)


def _reshard(options: argparse.Namespace) -> int:
    return _run(options, options.source, options.target, target_column=None)


SHARED = (
    "dtype",
    "overwrite",
    "resume",
    "quiet",
    "trust_remote_code",
    "revision",
    "like",
    "iteration",
    "stacked",
    "padded_vocab_size",
    "make_vocab_size_divisible_by",
    "tp",
    "layers",
    "max_shard_size",
    "digests",
    "workers",
    "check_source",
)
"""Options that are parameters of `convert_folder` by the same name; each command has some of them."""


def _run(asked: argparse.Namespace, source: str, target: str, /, **chosen: Any) -> int:
    from converters.convert import convert_folder
    from converters.progress import speaks

    given = {name: getattr(asked, name) for name in SHARED if hasattr(asked, name)}
    done = convert_folder(source, target, **given, **chosen)
    if not asked.quiet and speaks():
        from converters.commands.account import print_account

        print_account(done, asked.digests)
    return 0


def _iteration(text: str) -> int | str:
    if text != "release" and not re.fullmatch(r"[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"expected a number from 0 on, or `release`, found {text!r}")
    return text if text == "release" else int(text)


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConversionError(f"--option {text!r}: expected NAME=VALUE, as in attn_input_format=bshd")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
