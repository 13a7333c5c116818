"""`AutoBridge` in real ranks with the real Megatron-Core: in, out, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bridged
import pytest
import torch
from safetensors.torch import load_file

from converters.topology import Topology
from parity.ranks import Zygote

Run = Callable[..., list[Any]]
Changed = Callable[..., Path]
TP2, PP2 = Topology(tp=2), Topology(pp=2)
EMBEDDING = "model.embed_tokens.weight"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def beside(target: Path) -> list[str]:
    """What lies where `target` should be: it, or what an export that failed has left."""
    return sorted(path.name for path in target.parent.iterdir() if target.name in path.name)


@pytest.mark.parametrize(
    ("name", "topology", "fields"),
    [
        ("odd", Topology(tp=3), {}),  # five groups over three ranks: a ghost group; 509 rows in 510
        ("odd", Topology(tp=3, sp=True), {"make_vocab_size_divisible_by": 64}),
        ("odd", Topology(pp=3, dp=2), {}),
        ("odd", Topology(cp=2), {}),
        ("odd", Topology(pp=2, first_stage_layers=1), {}),
        ("odd", Topology(pp=3, first_stage_layers=1, last_stage_layers=3), {}),
        ("odd", Topology(pp=2, vpp=2, count_embedding=True, count_loss=True), {}),
        ("odd", Topology(pp=2, vpp=3), {}),
        ("attention-biased", Topology(tp=3), {}),
        ("mlp-biased", Topology(tp=3), {}),
        ("tied", Topology(tp=2, pp=2), {}),
        ("tied", Topology(tp=4), {}),
        ("tied", Topology(pp=2, vpp=2), {}),
    ],
    ids=str,
)
def test_there_and_back(
    name: str, topology: Topology, fields: dict[str, Any], checkpoints: dict[str, Path], in_ranks: Run, tmp_path: Path
) -> None:
    """Each rank holds what the statement says, streams out every tensor, and the folder comes back byte for byte."""
    folder, target = checkpoints[name], tmp_path / "exported"
    for rank in in_ranks(bridged.there_and_back, folder, topology, target, **fields):
        assert rank["imported"] == []
        assert rank["exported"] == []
        assert set(rank["keys"]) == set(bridged.source(folder))
    assert contents(target) == contents(folder)
    assert beside(target) == ["exported"]


def test_the_provider_loads_while_it_builds(checkpoints: dict[str, Path], in_ranks: Run) -> None:
    assert in_ranks(bridged.loaded_by_provider, checkpoints["tied"], TP2) == [[], []]


def test_transformers_loads_an_export(
    checkpoints: dict[str, Path], in_ranks: Run, zygote: Zygote, tmp_path: Path
) -> None:
    """Of an export whose files are not copies of the source's: another dtype, and one file in place of three."""
    config = bridged.read_json(checkpoints["odd"] / "config.json")
    in_ranks(bridged.from_config, config, PP2, tmp_path / "made")
    assert zygote.run(bridged.transformers_loads, tmp_path / "made", backend=None) == [{}]


def test_a_dtype_changes_only_on_request(checkpoints: dict[str, Path], in_ranks: Run) -> None:
    for message, untouched in in_ranks(bridged.load, checkpoints["tied"], PP2, "bf16"):
        assert "a cast must be asked for (cast=True)" in message
        assert "float32 -> bfloat16" in message
        assert untouched
    assert in_ranks(bridged.load_rounded, checkpoints["tied"], Topology(tp=2, pp=2)) == [([], [])] * 4


def test_tensors_that_do_not_fit_are_all_listed_on_every_rank(changed: Changed, in_ranks: Run) -> None:
    """By ranks that would not read them, too."""
    lost, extra, bent = (f"model.layers.{layer}.mlp.{name}" for layer, name in enumerate(("down_proj.weight",) * 3))
    extra = extra.replace("down", "downward")
    folder = changed("tied", **{lost: None, extra: torch.zeros(3), bent: torch.zeros(2, 3)})
    for message, untouched in in_ranks(bridged.load, folder, PP2):
        assert "tensors missing (1):" in message
        assert f"  {lost} (did you mean '{extra}'?)" in message
        assert f"tensors that nothing maps (1):\n  {extra}" in message
        assert f"tensors of another shape (1):\n  {bent}: expected [72, 88], found [2, 3]" in message
        assert untouched


