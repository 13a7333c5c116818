"""An FP8 checkpoint made a plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from converters.errors import CheckpointError, ConfigError, listing
from converters.execute import bits, name_of
from converters.quantized import e4m3, folder
from converters.quantized.folder import Progress, Written
from converters.quantized.schemes import Declared, declared
from converters.stores.safetensors import SafetensorsFolder
from converters.tensors import TensorInfo, check_tensors
from converters.values import ROUNDOFF

DTYPES = ("bfloat16", "float32")
ACTIVATIONS = (".input_scale", ".activation_scale")
"""Static scales of activations: a plain model does not quantise them."""


def dequantize(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress = folder.silent,
) -> list[Written]:
    """Write `target`, the FP8 checkpoint `source` as a plain one.

    A weight is its code times its scale, rounded once to `dtype`: in float32 not at all where the scale is a bfloat16
    number, as all that are written here are. Quantising the result in the same format gives the same codes and scales
    if they were written here; `Written.idempotent` says so of each weight, by trying.

    Args:
        source: A folder in a format of `SCHEMES`, whoever wrote it.
        target: The folder to make.
        dtype: `bfloat16` or `float32`, for every floating-point tensor; by default weights get the config's dtype and
            the others keep theirs. Everything becomes float32 where the config says float16, whose range is too narrow.
        overwrite: Replace the target where it exists.
        progress: Told how far it is.

    Returns:
        What became of each weight; scales of activations are dropped.

    Raises:
        CheckpointError: Scales or weights that are missing, misshapen or of no use, or a target that exists.
        ConfigError: No FP8 checkpoint, or one that is not read here.
    """
    source, target = Path(source), Path(target)
    config = folder.read_config(source)
    said = declared(config)
    named = config.get("dtype") or config.get("torch_dtype") or "float32"
    chosen = dtype or (named if named in DTYPES else "float32")
    if chosen not in DTYPES:
        raise ConfigError(f"dtype {chosen!r}, expected {' or '.join(DTYPES)}")
    store = SafetensorsFolder(source, quantized=True)
    held = store.tensors()
    weights = _weights(store, config, said)
    dropped = [key for key in held if key.endswith(ACTIVATIONS)]
    scales = {key + said.scheme.suffix for key in weights}
    # A config says one dtype for all: where it is not the one that it said before, nothing keeps its own.
    changed = {key for key, info in held.items() if info.dtype in folder.FLOATS and (dtype or chosen != named)}
    infos = {
        key: TensorInfo(info.shape, chosen if key in weights | changed else info.dtype)
        for key, info in held.items()
        if key not in scales and key not in dropped
    }
    total = sum(info.nbytes for info in held.values())
    out: list[Written] = []

    def fill(files: folder.Writable) -> None:
        done = 0
        for key in sorted(infos):
            if key in weights:
                out.append(_restore(store, key, said, files.tensor(key)))
            else:
                out.append(folder.keep(key, store.tensor(key), files.tensor(key)))
            done += out[-1].before
            progress(done, total)

    folder.rewrite(source, target, infos, _plain(config, chosen), fill, overwrite=overwrite)
    out += [Written(key=key, kind="dropped", before=held[key].nbytes, after=0) for key in sorted(dropped)]
    return out


def _plain(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    out = {name: value for name, value in config.items() if name != "quantization_config"}
    spelled = [name for name in ("dtype", "torch_dtype") if name in out] or ["dtype"]
    return out | dict.fromkeys(spelled, dtype)


def _weights(store: SafetensorsFolder, config: dict[str, Any], said: Declared) -> set[str]:
    """The quantised weights, each with a scale that fits.

    Raises:
        CheckpointError: Everything that does not.
    """
    held, suffix = store.tensors(), said.scheme.suffix
    files = {key: file for file, keys in store.shards().items() for key in keys}
    weights = {key for key, info in held.items() if info.dtype == e4m3.CODES}
    shapes, linears = folder.expected_tensors(config, held, str(store.folder))
    also = folder.beside(config, held) | {key for key in held if key.endswith(ACTIVATIONS)}
    problems = [
        f"{files[key]}: {key} is quantised, and the config says that it is kept"
        for key in weights
        if said.keeps(key.removesuffix(".weight"))
    ]
    if config.get("tie_word_embeddings"):
        problems += [
            f"{files[key]}: {key} is quantised, and a tied head shares the embedding's values: untie it or keep it"
            for key in weights & {"lm_head.weight", "model.embed_tokens.weight"}
        ]
    problems += [
        f"{files[key]}: {key} is {held[key].dtype}, and the config says that it is quantised: expected F8_E4M3"
        for key in linears
        if key in held and key not in weights and not said.keeps(key.removesuffix(".weight"))
    ]
    for key in weights:
        scale = key + suffix
        if scale not in held:
            problems.append(f"{files[key]}: {key} is quantised, and {scale} is missing")
        else:
            also.add(scale)
            problems += [f"{files[scale]}: {scale} {fault}" for fault in _faults(store, key, scale, said)]
        fault = e4m3.misfit(store.tensor(key)) if len(held[key].shape) == 2 else "it is no matrix"
        problems += [f"{files[key]}: {key}: {fault}"] if fault else []
    problems += [
        f"{files[key]}: {key} scales nothing: {key.removesuffix(suffix)} is not quantised"
        for key in held
        if key.endswith(".weight" + suffix) and key.removesuffix(suffix) not in weights
    ]
    also |= {key for key in held if key.endswith(".weight" + suffix)}
    if problems:
        raise CheckpointError(listing(f"{store.folder}: quantised tensors that cannot be read", problems))
    check_tensors(shapes, held, str(store.folder), also)
    return weights


def _faults(store: SafetensorsFolder, key: str, scale: str, said: Declared) -> list[str]:
    info, shape = store.tensors()[scale], store.tensors()[key].shape
    if info.dtype not in folder.FLOATS:
        return [f"is {info.dtype}, expected {' or '.join(folder.FLOATS)}"]
    if len(shape) != 2:
        return []
    allowed = [said.scheme.stored_shape(shape)] + [()] * (said.scheme.block == (None, None))
    if info.shape not in allowed:
        return [f"has shape {list(info.shape)}, expected {list(allowed[0])} for a weight of {list(shape)}"]
    values = store.tensor(scale).float().flatten()
    bad = (~(torch.isfinite(values) & (values > 0))).nonzero().flatten()
    if len(bad):
        first = int(bad[0])
        return [f"has {len(bad):,} that are not positive finite numbers, the first at {first}: {float(values[first])}"]
    return []


def _restore(store: SafetensorsFolder, key: str, said: Declared, into: torch.Tensor) -> Written:
    block = said.scheme.block
    codes, stored = store.tensor(key), store.tensor(key + said.scheme.suffix)
    scales = stored.float().view(e4m3.scale_shape(tuple(codes.shape), block))
    worst = 0.0
    for at in e4m3.chunks(*codes.shape):
        spread = e4m3.spread(scales, block, at, codes.shape)
        into[at] = e4m3.decode(codes[at], spread, into.dtype)
        if not bool(torch.isfinite(into[at]).all()):
            raise CheckpointError(f"{store.folder}: {key}: a code times its scale is infinite in {name_of(into.dtype)}")
        if into.dtype != torch.float32:
            exact = e4m3.decode(codes[at], spread, torch.float32)
            bound = ROUNDOFF[name_of(into.dtype)] * exact.abs() + 2.0**-134
            worst = max(worst, float(((into[at].float() - exact).abs() / bound).max()))
    assert worst <= 1, (key, worst)
    again = e4m3.scales_for(e4m3.largest(into, block))
    same = torch.equal(again, scales) and all(
        torch.equal(
            bits(e4m3.encode(into[at], e4m3.spread(again, block, at, codes.shape)).view(torch.uint8)),
            codes[at].view(torch.uint8),
        )
        for at in e4m3.chunks(*codes.shape)
    )
    return Written(
        key=key,
        kind="dequantised",
        before=codes.nbytes + stored.nbytes,
        after=into.nbytes,
        worst=worst,
        idempotent=same,
    )
