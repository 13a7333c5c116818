"""FP8 and below, as Transformer Engine computes them, in torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def autocast(enabled: bool = True, recipe: Any = None, amax_reduction_group: Any = None) -> Iterator[None]:
    """GEMMs inside run in `recipe`."""
    yield


@contextlib.contextmanager
def quantized_model_init(enabled: bool = True, recipe: Any = None) -> Iterator[None]:
    """Layers made inside hold quantised weights."""
    yield
