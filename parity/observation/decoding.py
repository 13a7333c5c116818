"""What runs inside ranks for decoding: the same tokens with a KV cache and without, and greedy text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from parity.converter import Converter, Settings
from parity.observation import observe
from parity.probes import IGNORED, Ids, Probe

BEAMS = 3
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Prompts of one batch.

    Args:
        name: For people.
        tokens: `[b s]`, filled up on the left.
        padding: How many tokens on the left of each row are filling.
        new: How many tokens to write.
    """

    name: str
    tokens: Ids
    padding: tuple[int, ...]
    new: int


@dataclass(frozen=True, kw_only=True)
class Text:
    """Greedy continuations of one batch of prompts.

    Args:
        tokens: `[b n]`.
        logits: `[b n v]` float32, by which each was chosen.
    """

    tokens: Ids
    logits: Floats


@dataclass(frozen=True, kw_only=True)
class Beams:
    """What beam search writes, the best beam of each prompt.

    Args:
        tokens: `[b n]`.
        scores: `[b]` float32: mean log-probability of what was written.
    """

    tokens: Ids
    scores: Floats


@dataclass(frozen=True, kw_only=True)
class References:
    """transformers on a probe and on prompts.

    Args:
        whole: `[b s v]`: all tokens at once, plain attention.
        fused: `[b s v]`: fused attention.
        cached: `[b s v]`: with its cache, as `stepwise` below.
        oracle: `[b s v]`: in float32 with the weights of the reduced precision; `None` in float32.
        texts: Of each batch of prompts, with the cache.
        oracles: `[b n v]`: the oracle along each of `texts`; none in float32.
        beams: Of the first batch of prompts, in float32.
    """

    whole: Floats
    fused: Floats
    cached: Floats
    oracle: Floats | None
    texts: tuple[Text, ...]
    oracles: tuple[Floats, ...]
    beams: Beams | None = None


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The imported model on the same.

    Args:
        whole: `[b s v]`: all tokens at once, without a cache.
        stepwise: `[b s v]`: a prompt, then token after token.
        parts: `[b s v]`: in parts of several tokens; `None` where layers take no mask.
        texts: Of each batch of prompts, with the cache; `None` for padded ones where layers take no mask.
        paged: `[b s v]`: as `stepwise`, with a cache of pages; `None` where there is none.
        beams: Of the first batch of prompts; `None` where the cache of beams is not asked for.
    """

    whole: Floats
    stepwise: Floats
    parts: Floats | None
    texts: tuple[Text | None, ...]
    paged: Floats | None = None
    beams: Beams | None = None


def references(
    folder: Path, probe: Probe, prefill: int, prompts: Sequence[Prompt], precision: str, beams: bool = False
) -> References:
    """Ask transformers: the probe whole, and one token at a time after `prefill`; and to continue each prompt.

    With `beams`, by beam search too.
    """
    from transformers import DynamicCache

    def whole(**loading: Any) -> Floats:
        return observe.hf_observation(observe.hf_model(folder, dtype=precision, **loading), probe).logits

    model = observe.hf_model(folder, dtype=precision)
    asked = torch.from_numpy(probe.tokens)
    cache = DynamicCache(config=model.config)
    pieces: list[Tensor] = []
    with torch.no_grad():
        for start, stop in one_by_one(prefill, asked.size(1)):
            pieces.append(model(asked[:, start:stop], past_key_values=cache, use_cache=True).logits)
    texts = [greedy(model, prompt) for prompt in prompts]
    return References(
        whole=observe.hf_observation(model, probe).logits,
        fused=whole(attention="sdpa"),
        cached=torch.cat(pieces, dim=1).float().numpy(),
        oracle=whole(oracle=True) if precision != "fp32" else None,
        texts=tuple(texts),
        beams=beam_search(model, prompts[0]) if beams else None,
        oracles=() if precision == "fp32" else tuple(oracle_along(folder, prompts, texts, precision)),
    )


def greedy(model: Any, prompt: Prompt) -> Text:
    """The greedy continuation of each prompt, by transformers' `generate()` with the model's cache."""
    said = _generated(model, prompt, output_logits=True)
    logits = torch.stack(said.logits, dim=1)
    return Text(tokens=said.sequences[:, prompt.tokens.shape[1] :].cpu().numpy(), logits=logits.float().cpu().numpy())


def beam_search(model: Any, prompt: Prompt) -> Beams:
    """The best of `BEAMS` continuations of each prompt: the cache is reordered at nearly each token."""
    said = _generated(model, prompt, num_beams=BEAMS, output_scores=True)
    return Beams(
        tokens=said.sequences[:, prompt.tokens.shape[1] :].cpu().numpy(), scores=said.sequences_scores.cpu().numpy()
    )


def _generated(model: Any, prompt: Prompt, **options: Any) -> Any:
    from transformers import GenerationConfig

    ids = torch.from_numpy(prompt.tokens)
    visible = torch.arange(ids.size(1)) >= torch.tensor(prompt.padding)[:, None]
    device, own = next(model.parameters()).device, model.generation_config
    # The checkpoint's own stop tokens would end a text early: only the count of tokens ends these.
    model.generation_config = GenerationConfig()
    said = model.generate(
        input_ids=ids.to(device),
        attention_mask=visible.long().to(device),
        generation_config=GenerationConfig(
            max_new_tokens=prompt.new,
            do_sample=False,
            use_cache=True,
            return_dict_in_generate=True,
            pad_token_id=0,
            **options,
        ),
    )
    model.generation_config = own
    return said


def oracle_along(folder: Path, prompts: Sequence[Prompt], texts: Sequence[Text], precision: str) -> list[Floats]:
    """What transformers would have chosen each token of `texts` by, `[b n v]`: in float32, with all before it given."""
    model = observe.hf_model(folder, dtype=precision, oracle=True)
    found = []
    for prompt, text in zip(prompts, texts, strict=True):
        tokens = np.concatenate([prompt.tokens, text.tokens[:, :-1]], axis=1)
        positions = np.arange(tokens.shape[1]) - np.array(prompt.padding)[:, None]
        whole = Probe(
            name=prompt.name,
            tokens=tokens,
            labels=np.full_like(tokens, IGNORED),
            positions=np.maximum(positions, 0),
            segments=(positions >= 0).astype(np.int64),
        )
        found.append(observe.hf_observation(model, whole).logits[:, prompt.tokens.shape[1] - 1 :])
    return found


def decoded(
    converter: Converter,
    folder: Path,
    settings: Settings,
    probe: Probe,
    prefill: int,
    prompts: Sequence[Prompt],
) -> Decoded | None:
    """Ask the imported model the same; on the rank that has the answer."""
    from parity.observation import backend

    side = backend.of(settings)
    models = side.built(converter, folder, settings)
    vocab = int(json.loads((folder / "config.json").read_text())["vocab_size"])
    return side.decoded(models, settings, probe, prefill, prompts, vocab)


def one_by_one(prefill: int, length: int) -> list[tuple[int, int]]:
    """From where to where tokens are fed together: `prefill` of them, then each alone."""
    return list(pairwise([0, *range(prefill, length + 1)]))


def in_parts(prefill: int, length: int) -> list[tuple[int, int]]:
    """From where to where tokens are fed together: always several."""
    return list(pairwise([0, prefill // 3, prefill, (prefill + length) // 2, length]))
