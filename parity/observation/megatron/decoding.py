"""A Megatron-Core model with its KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from converters.topology import Coord
from parity.converter import Settings
from parity.observation.decoding import Decoded, Floats, Prompt, Text, in_parts, one_by_one
from parity.observation.megatron.observe import megatron_observation
from parity.probes import Probe


def decoded(
    models: Sequence[Any],
    settings: Settings,
    probe: Probe,
    prefill: int,
    prompts: Sequence[Prompt],
    vocab_size: int,
) -> Decoded | None:
    """Ask with a cache, on the last stage's rank with tp, cp and dp index 0."""
    from converters.megatron.generation import generate, honours_masks
    from converters.megatron.parallel import current_coord

    masks = honours_masks(models)
    asked = torch.from_numpy(probe.tokens)
    whole = megatron_observation(models, probe, topology=settings.topology, vocab_size=vocab_size)
    stepwise = _fed(models, asked, one_by_one(prefill, asked.size(1)), vocab_size)
    parts = _fed(models, asked, in_parts(prefill, asked.size(1)), vocab_size) if masks else None
    texts: list[Text | None] = []
    for prompt in prompts:
        if any(prompt.padding) and not masks:
            texts.append(None)
            continue
        ids = torch.from_numpy(prompt.tokens)
        found = generate(models, ids, prompt.new, vocab_size=vocab_size, padding=prompt.padding, return_logits=True)
        logits = None if found.logits is None else found.logits.cpu().numpy()
        texts.append(None if logits is None else Text(tokens=found.tokens.numpy(), logits=logits))
    if current_coord() != Coord(pp=settings.topology.pp - 1):
        return None
    assert whole is not None
    assert stepwise is not None
    return Decoded(whole=whole.logits, stepwise=stepwise, parts=parts, texts=tuple(texts))


def _fed(chunks: Sequence[Any], tokens: Tensor, pieces: Sequence[tuple[int, int]], vocab: int) -> Floats | None:
    """Logits `[b s v]` of every token, fed piece by piece to a model with a cache; on the last stage."""
    from converters.megatron.generation import Decoder

    decoder = Decoder(chunks, batch=len(tokens), max_length=tokens.size(1), every_token=True)
    said = [decoder.feed(tokens[:, start:stop]) for start, stop in pieces]
    logits = [one[..., :vocab].float().cpu() for one in said if one is not None]
    return torch.cat(logits, dim=1).numpy() if logits else None
