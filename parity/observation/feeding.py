"""How a probe reaches a model, whichever: positions, what a token must not see, and filling at the end."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from parity.probes import Probe


def hidden_from(segments: Tensor) -> Tensor:
    """What each token must not see: `[b 1 s s]` bool from segments `[b s]`, true where the second is hidden.

    A token sees its own segment up to itself; padding sees itself alone, so that its softmax has something to sum.
    """
    own = segments[:, :, None] == segments[:, None, :]
    sees = own.tril() & (segments > 0)[:, :, None]
    alone = torch.eye(segments.size(1), dtype=torch.bool, device=segments.device)
    return ~(sees | alone)[:, None]


def positions_of(probe: Probe) -> npt.NDArray[np.int64]:
    """`[b s]`, a copy."""
    if probe.positions is not None:
        return probe.positions.copy()
    return np.tile(np.arange(probe.tokens.shape[1]), (len(probe.tokens), 1))


def extended(rows: npt.NDArray[np.int64], missing: int) -> Tensor:
    """`[b s]` with `missing` zeros at the end of each row: a token, a label, a position, and no segment."""
    return torch.nn.functional.pad(torch.from_numpy(rows), (0, missing))
