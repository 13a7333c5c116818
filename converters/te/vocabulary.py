"""An embedding whose rows are cut over tensor-parallel ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from converters.te.reference import distributed


class VocabularyParallelEmbedding(torch.nn.Embedding):
    """Rows `[rank rows, (rank + 1) rows)` of an embedding: looks up what it holds, and sums over the ranks.

    Exactly one rank holds a row, so the sum rounds nothing. The parameter is `weight`, `[v/tp h]`.

    Args:
        vocabulary: Token ids of the model; rows after them are padding.
        hidden: Their width.
        padding: The id whose row has no gradient from here, as `padding_idx` of `torch.nn.Embedding`.
        dtype: Of the parameter.
        rows: Rows on each rank.
        group: The ranks.
    """

    def __init__(
        self,
        vocabulary: int,
        hidden: int,
        padding: int | None,
        *,
        dtype: torch.dtype | None,
        rows: int,
        group: ProcessGroup | None,
    ) -> None:
        start = distributed.rank_in(group) * rows
        held = padding is not None and start <= padding < start + rows
        super().__init__(rows, hidden, padding - start if padding is not None and held else None, dtype=dtype)
        self.start, self.vocabulary, self.group = start, vocabulary, group

    def forward(self, input: Tensor) -> Tensor:
        """`[... h]` of the token ids `[...]`, equal on every rank.

        Raises:
            IndexError: An id outside the vocabulary, as from any embedding.
        """
        local = input - self.start
        elsewhere = (local < 0) | (local >= self.num_embeddings)
        outside = (input < 0) | (input >= self.vocabulary)
        found = super().forward(local.masked_fill(elsewhere, 0).masked_fill(outside, self.num_embeddings))
        return distributed.reduce(found.masked_fill(elsewhere[..., None], 0), self.group)
