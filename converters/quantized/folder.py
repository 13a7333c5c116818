"""What both directions share: a folder rewritten tensor by tensor, complete or not at all, and the account of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from converters import artefacts
from converters.errors import CheckpointError, ConfigError
from converters.execute import bits, name_of
from converters.files.safetensors import lay_out
from converters.models import family_of, require_hf
from converters.stores import safetensors
from converters.tensors import TensorInfo, check_layers

FLOATS = ("bfloat16", "float16", "float32")


class Writable(Protocol):
    """Where the tensors of the target live."""

    def tensor(self, key: str) -> torch.Tensor:
        """A writable view."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What became of one weight.

    Attributes:
        key: The weight's.
        kind: `quantised`, `dequantised`, `kept`, `cast to <dtype>`, or `dropped`.
        before: Bytes in the source, scales included.
        after: Bytes in the target, scales included.
        worst: Largest error as a fraction of the declared bound; `None` where every bit is kept.
        idempotent: Quantising what was written gives the source's bytes again; `None` where it was not asked.
    """

    key: str
    kind: str
    before: int
    after: int
    worst: float | None = None
    idempotent: bool | None = None


Progress = Callable[[int, int], None]
"""Called with the bytes of the source that are done, and with all of them."""


def silent(done: int, total: int) -> None:
    """No progress is shown."""


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`.

    Raises:
        ConfigError: There is none, it is not an object, or it is not of Hugging Face's column.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected the config of a Hugging Face checkpoint: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected an object of config fields, found a {type(config).__name__}")
    try:
        require_hf(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def expected_tensors(
    config: Mapping[str, Any], held: Mapping[str, TensorInfo], where: str
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """What a plain checkpoint of this config holds, by the family's own table, and which of it is to be quantised.

    Args:
        config: Of the checkpoint.
        held: Its tensors.
        where: What it is called in messages.

    Returns:
        The shape of every tensor, and the keys of the linear weights of the decoder layers.
    """
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    family = family_of(plain)
    check_layers(family.fields.to_megatron(plain).hf["num_hidden_layers"], held, where)
    shapes = family.plan("hf", "megatron", plain).source_tensors
    return shapes, [key for key, shape in shapes.items() if ".layers." in key and len(shape) == 2]


def beside(config: Mapping[str, Any], held: Iterable[str]) -> set[str]:
    """Tensors that a checkpoint may store besides: a copy of a tied head, rotary buffers."""
    tied = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    return {key for key in held if key in tied or key.endswith("rotary_emb.inv_freq")}


def rewrite(
    source: Path,
    target: Path,
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    fill: Callable[[Writable], None],
    *,
    overwrite: bool,
) -> None:
    """Make the folder `target` with these tensors, that config, and every other file of `source`.

    Keys are laid out in their sorted order, so that equal tensors are equal files.

    Raises:
        CheckpointError: The target exists, holds the source or is in it, or cannot be written.
    """
    target, source = target.absolute(), source.resolve()
    if source == target.resolve() or source.is_relative_to(target.resolve()):
        raise CheckpointError(f"{target} holds the source {source}; choose another folder")
    partial = artefacts.begin(target, overwrite=overwrite)
    try:
        files = lay_out(dict(sorted(tensors.items())))
        safetensors.create(partial, files)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file in artefacts.carried(source):
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, partial / file)
        with torch.no_grad():
            fill(safetensors.MappedFiles(partial, files))
        artefacts.commit(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            size = sum(info.nbytes for info in tensors.values())
            raise CheckpointError(f"cannot write {size:,} bytes of weights beside {target}: {error}") from error
        raise


def keep(key: str, source: torch.Tensor, into: torch.Tensor) -> Written:
    """Copy a tensor that is not quantised, rounding it where the target has another dtype."""
    into.copy_(source)
    if source.dtype != into.dtype:
        if not bool(torch.isfinite(into.sum())) and bool((torch.isfinite(source) & ~torch.isfinite(into)).any()):
            raise CheckpointError(f"{key}: values of {name_of(source.dtype)} are infinite in {name_of(into.dtype)}")
        kind = f"cast to {name_of(into.dtype)}"
    else:
        assert torch.equal(bits(source), bits(into)), key
        kind = "kept"
    return Written(key=key, kind=kind, before=source.nbytes, after=into.nbytes)
