"""What models are trained on, and with which optimizer: plain data, the same for both sides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.topology import Topology
from parity.probes import IGNORED, PROSE, Ids

STEPS = 5
LENGTH = 16
"""Tokens a sequence: what a gradient is made of, the forward checks have already held against longer ones."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """The global batch of one optimizer step.

    Args:
        tokens: `[rows s]`.
        labels: `[rows s]`: the token that follows each; `IGNORED` at the end of most rows, a different number in each,
            so that a mean taken over part of the batch is not the mean over all of it.
    """

    tokens: Ids
    labels: Ids


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """AdamW. No constant is a default of torch or of Megatron-Core.

    Args:
        lr: Learning rate, constant.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment: of the size of gradients, or it would not be felt.
        weight_decay: Decoupled; biases and norms (everything of one dim) have none.
    """

    lr: float = 2e-3
    betas: tuple[float, float] = (0.83, 0.94)
    eps: float = 3e-5
    weight_decay: float = 0.3


@dataclass(frozen=True, kw_only=True)
class Deal:
    """How a global batch is dealt out in a layout: `dp` shares of `microbatches` times `size` rows.

    One-forward-one-backward has a steady state only with more micro-batches than stages, and with stages that send both
    ways at once a pipeline has most to lose. Two rows a micro-batch: with one, batch and sequence cannot be confused.
    """

    dp: int
    microbatches: int
    size: int = 2

    @classmethod
    def of(cls, topology: Topology) -> Deal:
        """The deal for a layout; interleaving needs a multiple of the stages."""
        stages = topology.pp
        return cls(dp=topology.dp, microbatches=2 * stages if stages > 1 else max(1, 2 // topology.dp))

    @property
    def rows(self) -> int:
        """Rows of the global batch."""
        return self.dp * self.microbatches * self.size


def lessons(config: Mapping[str, Any], folder: Path, *, rows: int, prose: bool) -> list[Lesson]:
    """A different global batch for each of `STEPS` steps.

    No input is the padding token: transformers gives its row of the embedding no gradient, whatever it means, and
    Megatron-Core knows no such row. A trainer masks padding on both sides, so that neither sees it.

    Args:
        config: The model's config; only `vocab_size` and `pad_token_id` are read.
        folder: Holds `tokenizer.json` where `prose` is asked for.
        rows: Sequences a batch.
        prose: Windows of text, for real weights; else random ids with the first and last row of the vocabulary.
    """
    vocab = int(config["vocab_size"])
    count = STEPS * rows
    if prose and (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        ids = np.array([token for text in PROSE for token in tokenizer.encode(text, add_special_tokens=False).ids])
        starts = np.arange(count) * 7 % (len(ids) - LENGTH)
        whole = ids[starts[:, None] + np.arange(LENGTH + 1)].astype(np.int64)
    else:
        whole = np.random.default_rng(5).integers(0, vocab, size=(count, LENGTH + 1), dtype=np.int64)
        whole[::rows, 1], whole[::rows, 3] = 0, vocab - 1
    whole[whole == config.get("pad_token_id")] = vocab // 2
    tokens, labels = whole[:, :-1], whole[:, 1:].copy()
    for row in range(count):
        labels[row, LENGTH - 3 * row % 7 :] = IGNORED
    return [Lesson(tokens=tokens[at : at + rows], labels=labels[at : at + rows]) for at in range(0, count, rows)]
