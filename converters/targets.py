"""What a conversion will write, known in full before a byte moves: tensors, files, config, and the plans."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters import artefacts
from converters.checkpoint import HF_LIKE, Checkpoint
from converters.errors import CheckpointError, ConversionError, listing
from converters.files import megatron_folder, safetensors
from converters.files.dcp import DcpFiles
from converters.files.extents import FolderLayout
from converters.files.links import check_inside
from converters.files.megatron_folder import Layers
from converters.files.safetensors import Pattern
from converters.plan import Plan
from converters.tensors import FLOATS, TensorInfo, check_tensors
from converters.topology import Topology

if TYPE_CHECKING:
    from converters.files.gather import Part

STYLES = {True: "megatron_dist", False: "megatron"}
"""Columns of Megatron folders: layers stacked, or a tensor for each."""
HEADERS = "safetensors-headers"
"""Where a Megatron checkpoint keeps how the files of its Hugging Face model were laid out."""
LARGE = 1 << 24
"""Bytes of a file from which on it is copied in pieces and never held whole."""
MEGATRON_FILES = ("metadata.json", "run_config.yaml")
"""Of Megatron's own files those that would be taken for a model's, where both lie in one folder."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A folder to be.

    Attributes:
        column: Of its tensors, in the family's table.
        parts: What fills it.
        infos: Shape and dtype of its tensors.
        layout: Its files.
        carried: The files taken over byte for byte.
        notices: What the config says of dtypes, and the tensors do not.
    """

    column: str
    parts: Sequence[Part]
    infos: Mapping[str, TensorInfo]
    layout: FolderLayout
    carried: tuple[Path, ...]
    notices: tuple[str, ...] = ()


def lay_out(
    checkpoint: Checkpoint,
    kind: str,
    *,
    dtype: str | None = None,
    options: Mapping[str, Any] | None = None,
    code: bool = False,
    stacked: bool | None = None,
    padded_vocab_size: int | None = None,
    make_vocab_size_divisible_by: int | None = None,
    tp: int = 1,
    layers: Layers | None = None,
    max_shard_size: int | None = None,
) -> Target:
    """The folder that a conversion of `checkpoint` makes; see `converters.convert.convert_folder`.

    Args:
        checkpoint: The source.
        kind: `hf`, `te` or `megatron`.
        dtype: Of every tensor; by default each keeps its own.
        options: For `te`, fields of its config.
        code: Carry Python files too.
        stacked: For `megatron`.
        padded_vocab_size: For `megatron`.
        make_vocab_size_divisible_by: For `megatron`.
        tp: For `megatron`.
        layers: For `megatron`.
        max_shard_size: For `hf` and `te`.

    Raises:
        ConversionError: Options that the target does not have, a model that it cannot be, or tensors that are not
            what the config promises.
    """
    _check_options(
        kind,
        {
            "stacked": stacked,
            "padded_vocab_size": padded_vocab_size,
            "make_vocab_size_divisible_by": make_vocab_size_divisible_by,
            "layers": layers,
            "max_shard_size": max_shard_size,
        },
    )
    for name, value in {
        "padded_vocab_size": padded_vocab_size,
        "make_vocab_size_divisible_by": make_vocab_size_divisible_by,
        "tp": tp,
        "max_shard_size": max_shard_size,
    }.items():
        if value is not None and value < 1:
            raise ConversionError(f"{name}={value!r}, expected 1 or more")
    text = _config(checkpoint, kind if kind in HF_LIKE else "hf", options, dtype)
    padding: dict[str, int] = {}
    if kind == "megatron":
        padding = _padding(checkpoint, padded_vocab_size, make_vocab_size_divisible_by, tp)
        if stacked is None:
            stacked = not (checkpoint.column == "megatron" and isinstance(checkpoint.files, DcpFiles))
    elif tp != 1:
        raise ConversionError(f"a target in the {kind!r} column has no padding for tp={tp}")
    column = kind if kind in HF_LIKE else STYLES[stacked is not False]
    kept = _kept(checkpoint) if kind == "hf" else None
    parts = checkpoint.parts(column, padding, _copies(checkpoint, kept))
    for plan, files in parts:
        check_tensors(plan.source_tensors, files.tensors(), str(checkpoint.folder))
    infos = _infos(parts, dtype)
    carried = _carried(checkpoint, code=code)
    origins = {path: _artefacts(checkpoint) / path for path in carried}
    large = {path: origin for path, origin in origins.items() if origin.stat().st_size > LARGE}
    sidecars = {path: origin.read_bytes() for path, origin in origins.items() if path not in large}
    sidecars[Path("config.json")] = text.encode()
    if kind in HF_LIKE:
        like = kept or _like(checkpoint, kind, [plan for plan, _ in parts])
        layout = safetensors.lay_out(infos, like=like, max_shard_bytes=max_shard_size, sidecars=sidecars)
    else:
        settings = checkpoint.family.fields.to_megatron(json.loads(text)).megatron
        layout = _megatron(
            checkpoint, {**settings, **padding}, infos, sidecars, stacked=column == STYLES[True], layers=layers or "te"
        )
    beside = min((path for path in layout.small if path.name == "config.json"), key=lambda path: len(path.parts)).parent
    layout = replace(layout, copied={beside / path: origin for path, origin in large.items()})
    notices = () if dtype is not None else _other_dtypes(checkpoint, parts)
    return Target(column=column, parts=parts, infos=infos, layout=layout, carried=carried, notices=notices)


def _check_options(kind: str, given: Mapping[str, Any]) -> None:
    own = {"max_shard_size"} if kind in HF_LIKE else set(given) - {"max_shard_size"}
    wrong = [name for name, value in given.items() if value is not None and name not in own]
    if wrong:
        raise ConversionError(f"a target in the {kind!r} column has no {' and no '.join(wrong)}")


def _config(checkpoint: Checkpoint, column: str, options: Mapping[str, Any] | None, dtype: str | None) -> str:
    text = checkpoint.config_text(column, options)
    if dtype in (None, checkpoint.hf["dtype"]):
        return text
    return artefacts.patched(json.loads(text), {"dtype": dtype}, {"dtype": ("dtype", "torch_dtype")})


def _padding(checkpoint: Checkpoint, rows: int | None, multiple: int | None, tp: int) -> dict[str, int]:
    vocabulary = int(checkpoint.hf["vocab_size"])
    if rows is not None and multiple is not None:
        raise ConversionError("padded_vocab_size and make_vocab_size_divisible_by say the same: pass one of them")
    if multiple is not None:
        rows = math.ceil(vocabulary / (multiple * tp)) * multiple * tp
    heads, groups = int(checkpoint.hf["num_attention_heads"]), int(checkpoint.hf["num_key_value_heads"])
    padded = Topology(tp=tp).query_groups(groups, heads // groups)
    if rows is not None and rows < vocabulary:
        raise ConversionError(f"padded_vocab_size={rows}, and the vocabulary has {vocabulary} rows: none may be lost")
    asked = ({} if rows is None else {"padded_vocab_size": rows}) | (
        {} if padded == groups else {"padded_query_groups": padded}
    )
    return {**checkpoint.padding, **asked}


def _infos(parts: Sequence[Part], dtype: str | None) -> dict[str, TensorInfo]:
    """Shape and dtype of each target tensor.

    Raises:
        CheckpointError: One tensor is made of several dtypes, and none was asked for; or of integers.
    """
    dtypes: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    mixed: set[str] = set()
    wrong: set[str] = set()
    for plan, files in parts:
        held = files.tensors()
        shapes |= plan.target_tensors
        for copy in plan.copies:
            if copy.kind == "verify":
                continue
            key, found = copy.target.key, held[copy.source.key].dtype
            first = dtypes.setdefault(key, found)
            if found not in FLOATS:
                wrong.add(f"{copy.source.key}: {found}")
            if dtype is None and first != found:
                mixed.add(f"{key}: {found} -> {first}")
    if wrong:
        raise CheckpointError(
            listing("weights are floats; of another dtype are the tensors", wrong)
            + "\nThe checkpoint is quantised, or its dtypes are damaged: dequantise it, or look at what wrote it"
        )
    if mixed:
        raise CheckpointError(
            listing("dtypes differ, and a cast must be asked for (cast=True), for tensors", mixed)
            + "\nThe target has one dtype a tensor: allow the rounding (on the command line, convert --dtype)"
        )
    return {key: TensorInfo(shape, dtype or _dtype(key, dtypes)) for key, shape in shapes.items()}


def _dtype(key: str, dtypes: Mapping[str, str]) -> str:
    """The dtype of a tensor; of one that is all constants (a bias), that of its weight."""
    found = dtypes.get(key) or dtypes.get(key.removesuffix("bias") + "weight")
    if found is None:
        raise CheckpointError(f"{key} is made of constants, and nothing says in which dtype")
    return found


def _artefacts(checkpoint: Checkpoint) -> Path:
    return checkpoint.artefacts or checkpoint.folder


def _carried(checkpoint: Checkpoint, *, code: bool) -> tuple[Path, ...]:
    if checkpoint.artefacts is None:
        return ()
    found = artefacts.carried(checkpoint.artefacts, code=code)
    if checkpoint.artefacts == checkpoint.folder and checkpoint.megatron is not None:
        found = [path for path in found if path.name not in MEGATRON_FILES and path.suffix != ".distcp"]
    return tuple(path for path in found if path.parts[0] != HEADERS)


def _like(checkpoint: Checkpoint, kind: str, plans: Sequence[Plan]) -> Pattern | dict[str, list[str]] | None:
    """How the target's files are laid out where the source's are safetensors."""
    if not isinstance(checkpoint.files, safetensors.SafetensorsFiles):
        return None
    return checkpoint.files.pattern if checkpoint.column == kind else _followed(plans[0], checkpoint.files.shards())


def _kept(checkpoint: Checkpoint) -> Pattern | None:
    """How the files were laid out that a Megatron checkpoint came from, or those of the model that it is like."""
    if checkpoint.megatron is None or checkpoint.artefacts is None:
        return None
    if any(checkpoint.artefacts.glob("*.safetensors")):
        return safetensors.SafetensorsFiles(checkpoint.artefacts).pattern
    return _headers(checkpoint.artefacts)


def _headers(artefacts: Path) -> Pattern | None:
    check_inside(artefacts / HEADERS, artefacts)
    return Pattern.read(artefacts / HEADERS)


def _copies(checkpoint: Checkpoint, kept: Pattern | None) -> frozenset[str]:
    """Features of what the target stores a second time, as the files did that it is laid out like: a tied head."""
    if kept is None or checkpoint.column == "hf":
        return frozenset()
    keys = {key for held in kept.shards().values() for key in held}
    found = checkpoint.family.stored("hf", keys, tied=bool(checkpoint.hf["tie_word_embeddings"]))
    return found & {"stored_lm_head"}


def _other_dtypes(checkpoint: Checkpoint, parts: Sequence[Part]) -> tuple[str, ...]:
    """Where the config names another dtype than tensors have; loaders go by the one or by the other."""
    said = checkpoint.hf["dtype"] if {"dtype", "torch_dtype"} & checkpoint.config.keys() else None
    held: Counter[str] = Counter()
    for plan, files in parts:
        held.update(info.dtype for key, info in files.tensors().items() if key not in plan.drops)
    other = [
        f"{count:,} tensor{'s are' if count > 1 else ' is'} {dtype}"
        for dtype, count in sorted(held.items())
        if dtype != said
    ]
    return (f"config.json says {said}, {', '.join(other)}; kept",) if said is not None and other else ()


def _followed(plan: Plan, shards: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The target's tensors by file: where the source has the first element of each. In order of names, as published."""
    where = {key: file for file, keys in shards.items() for key in keys}
    found: dict[str, str] = {}
    for key, copies, _ in plan.by_target():
        moved = [copy for copy in copies if copy.kind != "verify"]
        if moved:
            found[key] = where[min(moved, key=lambda copy: copy.target.offset).source.key]
    for key in plan.target_tensors:
        if key not in found:
            found[key] = found[key.removesuffix("bias") + "weight"]  # a bias of zeros
    out: dict[str, list[str]] = {file: [] for file in shards}
    for key in sorted(found):
        out[found[key]].append(key)
    return {file: keys for file, keys in out.items() if keys}


def _megatron(
    checkpoint: Checkpoint,
    settings: Mapping[str, Any],
    infos: Mapping[str, TensorInfo],
    sidecars: Mapping[Path, bytes],
    *,
    stacked: bool,
    layers: Layers,
) -> FolderLayout:
    if isinstance(checkpoint.files, safetensors.SafetensorsFiles) and checkpoint.column == "hf":
        headers = checkpoint.files.pattern.files()
    elif checkpoint.artefacts is not None and (kept := _headers(checkpoint.artefacts)) is not None:
        headers = kept.files()
    else:
        headers = {}
    zero_centred = "layernorm_zero_centered_gamma"
    return megatron_folder.lay_out(
        infos,
        settings={**settings, zero_centred: zero_centred in checkpoint.stored},
        stacked=stacked,
        iteration=(checkpoint.megatron.iteration if checkpoint.megatron is not None else None) or 0,
        model_id=checkpoint.source.name if checkpoint.source.origin == "hub" else None,
        layers=layers,
        hf_artefacts=dict(sidecars) | {Path(HEADERS) / path: data for path, data in headers.items()},
    )
