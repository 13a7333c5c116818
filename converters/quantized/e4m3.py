"""The arithmetic: a scale for each block of a matrix, e4m3 codes, and how far what they stand for is from what was.

A scale is a bfloat16 number, so that code times scale is exact in float32, whatever it is stored in. It is taken from
the block's largest magnitude *rounded to bfloat16 first*. That makes quantising idempotent: the block's largest code is
448, 448 scales rounded to bfloat16 give that scale again, and no other code is so near to a neighbour that a rounding
to bfloat16 moves it. Codes and scales come back bit for bit from the float32 and from the bfloat16 values.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from converters.values import ROUNDOFF

CODES = "float8_e4m3fn"
MAX = 448.0
SMALLEST = 2.0**-120
"""Of a block of zeros too. Smaller ones would leave its codes too few bits among bfloat16's subnormal numbers."""
LARGEST = 145 / 128 * 2.0**119
"""448 of a larger one would be infinite in bfloat16."""
CHUNK = 1 << 20
"""Elements that are worked on at a time, so that what is needed besides the tensor is small."""

Block = tuple[int | None, int | None]
"""Rows and columns that share a scale; `None` is all of them."""


def scale_shape(shape: tuple[int, ...], block: Block) -> tuple[int, int]:
    """The grid of blocks over a matrix, those at its edges in part."""
    rows, columns = (extent or whole for extent, whole in zip(block, shape, strict=True))
    return -(-shape[0] // rows), -(-shape[1] // columns)


def chunks(rows: int, columns: int) -> Iterator[slice]:
    """Rows, a few at a time."""
    step = max(1, CHUNK // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def largest(weight: torch.Tensor, block: Block) -> torch.Tensor:
    """The largest magnitude of each block.

    Args:
        weight: `[rows columns]`, any floating dtype.
        block: What shares a scale.

    Returns:
        float32 `[blocks-of-rows blocks-of-columns]`.
    """
    rows, columns = weight.shape
    down, across = scale_shape((rows, columns), block)
    height, width = block[0] or rows, block[1] or columns
    of_rows = torch.zeros(down * height, across)
    for at in chunks(rows, columns):
        part = torch.nn.functional.pad(weight[at].float().abs(), (0, across * width - columns))
        of_rows[at] = part.view(-1, across, width).amax(2)
    return of_rows.view(down, height, across).amax(1)


def scales_for(magnitudes: torch.Tensor) -> torch.Tensor:
    """The scale under which each magnitude rounds to 448: float32, each a bfloat16 number, never zero."""
    rounded = magnitudes.to(torch.bfloat16).float()
    return (rounded / MAX).to(torch.bfloat16).float().clamp(SMALLEST, LARGEST)


def spread(scales: torch.Tensor, block: Block, at: slice, shape: torch.Size) -> torch.Tensor:
    """The scale of each element of some rows, as float32 that broadcasts over them."""
    rows, columns = shape
    chosen = scales.float()[torch.arange(at.start, at.stop) // (block[0] or rows)]
    if chosen.shape[1] == 1:
        return chosen
    return chosen.repeat_interleave(block[1] or columns, dim=1)[:, :columns]


def encode(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The nearest codes, ties to even, saturating: not every torch's own cast does."""
    return (values.float() / scales).clamp(-MAX, MAX).to(torch.float8_e4m3fn)


def decode(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What codes stand for: the float32 product, rounded once to `dtype`."""
    return (codes.float() * scales).to(dtype)


def worst(values: torch.Tensor, restored: torch.Tensor, scales: torch.Tensor) -> float:
    """The largest error of there and back, as a fraction of what `values.Quantize` promises for that element."""
    exact = values.float()
    binade = (exact / scales).abs().clamp(2.0**-6, MAX).view(torch.int32).bitwise_and(0xFF << 23).view(torch.float32)
    bound = scales * (binade / 16) + ROUNDOFF["float32"] * exact.abs()
    if restored.dtype != torch.float32:
        bound = bound + ROUNDOFF[str(restored.dtype).removeprefix("torch.")] * (exact.abs() + bound) + 2.0**-134
    return float(((exact - restored.float()).abs() / bound).max()) if exact.numel() else 0.0


def misfit(tensor: torch.Tensor) -> str | None:
    """The first element that is no finite number, as text, or `None`."""
    for at in chunks(*tensor.shape):
        part = tensor[at].float()
        if not bool(torch.isfinite(part.sum())):  # a sum may overflow: then look at each
            odd = (~torch.isfinite(part)).nonzero()
            if len(odd):
                row, column = odd[0].tolist()
                return f"element [{at.start + row}, {column}] is {float(part[row, column])}"
    return None
