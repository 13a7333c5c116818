"""What an FP8 checkpoint must hold, said a second time: each format by its definition, without the converter's code.

A linear weight of a decoder layer is codes in e4m3 and scales in float32; what stands for an element is its code times
the scale of its block. A scale makes the largest element of its block the largest code, 448, but for two roundings to
bfloat16. Everything else is as it was, a tied head included, which has no tensor.

Source: vllm-project/compressed-tensors 0.20.0, quantization/lifecycle/initialize.py (`weight_scale`, `(1,)` of a
    tensor, `(rows, 1)` of its channels); huggingface/transformers 5.23, integrations/finegrained_fp8.py
    (`weight_scale_inv`, one for each 128 x 128, those at the edges in part); OCP 8-bit Floating Point Specification 1.0
    (e4m3).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight")
LARGEST = 448.0


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format.

    Attributes:
        suffix: Of the scale's name.
        rows: Rows of a block; `None` is all.
        columns: Its columns; `None` is all.
        declared: What `quantization_config` has to say.
    """

    suffix: str
    rows: int | None
    columns: int | None
    declared: Mapping[str, Any]


FORMATS: Mapping[str, Format] = {
    "compressed-tensors": Format(
        suffix="_scale",
        rows=None,
        columns=None,
        declared={"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]},
    ),
    "compressed-tensors-channel": Format(
        suffix="_scale",
        rows=1,
        columns=None,
        declared={"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]},
    ),
    "fine-grained": Format(
        suffix="_scale_inv",
        rows=128,
        columns=128,
        declared={"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]},
    ),
}


def restored(codes: Tensor, scale: Tensor, form: Format) -> Tensor:
    """What codes `[rows columns]` stand for, float32.

    Raises:
        ValueError: The scale is of another shape than the format's.
    """
    return codes.float() * _each(scale, codes.shape, form)


def _each(scale: Tensor, shape: torch.Size, form: Format) -> Tensor:
    """The scale of every element."""
    down, across = (-(-size // (block or size)) for size, block in zip(shape, (form.rows, form.columns), strict=True))
    wanted = (1,) if (form.rows, form.columns) == (None, None) else (down, across)
    if tuple(scale.shape) != wanted:
        raise ValueError(f"has shape {list(scale.shape)}, expected {list(wanted)} for a weight of {list(shape)}")
    grid = scale.float().view(down, across)
    tall = grid.repeat_interleave(form.rows or shape[0], 0)[: shape[0]]
    return tall.repeat_interleave(form.columns or shape[1], 1)[:, : shape[1]]


def _largest(weight: Tensor, form: Format) -> Tensor:
    """The largest magnitude of each block, at every element of it."""
    found = torch.empty_like(weight, dtype=torch.float32)
    rows, columns = form.rows or weight.shape[0], form.columns or weight.shape[1]
    if rows == 1:
        return weight.float().abs().amax(1, keepdim=True).expand_as(found)
    for top in range(0, weight.shape[0], rows):
        for left in range(0, weight.shape[1], columns):
            part = (slice(top, top + rows), slice(left, left + columns))
            found[part] = weight[part].float().abs().max()
    return found


def differences(
    source: Mapping[str, Tensor], written: Mapping[str, Tensor], config: Mapping[str, Any], form: Format
) -> list[str]:
    """What of a folder's tensors and config is not as the format says, as lines.

    Args:
        source: The plain tensors.
        written: Those of the FP8 folder.
        config: Of the FP8 folder.
        form: The format.
    """
    linears = [key for key in source if LINEAR.fullmatch(key)]
    expected = set(source) | {key + form.suffix for key in linears}
    lines = [f"{key}: missing" for key in sorted(expected - set(written))]
    lines += [f"{key}: nobody asked for it" for key in sorted(set(written) - expected)]
    said = config.get("quantization_config") or {}
    lines += [
        f"config: quantization_config.{name} is {said.get(name)!r}, expected {value!r}"
        for name, value in form.declared.items()
        if said.get(name) != value
    ]
    for key in sorted(source.keys() & written.keys()):
        if key in linears:
            lines += [f"{key}: {line}" for line in _of_weight(source[key], written, key, form)]
        elif not _same(source[key], written[key]):
            lines.append(f"{key}: not the bits that it had")
    return lines


def _of_weight(weight: Tensor, written: Mapping[str, Tensor], key: str, form: Format) -> list[str]:
    codes, scale = written[key], written.get(key + form.suffix)
    if codes.dtype != torch.float8_e4m3fn or codes.shape != weight.shape:
        return [f"{codes.dtype} {list(codes.shape)}, expected torch.float8_e4m3fn {list(weight.shape)}"]
    if scale is None:
        return []  # said already
    if scale.dtype != torch.float32:
        return [f"scales are {scale.dtype}, expected torch.float32"]
    try:
        scales = _each(scale, codes.shape, form)
    except ValueError as error:
        return [f"the scale {error}"]
    most, plain = _largest(weight, form), weight.float()
    out = []
    if not bool(((scales * LARGEST - most).abs() <= most * 2.0**-7 + 2.0**-100).all()):
        out.append(f"scales do not make the largest element of each block {LARGEST:.0f}")
    off = (codes.float() * scales - plain).abs()
    bound = torch.maximum(plain.abs() * 2.0**-4, scales * 2.0**-10) * (1 + 2.0**-20)
    if not bool((off <= bound).all()):
        at = int((off / bound).nan_to_num(nan=torch.inf).argmax())
        row, column = divmod(at, weight.shape[1])
        stands, right = float(codes[row, column].float() * scales[row, column]), float(plain[row, column])
        count = int((~(off <= bound)).sum())
        out.append(f"{count:,} elements beyond half a step of e4m3: [{row}, {column}] stands for {stands}, was {right}")
    return out


def _same(one: Tensor, other: Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
    )
