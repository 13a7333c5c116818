"""What a conversion will write, known in full before a byte moves: tensors, files, config, and the plans."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters import artefacts
from converters.checkpoint import HF_LIKE, Checkpoint
from converters.errors import CheckpointError, ConversionError, listing
from converters.files import megatron_folder, safetensors
from converters.files.dcp import DcpFiles
from converters.files.extents import FolderLayout
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
    """

    column: str
    parts: Sequence[Part]
    infos: Mapping[str, TensorInfo]
    layout: FolderLayout
    carried: tuple[Path, ...]


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
    text = _config(checkpoint, kind if kind in HF_LIKE else "hf", options, dtype)
    padding: dict[str, int] = {}
    if kind == "megatron":
        padding = _padding(checkpoint, padded_vocab_size, make_vocab_size_divisible_by, tp)
        if stacked is None:
            stacked = not (checkpoint.column == "megatron" and isinstance(checkpoint.files, DcpFiles))
    elif tp != 1:
        raise ConversionError(f"a target in the {kind!r} column has no padding for tp={tp}")
    column = kind if kind in HF_LIKE else STYLES[stacked is not False]
    parts = checkpoint.parts(column, padding)
    for plan, files in parts:
        check_tensors(plan.source_tensors, files.tensors(), str(checkpoint.folder))
    infos = _infos(parts, dtype)
    carried = _carried(checkpoint, code=code)
    sidecars = {path: (_artefacts(checkpoint) / path).read_bytes() for path in carried}
    sidecars[Path("config.json")] = text.encode()
    if kind in HF_LIKE:
        like = _like(checkpoint, kind, [plan for plan, _ in parts])
        layout = safetensors.lay_out(infos, like=like, max_shard_bytes=max_shard_size, sidecars=sidecars)
    else:
        settings = checkpoint.family.fields.to_megatron(json.loads(text)).megatron
        layout = _megatron(
            checkpoint, {**settings, **padding}, infos, sidecars, stacked=column == STYLES[True], layers=layers or "te"
        )
    return Target(column=column, parts=parts, infos=infos, layout=layout, carried=carried)


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
        CheckpointError: One tensor is made of several dtypes, and none was asked for; or of integers, and a float was.
    """
    dtypes: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    mixed: set[str] = set()
    for plan, files in parts:
        held = files.tensors()
        shapes |= plan.target_tensors
        for copy in plan.copies:
            if copy.kind == "verify":
                continue
            key, found = copy.target.key, held[copy.source.key].dtype
            first = dtypes.setdefault(key, found)
            if dtype is None and first != found:
                mixed.add(f"{key}: {found} -> {first}")
    if mixed:
        raise CheckpointError(
            listing("dtypes differ, and a cast must be asked for (cast=True), for tensors", mixed)
            + "\nThe target has one dtype a tensor: allow the rounding (on the command line, convert --dtype)"
        )
    if dtype is not None:
        wrong = [f"{key}: {found} -> {dtype}" for key, found in dtypes.items() if found not in FLOATS]
        if wrong:
            raise CheckpointError(
                listing("a cast rounds floats to floats; integers are no numbers to round, in tensors", wrong)
                + "\nThe checkpoint is quantised, or its dtypes are damaged: dequantise it, or look at what wrote it"
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
    """How the target's files are laid out: as the source's, or as those that the source came from."""
    if isinstance(checkpoint.files, safetensors.SafetensorsFiles):
        if checkpoint.column == kind:
            return checkpoint.files.pattern
        return _followed(plans[0], checkpoint.files.shards())
    if kind != "hf" or checkpoint.artefacts is None:
        return None
    if any(checkpoint.artefacts.glob("*.safetensors")):
        return safetensors.SafetensorsFiles(checkpoint.artefacts).pattern
    return Pattern.read(checkpoint.artefacts / HEADERS)


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
    elif checkpoint.artefacts is not None and (kept := Pattern.read(checkpoint.artefacts / HEADERS)) is not None:
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
