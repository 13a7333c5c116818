"""Run in ranks: delayed scaling whose largest magnitudes are shared, or not."""

from __future__ import annotations

import torch
import torch.distributed as dist

from converters.te.quantization import autocast
from converters.te.quantization.recipes import DelayedScaling
from converters.te.reference.module import Module


def reduced_scales() -> tuple[list[float], list[float]]:
    """Scales of input, weight, output and gradient after one step, under `reduce_amax` and without it."""
    torch.set_num_threads(1)
    first = dist.get_rank() == 0
    found = []
    for shared in (True, False):
        module = Module()
        x = torch.full((8, 16), 7.0 if first else 3.5, requires_grad=True)
        weight = torch.nn.Parameter(torch.full((16, 16), 1.0 if first else 2.0))
        with autocast(recipe=DelayedScaling(amax_history_len=2, reduce_amax=shared)):
            out = module.gemm(x, weight)
        out.backward(torch.full((8, 16), 7.0 if first else 3.5))
        assert module.delayed is not None
        found.append([*module.delayed.forward.scale.tolist(), float(module.delayed.backward.scale[0])])
    return found[0], found[1]
