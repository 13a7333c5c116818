"""What a model is asked: token ids, with labels, as plain arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

IGNORED = -100
"""The label of a token that nothing follows, as transformers and torch have it."""
Ids = npt.NDArray[np.int64]

PROSE = (
    "A checkpoint is a promise: that the model which was trained is the model which will be served. Every "
    "hand-over rewrites each tensor, and a mistake in the rewriting is silent, because a model with its keys "
    "and values exchanged in one layer of thirty still answers in whole sentences. It is only a little worse, "
    "and nobody can say why. In 1998 there were 3,141 ways to store a matrix; by 2026 there were 59,265 more, "
    "and each of them had its own idea of rows.",
    "The harbour master wrote the tide into the book at 04:37, closed it, and walked down to the quay. Two "
    "boats had come in during the night, one with cod and one with nothing. 'You might have turned back,' he "
    "said to the second. 'We might,' said the skipper, 'but then we should never have known that there was "
    "nothing there.' He thought about that for some time, and in the end he went back to his office and wrote "
    "it down beneath the tide, in pencil.",
)
"""Two texts of about a hundred tokens each, written for this probe."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a model is asked.

    Args:
        name: For people.
        tokens: `[b s]`.
        labels: `[b s]`: the token that follows each; `IGNORED` where none does, and then the loss there is 0.
        positions: `[b s]`: what RoPE rotates by; `None` is 0 to s - 1.
        segments: `[b s]`: which of the sequences in its row a token belongs to, counted from 1, and 0 for padding. A
            token sees earlier tokens of its own segment only. `None` is one segment a row.
    """

    name: str
    tokens: Ids
    labels: Ids
    positions: Ids | None = None
    segments: Ids | None = None


def probe(config: Mapping[str, Any], folder: Path, *, length: int = 96, prose: bool) -> Probe:
    """Two sequences of `length` tokens for the model in `folder`.

    Prose where the weights are real, random ids where they are not. Random ids always hold the first and the last row
    of the vocabulary.

    Args:
        config: Its config; only `vocab_size` is read.
        folder: Holds `tokenizer.json` where `prose` is asked for.
        length: Tokens a sequence.
        prose: Ask with text.
    """
    vocab = int(config["vocab_size"])
    if prose and (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        rows = [tokenizer.encode(text, add_special_tokens=False).ids for text in PROSE]
        length = min(length, *(len(row) - 1 for row in rows))
        ids = np.array([row[: length + 1] for row in rows], dtype=np.int64)
        return Probe(name=f"prose, 2 x {length} tokens", tokens=ids[:, :-1], labels=ids[:, 1:])
    ids = np.random.default_rng(20).integers(0, vocab, size=(2, length + 1), dtype=np.int64)
    ids[0, 1], ids[1, 3] = 0, vocab - 1
    return Probe(name=f"random ids, 2 x {length} tokens", tokens=ids[:, :-1], labels=ids[:, 1:])
