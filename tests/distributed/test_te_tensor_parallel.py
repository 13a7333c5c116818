"""The Transformer Engine model under tensor and sequence parallelism, in real ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import te_ranks
import torch
from te_ranks import Compared, Probe

from converters.topology import Topology
from parity.ranks import Zygote
from parity.seeded import write_checkpoint
from parity.tiny import odd_config, with_layers

Run = Callable[..., list[Any]]
# Nine heads in three groups, as SmolLM2's; neither groups nor vocabulary divide over 2 or 4.
SIZES = {
    "hidden_size": 36,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "intermediate_size": 44,
    "vocab_size": 61,
    "bos_token_id": 58,
    "eos_token_id": 59,
    "pad_token_id": 60,
}
BIASED = with_layers(odd_config() | SIZES, 2)
TIED = BIASED | {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True}
PROBES = [
    Probe(layout="bshd", lengths=(17, 17, 17, 17), room=(17, 17, 17, 17)),
    Probe(layout="bshd", lengths=(17, 11, 5, 13), room=(17, 17, 17, 17), left=(2,)),
    Probe(layout="thd", lengths=(17, 11, 5, 13), room=(17, 17, 17, 17), left=(2,)),
    Probe(layout="thd", lengths=(13, 1, 22, 6), room=(16, 2, 22, 8), packed=True),
]
CASES = [
    ("biased", Topology(tp=2)),
    ("tied", Topology(tp=4)),
    ("tied", Topology(tp=2, sp=True)),
    ("biased", Topology(tp=4, sp=True)),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("te")
    return {name: write_checkpoint(config, root / name) for name, config in (("biased", BIASED), ("tied", TIED))}


@pytest.fixture(scope="module")
def answered(folders: dict[str, Path], zygote: Zygote) -> dict[str, Any]:
    return {name: zygote.run(te_ranks.answers, folder, PROBES)[0] for name, folder in folders.items()}


def assert_all_passed(results: list[list[Compared]]) -> None:
    wrong = [f"rank {rank}: {one}" for rank, found in enumerate(results) for one in found if not one.passed]
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize(("name", "topology"), CASES, ids=str)
def test_logits_loss_and_every_gradient(
    name: str, topology: Topology, folders: dict[str, Path], answered: dict[str, Any], in_ranks: Run
) -> None:
    assert_all_passed(in_ranks(te_ranks.compared, folders[name], topology, PROBES, answered[name]))


def test_one_rank_is_the_same_model_to_the_bit(folders: dict[str, Path], in_ranks: Run) -> None:
    (found,) = in_ranks(te_ranks.alone, folders["biased"], Topology())
    assert all(found.values()), found


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("layout", ["bshd", "thd"])
def test_every_rank_generates_the_tokens_of_one(
    layout: str, options: dict[str, Any], folders: dict[str, Path], in_ranks: Run
) -> None:
    (expected,) = in_ranks(te_ranks.generated, folders["tied"], Topology(), layout, **options)
    for tokens in in_ranks(te_ranks.generated, folders["tied"], Topology(tp=2), layout, **options):
        assert torch.equal(tokens, expected)


def test_a_new_model_has_zeros_for_what_pads_it(folders: dict[str, Path], in_ranks: Run) -> None:
    first, *_, last = in_ranks(te_ranks.started, folders["biased"], Topology(tp=4))
    assert not first  # the first rank has a group of the model's own
    assert set(last) >= {"model.embed_tokens.weight", "lm_head.weight"}
    assert sum("layernorm_qkv" in name for name in last) == sum("proj" in name for name in last) == 2
    for name, (left, padding) in last.items():
        assert (left, padding > 0) == (0, True), name


def test_sequence_parallelism_says_what_it_cannot_cut(folders: dict[str, Path], in_ranks: Run) -> None:
    topology = Topology(tp=2, sp=True)
    assert "5 tokens over tp=2" in in_ranks(te_ranks.refused, folders["tied"], topology, "thd", (3, 2))[0]
    assert "3 sequences" in in_ranks(te_ranks.refused, folders["tied"], topology, "bshd", (4, 4, 4))[0]


def test_meshes_that_the_model_cannot_have(folders: dict[str, Path], zygote: Zygote) -> None:
    meshes = [Topology(pp=2), Topology(pp=2, vpp=2), Topology(ep=2, dp=2), Topology(tp=8), Topology(tp=2)]
    ((*others, eight, two),) = zygote.run(te_ranks.meshes_refused, folders["tied"], meshes)
    assert ["runs under tp, cp, dp and sequence parallelism" in said for said in others] == [True] * 3, others
    assert "intermediate_size=44 does not divide over tp=8" in eight
    assert "a mesh of 2 ranks, and this process group has 1" in two


def test_ranks_draw_alike_whatever_their_seeds(folders: dict[str, Path], in_ranks: Run) -> None:
    first, second = in_ranks(te_ranks.sampled, folders["tied"], Topology(tp=2))
    assert torch.equal(first, second)


def test_a_part_is_not_saved_as_the_model(folders: dict[str, Path], tmp_path: Path, in_ranks: Run) -> None:
    for said in in_ranks(te_ranks.saved, folders["tied"], Topology(tp=2), tmp_path):
        assert [one.partition(":")[0] for one in said] == ["save_pretrained", "save_extra_states"]
        assert all("converters.te.convert.save" in one for one in said)
    assert not [*tmp_path.iterdir()]
