"""A plain checkpoint made an FP8 one."""

from __future__ import annotations

from pathlib import Path

import torch

from converters.errors import CheckpointError, ConfigError, listing
from converters.quantized import e4m3, folder
from converters.quantized.folder import Progress, Written
from converters.quantized.schemes import SCHEMES, Scheme
from converters.stores.safetensors import SafetensorsFolder
from converters.tensors import TensorInfo, check_tensors


def quantize(
    source: str | Path,
    target: str | Path,
    scheme: str,
    *,
    partial_blocks: bool = False,
    overwrite: bool = False,
    progress: Progress = folder.silent,
) -> list[Written]:
    """Write `target`, the checkpoint `source` with the linear weights of its decoder layers in FP8.

    Embedding, norms, biases and the head are kept bit for bit, and a tied head stays tied: nothing is added for it.
    One tensor is in memory at a time.

    Args:
        source: A folder of bfloat16, float16 or float32 safetensors.
        target: The folder to make.
        scheme: A name of `SCHEMES`.
        partial_blocks: Allow blocks that reach over the edge of a weight.
        overwrite: Replace the target where it exists.
        progress: Told how far it is.

    Returns:
        What became of each tensor.

    Raises:
        CheckpointError: Tensors that do not fit the config or cannot be quantised, or a target that exists.
        ConfigError: Not a supported config, or quantised already.
    """
    source, target = Path(source), Path(target)
    if scheme not in SCHEMES:
        raise ConfigError(f"format {scheme!r}, expected one of {', '.join(SCHEMES)}")
    chosen = SCHEMES[scheme]
    config = folder.read_config(source)
    if config.get("quantization_config") is not None:
        raise ConfigError(f"{source} is quantised already; make it plain first: python -m converters dequantize")
    store = SafetensorsFolder(source)
    held = store.tensors()
    shapes, linears = folder.expected_tensors(config, held, str(source))
    check_tensors(shapes, held, str(source), folder.beside(config, held))
    _refuse(store, linears, chosen, partial_blocks)
    infos = dict(held)
    for key in linears:
        infos[key] = TensorInfo(held[key].shape, e4m3.CODES)
        infos[key + chosen.suffix] = TensorInfo(chosen.stored_shape(held[key].shape), "float32")
    total = sum(info.nbytes for info in held.values())
    out: list[Written] = []

    def fill(files: folder.Writable) -> None:
        done = 0
        for key in sorted(held):
            if key in linears:
                out.append(_quantize(store, key, chosen, files))
            else:
                out.append(folder.keep(key, store.tensor(key), files.tensor(key)))
            done += out[-1].before
            progress(done, total)

    folder.rewrite(source, target, infos, config | {"quantization_config": chosen.config()}, fill, overwrite=overwrite)
    return out


def _refuse(store: SafetensorsFolder, linears: list[str], scheme: Scheme, partial_blocks: bool) -> None:
    """Raise for what the metadata alone shows.

    Source: huggingface/transformers 5.23, integrations/finegrained_fp8.py `Fp8Dequantize._dequantize_one` (takes the
        block's size to be the weight's over the scales'); vllm-project/vllm, model_executor/layers/quantization/utils/
        fp8_utils.py `validate_fp8_block_shape`.
    """
    held = store.tensors()
    wrong = [f"{key}: {held[key].dtype}" for key in linears if held[key].dtype not in folder.FLOATS]
    if wrong:
        allowed = ", ".join(folder.FLOATS)
        raise CheckpointError(listing(f"{store.folder}: expected {allowed}, found", wrong))
    partial = [f"{key}: {list(held[key].shape)}" for key in linears if scheme.partial(held[key].shape)]
    if partial and not partial_blocks:
        raise CheckpointError(
            listing(f"blocks of {scheme.block[0]} x {scheme.block[1]} reach over the edge of weights", partial)
            + "\nvLLM refuses such blocks where it fuses layers (q, k and v; gate and up), and transformers 5 takes "
            "all blocks of the weight for smaller ones where it dequantises. Use --format compressed-tensors-channel, "
            "or allow them (--partial-blocks) for a reader that counts them in"
        )


def _quantize(store: SafetensorsFolder, key: str, scheme: Scheme, files: folder.Writable) -> Written:
    weight, codes, stored = store.tensor(key), files.tensor(key), files.tensor(key + scheme.suffix)
    fault = e4m3.misfit(weight)
    if fault:
        raise CheckpointError(f"{store.folder}: {key}: {fault}: a quantised weight must be finite")
    scales = e4m3.scales_for(e4m3.largest(weight, scheme.block))
    stored.copy_(scales.view(stored.shape))
    worst = 0.0
    for at in e4m3.chunks(*weight.shape):
        spread = e4m3.spread(scales, scheme.block, at, weight.shape)
        codes[at] = e4m3.encode(weight[at], spread)
        worst = max(worst, e4m3.worst(weight[at], e4m3.decode(codes[at], spread, torch.float32), spread))
    assert worst <= 1, (key, worst)
    return Written(key=key, kind="quantised", before=weight.nbytes, after=codes.nbytes + stored.nbytes, worst=worst)
