"""From `--model` to a checkpoint folder: the hub, a folder, packaged real weights, or weights made from the config."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from converters.errors import CheckpointError, SourceError
from converters.sources import packaged, read_config, resolve
from parity import smollm2
from parity.cache import cache_root, digest_of, made_once
from parity.seeded import checkpoint_bytes, parameters, write_checkpoint
from parity.shards import ITEMSIZE, read_entries, write_shards
from parity.tiny import ALIGNED, TINY, require_llama, shrink, with_layers

Config = dict[str, Any]
Weights = Literal["checkpoint", "seeded"]
Size = Literal["full", "tiny", "tiny-aligned"]
"""`tiny-aligned` is the tiny size of cases whose matrix products are quantised, which takes sizes that suit them."""
SEEDED_LIMIT = 4 << 30
"""Bytes of seeded weights that are written without being asked for more."""
_FORMAT = 1  # of derived folders: raise it when what is written changes


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model under test.

    Attributes:
        name: What was asked for.
        slug: Its part of a test id: `llama-3.2-1b-tiny`.
        folder: A Hugging Face checkpoint.
        config: Its config.json.
        weights: What the weights are: `real`, `real, dequantised 4-bit`, or `seeded`.
        origin: Where they come from: `folder`, `hub`, `package` or `config`.
        revision: The commit of a hub snapshot.
    """

    name: str
    slug: str
    folder: Path
    config: Config
    weights: str
    origin: str
    revision: str | None = None


def config_of(model: str, *, revision: str | None = None, size: Size = "full", layers: int | None = None) -> Config:
    """The config that the subject will have, without its weights; offline for folders, cached and packaged models.

    Raises:
        SourceError: No such model.
        ConfigError: Not a Llama model, or more layers than it has.
    """
    config = read_config(model, revision=revision)
    require_llama(config)
    if size != "full":
        config = shrink(config, TINY if size == "tiny" else ALIGNED)
    return config if layers is None else with_layers(config, layers)


def slug_of(model: str, *, weights: Weights | None = None, size: Size = "full", layers: int | None = None) -> str:
    """The subject's part of a test id: the last part of the name, and what was changed of the model."""
    name = packaged(model) or Path(model).expanduser().resolve().name
    parts = [re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")]
    parts += [size] * (size != "full") + ["seeded"] * (size == "full" and weights == "seeded")
    return "-".join(parts + ([f"{layers}layers"] if layers is not None else []))


def subject(
    model: str,
    *,
    revision: str | None = None,
    weights: Weights | None = None,
    size: Size = "full",
    layers: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
    cache: Path | None = None,
    trust_remote_code: bool = False,
    seeded_limit: int = SEEDED_LIMIT,
    progress: bool = True,
) -> Subject:
    """The checkpoint to test, made or fetched if it is not there yet.

    Args:
        model: A folder, a hub id, the name of a packaged config, or `smollm2-135m` (packaged real weights).
        revision: Branch, tag or commit on the hub.
        weights: The model's own, or seeded ones from its config; the default is its own for `full`, seeded for `tiny`.
        size: `tiny` shrinks the config (`parity.tiny`); it has no weights of its own.
        layers: Keep the first layers only.
        dtype: Of seeded weights: `float32` or `bfloat16`.
        seed: Of seeded weights.
        cache: Where made checkpoints live; the default is `parity.cache.cache_root`.
        trust_remote_code: Fetch a hub repository's Python files too.
        seeded_limit: Bytes of seeded weights to write at most.
        progress: Show progress on stderr while packaged weights are prepared.

    Raises:
        SourceError: No such model or weights, or seeded weights beyond the limit or the disk.
        ConfigError: Not a Llama model, or more layers than it has.
    """
    if size != "full" and weights == "checkpoint":
        raise SourceError(
            "--size tiny has no checkpoint weights: a shrunk model is a new model. Leave --weights out (seeded), or "
            "use --layers N to test a few layers of the real weights"
        )
    slug = slug_of(model, weights=weights, size=size, layers=layers)
    made = cache_root(cache) / "made"
    if size != "full" or weights == "seeded":
        config = config_of(model, revision=revision, size=size, layers=layers)
        key = digest_of([_FORMAT, "seeded", config, seed, dtype])
        folder = made / f"{slug}-{key}"
        _require_room(model, config, dtype, folder, seeded_limit)
        made_once(folder, lambda aside: _discard(write_checkpoint(config, aside, seed=seed, dtype=dtype)))
        return Subject(
            name=model, slug=slug, folder=folder, config=_config_in(folder), weights="seeded", origin="config"
        )
    found: str | None = None
    if _is_smollm2(model):
        folder, note, origin = smollm2.prepare(cache, progress), smollm2.NOTE, "package"
    else:
        source = resolve(model, revision=revision, trust_remote_code=trust_remote_code)
        assert source.folder is not None
        require_llama(source.config)
        folder, note, origin, found = source.folder, "real", source.origin, source.revision
    if layers is not None:
        config = with_layers(_config_in(folder), layers)
        key = digest_of([_FORMAT, "layers", layers, _fingerprint(folder)])
        folder = made_once(made / f"{slug}-{key}", partial(_keep_layers, folder, config))
    return Subject(
        name=model, slug=slug, folder=folder, config=_config_in(folder), weights=note, origin=origin, revision=found
    )


def weights_note(model: str, weights: str | None) -> str:
    """What the weights of a model are, for a header, before they are fetched."""
    if weights == "seeded":
        return "seeded: random, from a fixed seed"
    return smollm2.NOTE if _is_smollm2(model) else "the checkpoint's"


def _is_smollm2(model: str) -> bool:
    return packaged(model) == "SmolLM2-135M" and not Path(model).is_dir()


def _discard(_: object) -> None:
    return None


def _config_in(folder: Path) -> Config:
    config: Config = json.loads((folder / "config.json").read_text())
    return config


def _require_room(model: str, config: Config, dtype: str, folder: Path, limit: int) -> None:
    """Refuse seeded weights that are larger than the limit, or than the disk has room for."""
    if folder.exists():
        return
    size = checkpoint_bytes(config, dtype)
    what = f"seeded weights of {model} are {parameters(config):,} parameters, {size / 1e9:.1f} GB in {dtype}"
    smaller = "use --size tiny, or --layers N"
    if size > limit:
        raise SourceError(f"{what}, more than the limit of {limit / 1e9:.1f} GB: {smaller}, or raise the limit")
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if size * 1.05 > free:
        raise SourceError(f"{what}, and {folder.parent} has {free / 1e9:.1f} GB free: {smaller}, or another cache")


def _fingerprint(folder: Path) -> list[Any]:
    """What changes when a checkpoint does, without reading its weights."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [str(folder), [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]]


def _keep_layers(source: Path, config: Config, folder: Path) -> None:
    """Write the checkpoint of `config`'s first layers: tensors copied byte for byte, everything else carried over."""
    entries = read_entries(source)
    number = re.compile(r"^model\.layers\.(\d+)\.")
    kept = {}
    for key, entry in entries.items():
        layer = number.match(key)
        if layer is None or int(layer[1]) < config["num_hidden_layers"]:
            if entry.dtype not in ITEMSIZE:
                raise CheckpointError(f"{key} in {source} is {entry.dtype}, expected {', '.join(ITEMSIZE)}")
            kept[key] = entry
    write_shards(folder, {key: (e.dtype, e.shape) for key, e in kept.items()}, lambda key: kept[key].chunks())
    for path in source.iterdir():
        weights = path.name.endswith((".safetensors", ".safetensors.index.json"))
        if path.is_file() and not weights and path.name != "config.json" and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
