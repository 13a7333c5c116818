"""A checkpoint folder into another format or layout: file to file, one destination in memory at a time, whole or not.

No model is built and no process group is needed; under torchrun every rank writes its own byte ranges.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters import targets
from converters.checkpoint import Checkpoint
from converters.errors import CheckpointError, ConversionError
from converters.files import fingerprint, identity, place
from converters.files.pending import Pending
from converters.progress import Progress, speaks
from converters.sources import Source

if TYPE_CHECKING:
    from converters.files.iterations import Iteration
    from converters.files.megatron_folder import Layers
    from converters.files.stream import Written

COLUMNS = ("hf", "te", "megatron")
"""What a person may ask for; the layout of Megatron's keys is an option of its own."""
DTYPES = ("float32", "bfloat16", "float16")


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
        resumed: Of the bytes, those that an interrupted run had written before.
        dtype: What all was rounded to, or `None`: every bit was kept.
        constants: Elements that only one side has and that are zero, written or verified.
        dropped: For each tensor that went nowhere, the reason.
        options: The target's fields that the source's config lacks.
        let_go: The source's fields that the target's config cannot say, where they were not at their defaults.
        carried: The other files, taken over byte for byte.
        left_alone: What the source holds besides weights, with the reason.
        nonfinite: For each tensor written that holds NaN or infinities, how many; they are kept.
        overflowed: Of those, how many were finite in the source and became infinite by rounding to `dtype`.
        notices: What else a person should hear of.
        written: Every chunk of the target with its digest, in the order of the files.
    """

    source: Path
    target: Path
    columns: tuple[str, str]
    tensors: tuple[int, int]
    bytes: int
    seconds: float
    resumed: int = 0
    dtype: str | None = None
    constants: int = 0
    dropped: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    let_go: Mapping[str, str] = field(default_factory=dict)
    carried: tuple[Path, ...] = ()
    left_alone: Mapping[str, str] = field(default_factory=dict)
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    overflowed: Mapping[str, int] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    written: tuple[Written, ...] = ()


def convert_folder(
    source: str | Path,
    target: str | Path,
    *,
    source_column: str | None = None,
    target_column: str | None,
    dtype: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    quiet: bool = True,
    options: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | None = None,
    like: str | Path | Source | None = None,
    iteration: Iteration | None = None,
    stacked: bool | None = None,
    padded_vocab_size: int | None = None,
    make_vocab_size_divisible_by: int | None = None,
    tp: int = 1,
    layers: Layers | None = None,
    max_shard_size: int | None = None,
    digests: str | Path | None = None,
    workers: int | None = None,
    check_source: bool = False,
) -> Conversion:
    """Convert a checkpoint folder. Without `dtype`, every bit of every weight is kept; every other file always is.

    Args:
        source: A folder of any format, or a hub id.
        target: The folder to make. It appears when it is complete, or not at all.
        source_column: What the source must be; by default whatever it is.
        target_column: `hf`, `te` or `megatron`; `None` keeps the source's and changes how it lies in files.
        dtype: `float32`, `bfloat16` or `float16`: round every tensor to it, and have the config say so.
        overwrite: Replace the target where it exists.
        resume: Finish what an interrupted run of the same conversion has left; what it wrote is held against its
            checksums first.
        quiet: No progress bar.
        options: For `te`, fields of its config: `attn_input_format`, `layer_precision`, ...
        trust_remote_code: Carry the source's Python files over.
        revision: Branch, tag or commit of a hub id.
        token: Access token for the hub.
        like: The Hugging Face model (folder or hub id) of a Megatron checkpoint: its config, the other files, and which
            tensors lie in which file. By default what the checkpoint carries.
        iteration: Of a Megatron source with several. A Megatron target has the source's, or 0.
        stacked: Of a Megatron target: layers stacked in one tensor each (the default), or a tensor for each layer, as
            with `hetereogenous_dist_checkpoint`.
        padded_vocab_size: Rows of a Megatron target's embedding; by default the source's.
        make_vocab_size_divisible_by: The same, as Megatron-LM computes it: of this times `tp`.
        tp: Tensor-parallel ranks that will load a Megatron target whose heads do not divide over them: groups of zeros
            are added, exact, and loaded as heads like any other. Without need of them a checkpoint loads at any tp.
        layers: Whose layers will load a Megatron target, `te` (the default) or `local`: those demand one state more
            besides weights, which these refuse under `strict="raise_all"`.
        max_shard_size: Most bytes of tensors in one file of safetensors; by default files are as the source's were.
        digests: A JSON file to write: a digest of every tensor of the target. It is replaced as the target is.
        workers: Threads that write.
        check_source: First read all of the source, and hold it against the checksums that its format notes.

    Raises:
        SourceError: No such model, or no weights.
        ConfigError: A model that the target's column cannot have.
        CheckpointError: Files or tensors that are not what the config promises, a target that exists or cannot be
            written, a value that must be equal and is not, or bytes that are not those that were written.
    """
    from converters.files.stream import stream

    began, target = time.monotonic(), Path(place.expanded(target)).absolute()
    for column in (source_column, target_column):
        if column not in (None, *COLUMNS):
            raise ConversionError(f"{column!r} is no column of checkpoint folders, expected {', '.join(COLUMNS)}")
    if dtype not in (None, *DTYPES):
        raise ConversionError(f"dtype {dtype!r}, expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    checkpoint = Checkpoint.open(
        source,
        column=source_column,
        iteration=iteration,
        like=like,
        revision=revision,
        token=token,
        trust_remote_code=trust_remote_code,
    )
    if checkpoint.kind == target_column and not (checkpoint.kind == "hf" and checkpoint.megatron is not None):
        raise ConversionError(
            f"{source} is in the {target_column!r} column already: there is nothing to convert. Another number of "
            "files or layout of keys: python -m converters reshard (in Python target_column=None)"
        )
    sources = _sources(source, checkpoint)
    if digests is not None:
        from converters.files.digests import free, write

        digests = free(Path(place.expanded(digests)), clear_of=(target, *sources), overwrite=overwrite)
    checkpoint.check()
    threads: dict[str, int] = {} if workers is None else {"workers": workers}
    notices = (_checked(checkpoint, quiet, threads),) if check_source else ()
    made = targets.lay_out(
        checkpoint,
        target_column or checkpoint.kind,
        dtype=dtype,
        options=options,
        code=trust_remote_code,
        stacked=stacked,
        padded_vocab_size=padded_vocab_size,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        tp=tp,
        layers=layers,
        max_shard_size=max_shard_size,
    )
    total = sum(info.nbytes for info in made.infos.values())
    read = identity.known(files for _, files in made.parts)
    same = fingerprint.of_sources(read, column=made.column, dtype=dtype)
    with (
        Progress("converting", total, quiet=quiet) as progress,
        Pending.begin(
            target,
            made.layout,
            fingerprint=same,
            here=fingerprint.of_identities(read),
            sources=sources,
            overwrite=overwrite,
            resume=resume,
            report=progress.advance,
        ) as pending,
    ):
        for written in stream(
            made.parts,
            pending.missing(),
            pending.folder,
            cast=dtype is not None,
            report=progress.advance,
            **threads,
        ):
            pending.note(written)
        identity.check(read)
        pending.commit()
    state = "a state of quantisation, which belongs to a run and not to the weights"
    plans = [plan for plan, _ in made.parts]
    done = Conversion(
        source=checkpoint.folder,
        target=target,
        columns=(checkpoint.kind, target_column or checkpoint.kind),
        tensors=(len(checkpoint.files.tensors()), len(made.infos)),
        bytes=total,
        seconds=time.monotonic() - began,
        resumed=pending.resumed,
        dtype=dtype,
        constants=sum(part.elements for plan in plans for part in (*plan.fills, *plan.constants)),
        dropped={key: why for plan in plans for key, why in plan.drops.items()}
        | dict.fromkeys(checkpoint.extra_states, state),
        options=_options(checkpoint, made.column, options),
        let_go=_let_go(checkpoint, made.column),
        carried=made.carried,
        left_alone=checkpoint.files.left_alone,
        nonfinite=_counts(pending.written, "nonfinite"),
        overflowed=_counts(pending.written, "overflowed"),
        notices=(*checkpoint.remarks, *notices, *made.notices, *pending.notices),
        written=tuple(pending.written),
    )
    if isinstance(digests, Path) and speaks():
        try:
            write(digests, done.columns[1], made.infos, made.layout.chunks, done.written)
        except OSError as error:
            raise CheckpointError(
                f"{done.target} is complete, but its digests cannot be written to {digests}: {error}"
            ) from error
    return done


def _checked(checkpoint: Checkpoint, quiet: bool, threads: Mapping[str, int]) -> str:
    from converters.files import checksums

    held = checksums.check(checkpoint.files, quiet=quiet, **threads)
    if held:
        return f"the source's bytes have the checksums that they were written with ({held:,} records)"
    return "the source notes no checksums of its tensors: whether they are as they were written cannot be told"


def _options(checkpoint: Checkpoint, column: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    dialect = checkpoint.family.dialect(column)
    return dialect.read({**checkpoint.config, **(options or {})}) if dialect else {}


def _let_go(checkpoint: Checkpoint, column: str) -> dict[str, str]:
    dialect = checkpoint.family.dialect(checkpoint.column)
    if dialect is None or column == checkpoint.column:
        return {}
    found = dialect.read(checkpoint.source.config)
    return {
        f"{option.name}={found[option.name]!r}": option.why
        for option in dialect.options
        if found[option.name] != option.default
    }


def _counts(written: Iterable[Written], what: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for chunk in written:
        if count := getattr(chunk, what):
            found[chunk.key] = found.get(chunk.key, 0) + count
    return found


def _sources(asked: str | Path | Source, checkpoint: Checkpoint) -> list[Path]:
    """What the target must keep clear of: the checkpoint, all iterations beside it, and where its artefacts are."""
    found = [checkpoint.folder]
    if checkpoint.megatron is not None:
        from converters.files import iterations, megatron_state

        inside, above = checkpoint.folder, checkpoint.folder.resolve().parent
        trackers = (megatron_state.TRACKER, megatron_state.STATE_TRACKER)
        if iterations.iteration_of(inside.resolve()) is not None and (
            Path(place.expanded(str(asked))).resolve() == above or any((above / name).exists() for name in trackers)
        ):
            found.append(above)
    if checkpoint.artefacts is not None:
        found.append(checkpoint.artefacts)
    return found
