"""The imported model says with a KV cache what it says without, and writes what transformers writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from parity.checks import decoding

Run = Callable[[Any], None]


def test_decoding(run: Run) -> None:
    """Logits with the cache against the whole forward and transformers, and greedy text, token for token."""
    run(decoding.with_cache)
