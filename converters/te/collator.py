"""Batches for packed (thd) training: sequences flattened into one row, cut for context parallelism, filled to a size.

Names, arguments and results are those of the BioNeMo recipe and of transformers' own flattening collator.

Source: NVIDIA/bionemo-framework, bionemo-recipes/models/llama3/collator.py; transformers 5.23.0,
    data/data_collator.py, DataCollatorWithFlattening; transformer_engine 2.20.2, pytorch/attention/
    dot_product_attention/context_parallel.py, pad_thd_sequences_for_cp and get_batch_on_this_cp_rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import IterableDataset

from converters.te.arrangement import InputError

IGNORED = -100
OF_TOKENS = ("input_ids", "labels", "shift_labels", "attention_mask", "position_ids")  # `[b s]` in a batch
LABELS = ("labels", "shift_labels")
SPLIT = ("input_ids", "attention_mask", "token_type_ids", "token_type", "labels")  # one element a token in a sample

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class DataCollatorWithFlattening:
    """Puts samples one after another into one row, with the boundaries that packed attention needs.

    A sample is `{"input_ids": [...]}`, with `labels` where they are not the input ids. The first label of each
    sequence becomes -100: shifting would compare it with the last token of the sequence before.

    Attributes:
        collator: A collator that pads and masks samples first (`DataCollatorForLanguageModeling`); its attention mask
            says what is padding. None takes samples as they are.
        return_position_ids: Also give `position_ids`, from zero in each sequence.
        pad_to_multiple_of: Total tokens become a multiple of this by a last sequence of padding (FP8 wants 16 or 32).
        pad_sequences_to_be_divisible_by: Each sequence's length becomes a multiple of this (context parallelism wants
            2 cp) by padding behind it, told by `cu_seq_lens_*_padded` and `pad_between_seqs`.
        separator_id: Label of the first token of each sequence; None keeps it.
        pad_token_id: By default that of the collator's tokenizer, else 0.

    Raises:
        InputError: Both ways of padding at once.
    """

    collator: Any = None
    return_position_ids: bool = False
    pad_to_multiple_of: int | None = None
    pad_sequences_to_be_divisible_by: int | None = None
    separator_id: int | None = IGNORED
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.pad_to_multiple_of is not None and self.pad_sequences_to_be_divisible_by is not None:
            raise InputError("pad_sequences_to_be_divisible_by and pad_to_multiple_of cannot be used together")
        for name in ("pad_to_multiple_of", "pad_sequences_to_be_divisible_by"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} must be 1 or more, got {value}")

    def __call__(self, features: Sequence[Sample], return_tensors: str | None = None) -> dict[str, Any]:
        """One packed batch.

        Args:
            features: The samples.
            return_tensors: `pt`, the only one there is.

        Returns:
            `input_ids` and `labels` `[1 t]` int64, `attention_mask` `[1 t]` (0 at padding), `cu_seq_lens_q` and `_k`
            `[n + 1]` int32, `max_length_q` and `_k`, and what the attributes ask for.

        Raises:
            InputError: No samples, an empty one, or labels of another length.
        """
        if return_tensors not in (None, "pt"):
            raise InputError(f"only return_tensors='pt' is made, got {return_tensors!r}")
        tokens, labels = self._sequences(features)
        lengths = [len(one) for one in tokens]
        if not tokens or not all(lengths) or lengths != [len(one) for one in labels]:
            raise InputError(
                f"samples of {lengths} input ids and {[len(one) for one in labels]} labels: each needs at least one "
                "token, and as many labels as tokens"
            )
        if self.separator_id is not None:
            labels = [torch.cat((one.new_tensor([self.separator_id]), one[1:])) for one in labels]
        pad, starts = self._pad_token(), _starts(lengths)
        divisor = self.pad_sequences_to_be_divisible_by or 1
        gaps = [-length % divisor for length in lengths]
        mask = [torch.ones_like(one) for one in tokens]
        positions = [torch.arange(length + gap) for length, gap in zip(lengths, gaps, strict=True)]
        if self.pad_to_multiple_of is not None and (short := -sum(lengths) % self.pad_to_multiple_of):
            tokens.append(tokens[0].new_full((short,), pad))
            labels.append(labels[0].new_full((short,), IGNORED))
            mask.append(mask[0].new_zeros(short))
            positions.append(torch.arange(short))
            lengths, gaps = [*lengths, short], [*gaps, 0]
            starts = _starts(lengths)
        longest = max(length + gap for length, gap in zip(lengths, gaps, strict=True))
        batch: dict[str, Any] = {
            "max_length_q": longest,
            "max_length_k": longest,
            "input_ids": _row(tokens, gaps, pad),
            "labels": _row(labels, gaps, IGNORED),
            "attention_mask": _row(mask, gaps, 0),
            "cu_seq_lens_q": starts,
            "cu_seq_lens_k": starts,
        }
        if self.return_position_ids:
            batch["position_ids"] = torch.cat(positions)[None]
        if self.pad_sequences_to_be_divisible_by is not None:
            padded = _starts([length + gap for length, gap in zip(lengths, gaps, strict=True)])
            batch |= {"cu_seq_lens_q_padded": padded, "cu_seq_lens_k_padded": padded, "pad_between_seqs": True}
        return batch

    def _sequences(self, features: Sequence[Sample]) -> tuple[list[Tensor], list[Tensor]]:
        if self.collator is None:
            tokens = [torch.as_tensor(one["input_ids"], dtype=torch.int64) for one in features]
            labels = [torch.as_tensor(one.get("labels", one["input_ids"]), dtype=torch.int64) for one in features]
            return tokens, labels
        batch = self.collator(features, return_tensors="pt")
        real = batch["attention_mask"].bool()
        rows = range(len(real))
        labels = batch.get("labels", batch["input_ids"])
        return [batch["input_ids"][r][real[r]] for r in rows], [labels[r][real[r]] for r in rows]

    def _pad_token(self) -> int:
        if self.pad_token_id is not None:
            return self.pad_token_id
        known = getattr(getattr(self.collator, "tokenizer", None), "pad_token_id", None)
        return known if isinstance(known, int) else 0


@dataclass(frozen=True)
class TokenPackingDataset(IterableDataset[list[Sample]]):
    """Lists of samples, each of at most `max_tokens_per_batch` tokens, in the order that they come in.

    Attributes:
        dataset: The samples.
        max_tokens_per_batch: Tokens of a list, padding of its sequences included.
        drop_last: Leave out the last list where it is not full.
        split_samples: Cut the sample that does not fit, so that lists are full; also samples longer than a list,
            which are refused otherwise.
        pad_sequences_to_be_divisible_by: As the collator's.
    """

    dataset: Iterable[Sample]
    max_tokens_per_batch: int
    drop_last: bool = True
    split_samples: bool = False
    pad_sequences_to_be_divisible_by: int | None = None

    def __iter__(self) -> Iterator[list[Sample]]:
        """The lists.

        Raises:
            InputError: A sample that is longer than a list, and may not be cut.
        """
        divisor = self.pad_sequences_to_be_divisible_by or 1
        held: list[Sample] = []
        room = self.max_tokens_per_batch
        for sample in self.dataset:
            rest: Sample | None = sample
            while rest is not None:
                length = len(rest["input_ids"])
                padded = length + -length % divisor
                if padded > self.max_tokens_per_batch and not self.split_samples:
                    raise InputError(
                        f"a sample of {length} tokens ({padded} with padding) exceeds max_tokens_per_batch="
                        f"{self.max_tokens_per_batch}: truncate it, or set split_samples=True"
                    )
                if padded <= room:
                    held, room, rest = [*held, rest], room - padded, None
                elif self.split_samples and (fits := room // divisor * divisor):
                    first, rest = _cut(rest, fits)
                    held, room = [*held, first], 0
                elif not held:
                    raise InputError(f"max_tokens_per_batch={self.max_tokens_per_batch} holds no {divisor} tokens")
                else:
                    room = 0
                if room == 0:
                    yield held
                    held, room = [], self.max_tokens_per_batch
        if held and not self.drop_last:
            yield held

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the dataset, which shuffles by it."""
        self.dataset.set_epoch(epoch)  # type: ignore[attr-defined]


