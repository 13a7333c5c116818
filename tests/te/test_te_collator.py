"""Flattening, packing to a size, and cutting for context parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_model import VOCABULARY, assert_within_floors, llama, nvllama
from torch import Tensor
from transformers import DataCollatorWithFlattening as TransformersCollator

from converters.te.arrangement import InputError
from converters.te.collator import DataCollatorWithFlattening, TokenPackingDataset, split_for_context_parallel

torch.set_num_threads(1)
SAMPLES: list[dict[str, Any]] = [
    {"input_ids": [5, 6, 7, 8, 9]},
    {"input_ids": [11, 12]},
    {"input_ids": [21, 22, 23, 24], "labels": [-100, -100, 23, 24]},
]


def test_flattening_is_that_of_transformers() -> None:
    samples = [{"labels": one["input_ids"], **one} for one in SAMPLES]  # theirs asks the first sample for all
    theirs = TransformersCollator(return_flash_attn_kwargs=True)(samples)
    ours = DataCollatorWithFlattening(return_position_ids=True)(samples)
    for name in ("input_ids", "labels", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k"):
        assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])), name
    assert ours["cu_seq_lens_q"].dtype == torch.int32
    assert (ours["max_length_q"], ours["max_length_k"]) == (theirs["max_length_q"], theirs["max_length_k"]) == (5, 5)


def test_a_last_sequence_fills_up_to_a_multiple() -> None:
    batch = DataCollatorWithFlattening(pad_to_multiple_of=16, pad_token_id=3, return_position_ids=True)(SAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 11, 12, 21, 22, 23, 24, 3, 3, 3, 3, 3]]
    assert batch["labels"].tolist() == [[-100, 6, 7, 8, 9, -100, 12, -100, -100, 23, 24] + [-100] * 5]
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 7, 11, 16]
    assert batch["attention_mask"].sum() == 11
    assert batch["max_length_q"] == 5
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 0, 1, 2, 3, 4]]
    assert "pad_between_seqs" not in batch


def test_each_sequence_fills_up_to_a_multiple() -> None:
    batch = DataCollatorWithFlattening(pad_sequences_to_be_divisible_by=4, pad_token_id=3)(SAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 3, 3, 3, 11, 12, 3, 3, 21, 22, 23, 24]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 7, 11]
    assert batch["cu_seq_lens_q_padded"].tolist() == batch["cu_seq_lens_k_padded"].tolist() == [0, 8, 12, 16]
    assert batch["pad_between_seqs"] is True
    assert batch["max_length_q"] == 8
    assert batch["labels"][0, 5:8].tolist() == [-100] * 3


class _Masking:
    """A collator that pads on the left and replaces a token, as one for masked language models would."""

    class tokenizer:
        pad_token_id = 2

    def __call__(self, features: list[dict[str, Any]], return_tensors: str) -> dict[str, Tensor]:
        width = max(len(one["input_ids"]) for one in features)
        rows = torch.tensor([[2] * (width - len(one["input_ids"])) + one["input_ids"] for one in features])
        mask = torch.tensor([[0] * (width - len(one["input_ids"])) + [1] * len(one["input_ids"]) for one in features])
        return {"input_ids": rows.where(rows != 7, 60), "labels": rows, "attention_mask": mask}


def test_a_collator_inside_masks_first() -> None:
    collate = DataCollatorWithFlattening(_Masking(), pad_to_multiple_of=8, separator_id=None)
    batch = collate([one for one in SAMPLES if "labels" not in one])
    assert batch["input_ids"].tolist() == [[5, 6, 60, 8, 9, 11, 12, 2]]
    assert batch["labels"].tolist() == [[5, 6, 7, 8, 9, 11, 12, -100]]


def test_a_collated_batch_gives_the_logits_and_loss_of_its_samples() -> None:
    model = nvllama(llama(), "thd")
    wide = nvllama(llama(), "thd").double()
    for collate in (
        DataCollatorWithFlattening(),
        DataCollatorWithFlattening(pad_to_multiple_of=16),
        DataCollatorWithFlattening(pad_sequences_to_be_divisible_by=4, return_position_ids=True),
    ):
        batch = collate(SAMPLES)
        out = model(**batch)
        found = out.logits[batch["attention_mask"].bool()]
        rows = [torch.tensor([one["input_ids"]]) for one in SAMPLES]
        alone = torch.cat([model(row).logits[0] for row in rows])
        assert_within_floors(found, [alone], torch.cat([wide(row).logits[0] for row in rows]), what="logits")
        labels = torch.cat([torch.tensor([*(one.get("labels") or one["input_ids"])[1:], -100]) for one in SAMPLES])
        loss = torch.nn.functional.cross_entropy(alone, labels)
        assert_within_floors(out.loss, [loss], wide(**batch).loss, what="loss")


@pytest.mark.parametrize(
    ("options", "samples", "says"),
    [
        ({"pad_to_multiple_of": 8, "pad_sequences_to_be_divisible_by": 4}, SAMPLES, "cannot be used together"),
        ({"pad_to_multiple_of": 0}, SAMPLES, "1 or more"),
        ({}, [], "at least one token"),
        ({}, [{"input_ids": []}], "at least one token"),
        ({}, [{"input_ids": [1, 2], "labels": [1]}], "as many labels"),
    ],
)
def test_what_cannot_be_collated_is_refused(options: dict[str, Any], samples: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        DataCollatorWithFlattening(**options)(samples)


def lengths(dataset: TokenPackingDataset) -> list[list[int]]:
    return [[len(one["input_ids"]) for one in batch] for batch in dataset]


def test_samples_are_packed_in_order_up_to_a_size() -> None:
    samples = [{"input_ids": list(range(n)), "id": n} for n in (4, 3, 5, 2, 8, 1)]
    assert lengths(TokenPackingDataset(samples, 8)) == [[4, 3], [5, 2], [8]]
    assert lengths(TokenPackingDataset(samples, 8, drop_last=False)) == [[4, 3], [5, 2], [8], [1]]
    assert lengths(TokenPackingDataset(samples, 8, drop_last=False, pad_sequences_to_be_divisible_by=4)) == [
        [4, 3],
        [5],
        [2],
        [8],
        [1],
    ]
    with pytest.raises(InputError, match="a sample of 8 tokens"):
        list(TokenPackingDataset(samples, 7))


def test_samples_are_cut_where_asked() -> None:
    samples = [{"input_ids": list(range(n)), "labels": list(range(n)), "id": n} for n in (4, 3, 19, 2)]
    batches = list(TokenPackingDataset(samples, 8, split_samples=True, drop_last=False))
    assert [[len(one["input_ids"]) for one in batch] for batch in batches] == [[4, 3, 1], [8], [8], [2, 2]]
    pieces = [one for batch in batches for one in batch if one["id"] == 19]
    assert [token for one in pieces for token in one["input_ids"]] == list(range(19))
    assert all(one["labels"] == one["input_ids"] for one in pieces)
    padded = TokenPackingDataset(samples, 8, split_samples=True, drop_last=False, pad_sequences_to_be_divisible_by=4)
    assert lengths(padded) == [[4, 3], [8], [8], [3, 2]]


def test_context_parallel_ranks_share_a_batch_in_zigzag() -> None:
    batch = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None] + 10}
    first, second = (split_for_context_parallel(batch, 2, rank) for rank in range(2))
    assert first["input_ids"].tolist() == [[0, 1, 6, 7]]
    assert second["input_ids"].tolist() == [[2, 3, 4, 5]]
    assert first["shift_labels"].tolist() == [[11, 12, 17, -100]]
    assert second["shift_labels"].tolist() == [[13, 14, 15, 16]]
    assert "labels" not in first


def test_context_parallel_ranks_share_each_packed_sequence() -> None:
    batch = DataCollatorWithFlattening(pad_sequences_to_be_divisible_by=4)(SAMPLES)
    parts = [split_for_context_parallel(batch, 2, rank) for rank in range(2)]
    assert parts[0]["input_ids"].tolist() == [[5, 6, 0, 0, 11, 0, 21, 24]]
    assert parts[1]["input_ids"].tolist() == [[7, 8, 9, 0, 12, 0, 22, 23]]
    assert parts[1]["shift_labels"].tolist() == [[8, 9, -100, -100, -100, -100, 23, 24]]
    assert all(torch.equal(one["cu_seq_lens_q_padded"], batch["cu_seq_lens_q_padded"]) for one in parts)
    assert not {"attention_mask", "position_ids", "labels"} & parts[0].keys()
    with pytest.raises(InputError, match="pad_sequences_to_be_divisible_by=6"):
        split_for_context_parallel(batch, 3, 0)
    with pytest.raises(InputError, match=r"cp_rank must be in \[0, 2\)"):
        split_for_context_parallel(batch, 2, 2)


def test_shifted_labels_give_the_loss_of_labels() -> None:
    model = nvllama(llama(), "bshd")
    row = torch.randint(1, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": row, "labels": row}
    assert torch.equal(model(**split_for_context_parallel(batch, 1, 0)).loss, model(**batch).loss)