def test_a_stored_copy_of_a_tied_head_is_verified_and_kept(
    changed: Changed, in_ranks: Run, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    embedding = load_file(checkpoints["tied"] / "model.safetensors")[EMBEDDING]
    folder, target = changed("tied", **{"lm_head.weight": embedding.clone()}), tmp_path / "exported"
    for rank in in_ranks(bridged.there_and_back, folder, Topology(tp=2, pp=2), target):
        assert (rank["imported"], rank["exported"]) == (["lm_head"] * 0, [])
    assert contents(target) == contents(folder)


def test_a_stored_copy_of_a_tied_head_that_differs_is_refused(
    changed: Changed, in_ranks: Run, checkpoints: dict[str, Path]
) -> None:
    head = load_file(checkpoints["tied"] / "model.safetensors")[EMBEDDING].clone()
    head[5, 7] += 1.0
    first, second = in_ranks(bridged.load, changed("tied", **{"lm_head.weight": head}), TP2)
    expected = "lm_head.weight is a tied copy of embedding.word_embeddings.weight, and differs from it (1 elements)"
    assert expected in first[0]
    assert second[0] in ("no error", first[0])  # the row is on the first rank


def test_stored_rotary_frequencies_are_dropped_for_a_reason(
    changed: Changed, in_ranks: Run, checkpoints: dict[str, Path], tmp_path: Path, zygote: Zygote
) -> None:
    keys = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(4)]
    folder, target = changed("tied", **{key: torch.rand(16) for key in keys}), tmp_path / "exported"
    for drops in in_ranks(bridged.reasons, folder, PP2, target):
        assert sorted(drops) == keys
        assert all("both sides compute it from rope_theta" in reason for reason in drops.values())
    assert bridged.unlike(bridged.source(target), bridged.source(checkpoints["tied"])) == []
    assert zygote.run(bridged.transformers_loads, target, backend=None) == [{}]


def test_an_existing_target_stays(checkpoints: dict[str, Path], in_ranks: Run, tmp_path: Path) -> None:
    target = tmp_path / "exported"
    target.mkdir()
    (target / "precious").write_text("x")
    for message in in_ranks(bridged.save, checkpoints["tied"], PP2, target):
        assert f"{target} exists already" in message
    assert contents(target) == {"precious": b"x"}
    assert beside(target) == ["exported"]
    for message in in_ranks(bridged.save, checkpoints["tied"], PP2, target, overwrite=True):
        assert f"{target} does not look like a checkpoint, and only one is replaced" in message
    assert contents(target) == {"precious": b"x"}
    (target / "config.json").write_text("{}")
    assert in_ranks(bridged.save, checkpoints["tied"], PP2, target, overwrite=True) == ["no error"] * 2
    assert contents(target) == contents(checkpoints["tied"])
    assert beside(target) == ["exported"]


def test_a_tied_copy_that_strayed_is_not_exported(checkpoints: dict[str, Path], in_ranks: Run, tmp_path: Path) -> None:
    """Only the last stage knows; every rank fails, and nothing is left."""
    target = tmp_path / "exported"
    found = in_ranks(bridged.save_altered, checkpoints["tied"], PP2, target, 1, "output_layer.weight", 3)
    for messages in found:
        for message in messages:
            assert f"output_layer.weight is a tied copy of {EMBEDDING}, and differs from it (72 elements)" in message
    assert beside(target) == []


@pytest.mark.parametrize(
    ("name", "topology", "parameter", "row"),
    [
        ("tied", TP2, "embedding.word_embeddings.weight", -1),
        ("odd", Topology(tp=3), "decoder.layers.4.self_attention.linear_qkv.weight", -1),
        ("odd", Topology(tp=3), "output_layer.weight", -1),
    ],
)
def test_padding_that_training_changed(
    name: str,
    topology: Topology,
    parameter: str,
    row: int,
    checkpoints: dict[str, Path],
    in_ranks: Run,
    tmp_path: Path,
) -> None:
    """It is named, and let go of only on request."""
    target, last = tmp_path / "exported", topology.world_size - 1
    for saved, streamed, dropped in in_ranks(
        bridged.save_altered, checkpoints[name], topology, target, last, parameter, row
    ):
        for message in (saved, streamed):
            assert re.search(rf"{re.escape(parameter)}: \d+ of [\d,]+ elements that must be 0 are not", message)
            assert "export with padding='drop'" in message
        assert dropped == "no error"
    assert contents(target) == contents(checkpoints[name])
    assert beside(target) == ["exported"]


def test_what_the_provider_changed_is_in_the_config(
    checkpoints: dict[str, Path], in_ranks: Run, tmp_path: Path
) -> None:
    folder, target = checkpoints["tied"], tmp_path / "exported"
    in_ranks(bridged.save_with, folder, PP2, target, rotary_base=54321.0, layernorm_epsilon=2e-4)
    before, after = bridged.read_json(folder / "config.json"), bridged.read_json(target / "config.json")
    assert after == before | {"rope_theta": 54321.0, "rms_norm_eps": 2e-4}
    assert {**contents(folder), "config.json": b""} == {**contents(target), "config.json": b""}


def test_a_config_alone(checkpoints: dict[str, Path], in_ranks: Run, tmp_path: Path) -> None:
    """A model that was never a checkpoint is exported all the same."""
    config = bridged.read_json(checkpoints["tied"] / "config.json")
    target = tmp_path / "made"
    for message, differing in in_ranks(bridged.from_config, config, Topology(pp=2, vpp=2), target):
        assert "only a config is known, there are no weights to load" in message
        assert differing == []
    assert bridged.read_json(target / "config.json") == config
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