def split_for_context_parallel(batch: Mapping[str, Any], cp_size: int, cp_rank: int) -> dict[str, Any]:
    """The part of a batch that one context-parallel rank computes.

    Each sequence is cut into `2 cp_size` equal chunks, of which rank r has r and `2 cp_size - 1 - r`, so that causal
    attention costs every rank the same. Labels are shifted first, while sequences are whole, and given as
    `shift_labels`; boundaries stay those of the whole batch, and masks and positions are left out (the layers know).

    Args:
        batch: `input_ids` `[b s]`, and `labels` or `shift_labels`; packed, with `cu_seq_lens_q` (and `_padded`).
        cp_size: Ranks that share each sequence.
        cp_rank: Which of them.

    Raises:
        InputError: A rank that there is not, padding before a token in an unpacked batch, or a sequence whose length
            does not divide.
    """
    if not 0 <= cp_rank < cp_size:
        raise InputError(f"cp_rank must be in [0, {cp_size}), but received {cp_rank}.")
    made = dict(batch)
    if made.get("labels") is not None and made.get("shift_labels") is None:
        made["shift_labels"] = functional.pad(made["labels"], (0, 1), value=IGNORED)[..., 1:].contiguous()
    made.pop("labels", None)
    if cp_size == 1:
        return made
    tokens = made["input_ids"]
    boundaries = made.get("cu_seq_lens_q_padded", made.get("cu_seq_lens_q"))
    if boundaries is None:
        mask = made.get("attention_mask")
        if mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any()):
            raise InputError(
                "padding before a token: context parallelism takes padding on the right, or packed sequences"
            )
        if mask is not None and made.get("shift_labels") is not None:
            made["shift_labels"] = made["shift_labels"].masked_fill(~mask.bool(), IGNORED)
        edges = [0, tokens.shape[1]]
    else:
        edges = boundaries.tolist()
    chunks = 2 * cp_size
    wrong = [b - a for a, b in pairwise(edges) if (b - a) % chunks]
    if wrong:
        raise InputError(
            f"sequences of {wrong} tokens do not divide into {chunks} chunks (2 * cp_size): collate with "
            f"pad_sequences_to_be_divisible_by={chunks}"
        )
    where = []
    for start, end in pairwise(edges):
        size = (end - start) // chunks
        for chunk in (cp_rank, chunks - 1 - cp_rank):
            where.append(torch.arange(start + chunk * size, start + (chunk + 1) * size))
    index = torch.cat(where).to(tokens.device)
    for name in ("attention_mask", "position_ids"):
        made.pop(name, None)
    for name in OF_TOKENS:
        if made.get(name) is not None:
            made[name] = made[name].index_select(1, index)
    if boundaries is None:
        for name in ("max_length_q", "max_length_k"):
            made.pop(name, None)
    else:
        made["max_length_q"] = made["max_length_k"] = max(b - a for a, b in pairwise(edges))
    return made


def _starts(lengths: Sequence[int]) -> Tensor:
    return functional.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))


def _row(parts: Sequence[Tensor], gaps: Sequence[int], fill: int) -> Tensor:
    return torch.cat([functional.pad(one, (0, gap), value=fill) for one, gap in zip(parts, gaps, strict=True)])[None]


def _cut(sample: Sample, tokens: int) -> tuple[Sample, Sample]:
    """The first `tokens` of a sample, and the rest of it; what has no element a token stays with both."""
    first = {name: value[:tokens] if name in SPLIT else value for name, value in sample.items()}
    return first, {name: value[tokens:] if name in SPLIT else value for name, value in sample.items()}
