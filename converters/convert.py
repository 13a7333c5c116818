"""A checkpoint folder from one column to another, one destination tensor at a time, complete or not at all.

Columns that are folders of safetensors convert here; Megatron-Core's need a mesh of ranks, and `AutoBridge`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from converters import artefacts, execute, export
from converters.checkpoint import Checkpoint
from converters.conversion import COLUMNS, DTYPES
from converters.errors import CheckpointError, ConversionError
from converters.execute import TensorInfo
from converters.plan import Plan
from converters.stores import safetensors

SOON = 1.0  # seconds of work after which a progress bar is worth its line


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion did.

    Attributes:
        source: The folder that was read.
        target: The folder that was made.
        columns: Of the two.
        tensors: Tensors read, and written.
        bytes: Of the weights written.
        seconds: Wall time.
        dtype: What all was rounded to, or `None`: every bit was kept.
        constants: Elements that only one side has and that are zero, written or verified.
        dropped: For each tensor that went nowhere, the reason.
        options: The target's fields that the source's config lacks.
        let_go: The source's fields that the target's config cannot say, where they were not at their defaults.
        carried: The other files, taken over byte for byte.
    """

    source: Path
    target: Path
    columns: tuple[str, str]
    tensors: tuple[int, int]
    bytes: int
    seconds: float
    dtype: str | None = None
    constants: int = 0
    dropped: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    let_go: Mapping[str, str] = field(default_factory=dict)
    carried: tuple[Path, ...] = ()


