"""A model on Transformer Engine's layers with its KV cache, contiguous and paged, and `generate()` with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from converters.topology import Coord
from parity.converter import Settings
from parity.observation.decoding import (
    Decoded,
    Floats,
    Prompt,
    beam_search,
    greedy,
    in_parts,
    one_by_one,
)
from parity.observation.te.observe import tapped
from parity.probes import Probe

PAGE = 16
"""Tokens a page: several pages a sequence."""


def decoded(
    models: Sequence[Any],
    settings: Settings,
    probe: Probe,
    prefill: int,
    prompts: Sequence[Prompt],
    vocab_size: int,
) -> Decoded | None:
    """Ask with a cache, on the rank with tp and cp index 0. Collective."""
    (model,) = models
    model.eval()
    _, whole = tapped(models, probe, settings=settings, vocab_size=vocab_size, wanted=None)
    asked = torch.from_numpy(probe.tokens)
    pieces, parts = (way(prefill, asked.size(1)) for way in (one_by_one, in_parts))
    stepwise, in_several = _fed(model, asked, pieces), _fed(model, asked, parts)
    paged = _fed(model, asked, pieces, paged=True)
    texts = [greedy(model, prompt) for prompt in prompts]
    beams = beam_search(model, prompts[0]) if settings.precision == "fp32" else None
    if settings.topology.coord(dist.get_rank()) != Coord():
        return None
    assert whole is not None
    return Decoded(
        whole=whole.logits, stepwise=stepwise, parts=in_several, texts=tuple(texts), paged=paged, beams=beams
    )


def _fed(model: Any, tokens: Tensor, pieces: Sequence[tuple[int, int]], *, paged: bool = False) -> Floats:
    """Logits `[b s v]` of every token, fed piece by piece to the model with a cache."""
    from converters.te.generation import cache_for

    device = next(model.parameters()).device
    pages: dict[str, Any] = {"paged": True, "page_size": 256 if device.type == "cuda" else PAGE} if paged else {}
    cache = cache_for(model, max_batch_size=len(tokens), max_sequence_length=tokens.size(1), **pages)
    said = []
    with torch.no_grad():
        for start, stop in pieces:
            ids = tokens[:, start:stop].to(device)
            said.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits.float().cpu())
    found: Floats = torch.cat(said, dim=1).numpy()
    return found
