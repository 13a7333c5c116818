"""Elements put where they go: as they are, or added to and rounded as torch does; torch comes only for those."""

from __future__ import annotations

import numpy as np

from converters.errors import CheckpointError
from converters.files.mapped import Bits, bits_of
from converters.tensors import FLOATS, ITEMSIZE


def check_cast(key: str, source: str, target: str, *, cast: bool) -> None:
    """Refuse a dtype that would change without having been asked to, or from one kind to another.

    Raises:
        CheckpointError: It would.
    """
    if source == target:
        return
    if (source in FLOATS) != (target in FLOATS):
        raise CheckpointError(
            f"{key}: {source} -> {target}: a cast rounds floats to floats; integers are no numbers to round. The "
            "checkpoint is quantised, or its dtypes are damaged: dequantise it, or look at what wrote it"
        )
    if not cast:
        raise CheckpointError(
            f"{key}: {source} -> {target}: dtypes differ, and a cast must be asked for (on the command line, --dtype)"
        )


def place(into: Bits, dtype: str, values: Bits, held: str, shift: float = 0.0) -> int:
    """Write elements.

    Args:
        into: Where they go, of the shape of `values`.
        dtype: What they are there.
        values: The elements.
        held: What they are.
        shift: Added to each, in the dtype that it is held in; 0 keeps every bit.

    Returns:
        How many finite ones are too large for `dtype`, and became infinite.
    """
    if held == dtype and not shift:
        np.copyto(into, values)
        return 0
    import torch

    found = torch.from_numpy(np.array(values, order="C")).view(getattr(torch, held))
    made = (found + shift if shift else found).to(getattr(torch, dtype))
    np.copyto(into, made.view(getattr(torch, bits_of(dtype).name)).numpy())
    infinite = made.isinf() if held != dtype and ITEMSIZE[dtype] > 1 else None
    return int((infinite & found.isfinite()).sum()) if infinite is not None and infinite.any() else 0


def constant(value: float, dtype: str) -> Bits:
    """The bits of a number, as an array without dims."""
    if value == 0:
        return np.zeros((), bits_of(dtype))
    import torch

    made: Bits = torch.tensor(value, dtype=getattr(torch, dtype)).view(getattr(torch, bits_of(dtype).name)).numpy()
    return made