def convert_folder(
    source: str | Path,
    target: str | Path,
    *,
    source_column: str | None = None,
    target_column: str,
    dtype: str | None = None,
    overwrite: bool = False,
    quiet: bool = True,
    options: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Conversion:
    """Convert a checkpoint folder. Without `dtype`, every bit of every weight is kept; every other file always is.

    Args:
        source: A folder, or a hub id.
        target: The folder to make. It appears when it is complete, or not at all.
        source_column: The column of the source; by default the one that its config names.
        target_column: `hf` or `te`.
        dtype: `float32` or `bfloat16`: round every tensor to it, and have the config say so.
        overwrite: Replace the target where it exists.
        quiet: No progress bar.
        options: For `te`, fields of its config: `attn_input_format`, `layer_precision`, ...
        trust_remote_code: Carry the source's Python files over.

    Raises:
        SourceError: No such model, or no safetensors weights.
        ConfigError: A model that the target's column cannot have.
        CheckpointError: Files or tensors that are not what the config promises, a target that exists or cannot be
            written, or a value that must be equal and is not.
    """
    began, target = time.monotonic(), Path(target).absolute()
    for column in (source_column, target_column):
        if column not in (None, *COLUMNS):
            raise ConversionError(
                f"{column!r} is no column of checkpoint folders ({', '.join(COLUMNS)}): Megatron-Core's weights live "
                "on a mesh of ranks, see converters.bridge.AutoBridge"
            )
    if dtype not in (None, *DTYPES):
        raise ConversionError(f"dtype {dtype!r}, expected {' or '.join(DTYPES)}")
    checkpoint = Checkpoint.open(source, column=source_column, trust_remote_code=trust_remote_code)
    if checkpoint.column == target_column:
        raise ConversionError(f"{source} is in the {target_column!r} column already: there is nothing to convert")
    if target.resolve() == checkpoint.folder.resolve():
        raise CheckpointError(f"{target} is the source itself; choose another folder for the result")
    config = _config(checkpoint, target_column, options, dtype).encode()
    plan = checkpoint.plan(target_column)
    execute.check_tensors(plan.source_tensors, checkpoint.tensors, str(checkpoint.folder))
    check_frequencies(checkpoint)
    infos = _infos(plan, checkpoint.tensors)
    if dtype is not None:
        infos = {key: TensorInfo(info.shape, getattr(torch, dtype)) for key, info in infos.items()}
    files = safetensors.lay_out(infos, _like(plan, checkpoint.files.shards()))
    code = trust_remote_code
    partial = export.prepare(target, files, config, carry_from=checkpoint.folder, code=code, overwrite=overwrite)
    try:
        with _progress(sum(file.size for file in files), quiet=quiet) as written:
            execute.run(
                plan,
                checkpoint.weights,
                safetensors.MappedFiles(partial, files),
                cast=dtype is not None,
                where=str(checkpoint.folder),
                written_bytes=written,
            )
        artefacts.commit(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    state = "a state of quantisation, which belongs to a run and not to the weights"
    return Conversion(
        source=checkpoint.folder,
        target=target,
        columns=(checkpoint.column, target_column),
        tensors=(len(checkpoint.files.tensors()), len(infos)),
        bytes=sum(file.size for file in files),
        seconds=time.monotonic() - began,
        dtype=dtype,
        constants=sum(part.elements for part in (*plan.fills, *plan.constants)),
        dropped=dict(plan.drops) | dict.fromkeys(checkpoint.extra_states, state),
        options=_options(checkpoint, target_column, options),
        let_go=_let_go(checkpoint),
        carried=tuple(artefacts.carried(checkpoint.folder, code=code)),
    )


def check_frequencies(checkpoint: Checkpoint) -> None:
    """Hold the rotary frequencies that a TE checkpoint stores against those of its config.

    Raises:
        CheckpointError: Others: without them, the converted model would turn by other angles.
    """
    if "stored_te_inv_freq" not in checkpoint.stored:
        return
    from converters.megatron.rope import frequencies_of_fields

    stored = checkpoint.weights.tensor("model.rotary_emb.inv_freq")
    expected = frequencies_of_fields(checkpoint.hf)
    if stored.shape != expected.shape or not torch.equal(stored, expected.to(stored.dtype)):
        raise CheckpointError(
            f"{checkpoint.folder}: model.rotary_emb.inv_freq is not what the config's rope fields give, and no other "
            "format stores frequencies. Correct rope_theta and rope_parameters in config.json, or remove the tensor"
        )


def _config(checkpoint: Checkpoint, column: str, options: Mapping[str, Any] | None, dtype: str | None) -> str:
    text = checkpoint.config_text(column, options)
    if dtype in (None, checkpoint.hf["dtype"]):
        return text
    return artefacts.patched(json.loads(text), {"dtype": dtype}, {"dtype": ("dtype", "torch_dtype")})


def _infos(plan: Plan, held: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Shape and dtype of each target tensor."""
    dtypes = {copy.target.key: held[copy.source.key].dtype for copy in plan.copies if copy.kind != "verify"}
    return {
        key: TensorInfo(shape, dtypes[key] if key in dtypes else export.fill_dtype(key, dtypes))
        for key, shape in plan.target_tensors.items()
    }


def _like(plan: Plan, shards: Mapping[str, list[str]]) -> dict[str, list[str]]:
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


def _options(checkpoint: Checkpoint, column: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    dialect = checkpoint.family.dialect(column)
    return dialect.read({**checkpoint.config, **(options or {})}) if dialect else {}


def _let_go(checkpoint: Checkpoint) -> dict[str, str]:
    dialect = checkpoint.family.dialect(checkpoint.column)
    if dialect is None:
        return {}
    found = dialect.read(checkpoint.source.config)
    return {
        f"{option.name}={found[option.name]!r}": option.why
        for option in dialect.options
        if found[option.name] != option.default
    }


@contextmanager
def _progress(total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A callable that is told how many bytes were written; it draws a bar once the work is long."""
    if quiet:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    began = time.monotonic()
    columns = (
        TextColumn("converting"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task("", total=total)

    def written(count: int) -> None:
        progress.advance(task, count)
        if not progress.live.is_started and time.monotonic() - began > SOON:
            progress.start()

    try:
        yield written
    finally:
        if progress.live.is_started:
            progress.stop()
