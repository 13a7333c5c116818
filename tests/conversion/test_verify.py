"""Two checkpoints of any formats held against each other: all that differs is found, and nothing else."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters import __main__ as command_line
from converters.convert import convert_folder
from converters.errors import CheckpointError, ConversionError
from converters.files.verify import verify, verify_digests
from converters.megatron.rope import frequencies_of_fields
from converters.models import FAMILIES
from parity.seeded import write_checkpoint
from parity.tiny import odd_config, with_layers

MODEL = with_layers(odd_config(), 2) | {"hidden_size": 30, "intermediate_size": 45, "mlp_bias": False}
Q = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
QKV = "decoder.layers.self_attention.linear_qkv.weight"
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    hf = write_checkpoint(MODEL, root / "hf")
    convert_folder(hf, root / "te", target_column="te")
    convert_folder(hf, root / "megatron", target_column="megatron", make_vocab_size_divisible_by=64)
    convert_folder(hf, root / "layers", target_column="megatron", stacked=False)
    return {name: root / name for name in ("hf", "te", "megatron", "layers")}


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = command_line.main(["verify", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def edited(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], Any], **config: Any) -> Path:
    """A copy of a folder with other weights, or another config."""
    shutil.copytree(source, target)
    held = load_file(source / "model.safetensors")
    change(held)
    save_file(held, target / "model.safetensors", metadata={"format": "pt"})
    if config:
        fields = json.loads((target / "config.json").read_text()) | config
        (target / "config.json").write_text(json.dumps(fields))
    return target


@pytest.mark.parametrize("second", ["hf", "te", "megatron", "layers"])
@pytest.mark.parametrize("first", ["hf", "te", "megatron", "layers"])
def test_every_pair_of_formats_is_equal(folders: dict[str, Path], first: str, second: str) -> None:
    found = verify(folders[first], folders[second])
    assert found.equal, found
    assert not found.ignored
    held = sum(info.numel() for info in load_file(folders["hf"] / "model.safetensors").values())
    assert found.elements >= held
    kinds = ["megatron" if name == "layers" else name for name in (first, second)]
    assert found.columns == tuple(kinds)


@pytest.mark.parametrize("second", ["te", "megatron", "layers"])
def test_all_that_differs_is_told_with_its_place(folders: dict[str, Path], tmp_path: Path, second: str) -> None:
    def change(held: dict[str, torch.Tensor]) -> None:
        held[Q][7, 3] = 1.5
        held[Q][7, 4:9] += 1
        held[NORM][29] = float("nan")

    first = edited(folders["hf"], tmp_path / "hf", change)
    was = load_file(folders["hf"] / "model.safetensors")
    found = verify(first, folders[second])
    assert [each.differing for each in found.different] in ([6, 1], [1, 6])
    many, one = sorted(found.different, key=lambda each: -each.differing)
    assert len(many.first) == 3
    assert many.first[0].made == 1.5
    assert many.first[0].found == was[Q][7, 3].item()
    assert many.first[0].bits == (0x3FC00000, was[Q].view(torch.int32)[7, 3].item() & 0xFFFFFFFF)
    assert many.first[0].index[-1] == 3
    assert many.largest == max(1.0, abs(1.5 - was[Q][7, 3].item()))
    assert (one.first[0].index[-1], one.largest) == (29, math.inf)
    assert math.isnan(one.first[0].made)
    assert found.nonfinite == {one.key: (1, 0)}
    if second == "megatron":
        assert (many.key, many.first[0].index[0]) == (QKV, 1)
    back = verify(folders[second], first)
    assert {each.key: each.differing for each in back.different} == {Q: 6, NORM: 1}
    assert next(each for each in back.different if each.key == Q).first[0].index == (7, 3)


def test_dtypes_shapes_and_names(folders: dict[str, Path], tmp_path: Path) -> None:
    def change(held: dict[str, torch.Tensor]) -> None:
        held["model.norm.weight"] = held["model.norm.weight"].bfloat16()
        held[NORM] = held[NORM][:-1].clone()
        held["odd.weight"] = held.pop(Q)

    other = edited(folders["hf"], tmp_path / "other", change)
    found = {each.key: each for each in verify(folders["megatron"], other).different}
    assert found.keys() == {"model.norm.weight", NORM, "odd.weight", Q}
    assert found[Q].faults == ("the other checkpoint lacks it",)
    assert found["odd.weight"].faults == ("only the other checkpoint has it",)
    assert found[NORM].faults == ("shape [30], in the other checkpoint [29]",)
    assert found["model.norm.weight"].faults == ("float32, in the other checkpoint bfloat16",)
    assert not found["model.norm.weight"].differing, "rounded, they are equal"
    with pytest.raises(CheckpointError, match="does not hold what its config promises"):
        verify(other, folders["hf"])


def test_padding_that_is_not_zero_is_a_difference(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["megatron"], tmp_path / "megatron")
    done = convert_folder(folders["hf"], tmp_path / "x", target_column="megatron", make_vocab_size_divisible_by=64)
    (place,) = [chunk for chunk in done.written if chunk.key == "output_layer.weight"]
    with (tmp_path / "megatron" / place.file).open("r+b") as file:
        file.seek(place.offset + place.nbytes - 4)
        file.write(b"\0\0\x80\x3f")
    (found,) = verify(folders["hf"], tmp_path / "megatron").different
    assert (found.key, found.differing, found.first[0].found) == ("output_layer.weight", 1, 1.0)
    (found,) = verify(tmp_path / "megatron", folders["hf"]).different
    assert "1 of" in found.faults[0]
    assert "that must be 0 are not" in found.faults[0]


def test_config_fields_differ_too(folders: dict[str, Path], tmp_path: Path, call: Call) -> None:
    other = edited(folders["hf"], tmp_path / "hf", lambda held: None, rms_norm_eps=0.5)
    found = verify(folders["megatron"], other)
    assert not found.different
    assert found.config == {"rms_norm_eps": (MODEL["rms_norm_eps"], 0.5)}
    code, out, _ = call(folders["megatron"], other)
    assert code == 1
    assert "config.json: rms_norm_eps is" in out


def test_stored_frequencies_are_left_out_with_the_reason(folders: dict[str, Path], tmp_path: Path) -> None:
    def change(held: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            frequencies = frequencies_of_fields(FAMILIES[0].fields.read(MODEL)[0])
            held[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies

    other = edited(folders["hf"], tmp_path / "hf", change)
    found = verify(folders["megatron"], other)
    assert found.equal
    assert len(found.ignored) == 2


def test_a_sample_looks_at_every_tensor(folders: dict[str, Path], tmp_path: Path) -> None:
    found = verify(folders["hf"], folders["megatron"], sample=1024)
    whole = verify(folders["hf"], folders["megatron"])
    assert found.equal
    assert found.sampled
    assert found.tensors == whole.tensors
    assert found.elements < whole.elements / 4
    first = edited(folders["hf"], tmp_path / "hf", lambda held: held[Q].add_(1))
    assert [each.key for each in verify(first, folders["megatron"], sample=1024).different] == [QKV]


def test_the_command(folders: dict[str, Path], tmp_path: Path, call: Call) -> None:
    code, out, err = call(folders["hf"], folders["megatron"])
    assert (code, err) == (0, "")
    assert "equal  every tensor and every field of the config: equal to the bit" in out
    assert "what was looked at is equal" in call(folders["hf"], folders["te"], "--sample", "1KB")[1]

    def change(held: dict[str, torch.Tensor]) -> None:
        held[Q][0, 0] = 1.5

    other = edited(folders["hf"], tmp_path / "hf", change)
    code, out, _ = call(other, folders["megatron"])
    assert code == 1
    assert f"{QKV} 1 " in " ".join(out.split())
    assert "1.5 (0x3fc00000)" in out
    assert "different  1 tensors and 0 fields of the config" in out
    assert call(other, folders["megatron"], "--quiet") == (1, "", "")
    code, out, _ = call(other, folders["megatron"], "--json")
    account = json.loads(out)
    assert (code, account["equal"]) == (1, False)
    assert account["different"][0]["first"][0]["bits"][0] == "0x3fc00000"
    code, out, err = call(folders["hf"], tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert "no model folder" in err


def test_nothing_is_never_called_equal(folders: dict[str, Path], call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    for workers in (0, -1):
        with pytest.raises(ConversionError, match=f"workers={workers}: expected 1 or more"):
            verify(folders["hf"], folders["te"], workers=workers)
        with pytest.raises(SystemExit):
            call(folders["hf"], folders["te"], "--workers", workers)
    from converters.files import compare

    monkeypatch.setattr(compare, "in_threads", lambda *_, **__: iter(()))
    with pytest.raises(AssertionError, match="not compared to their end"):
        verify(folders["hf"], folders["te"])


def test_norms_centred_on_zero_are_equal_both_ways(folders: dict[str, Path], tmp_path: Path, call: Call) -> None:
    centred = tmp_path / "centred"
    shutil.copytree(folders["megatron"], centred)
    config = centred / "iter_0000000" / "run_config.yaml"
    was, now = (f"layernorm_zero_centered_gamma: {value}" for value in ("false", "true"))
    assert was in config.read_text()
    config.write_text(config.read_text().replace(was, now))
    convert_folder(centred, tmp_path / "hf", target_column="hf")
    assert verify(centred, tmp_path / "hf").equal
    back = verify(tmp_path / "hf", centred)
    assert (back.equal, back.names, back.columns) == (True, "A", ("hf", "megatron")), back.different

    other = edited(tmp_path / "hf", tmp_path / "other", lambda held: held[NORM].__setitem__(3, 9.0))
    (one,) = verify(other, centred).different
    (two,) = verify(centred, other).different
    assert (one.key, one.differing, one.first[0].index) == (two.key, two.differing, two.first[0].index)
    assert (one.first[0].made, one.first[0].found) == (9.0, two.first[0].made)
    assert one.first[0].bits == two.first[0].bits[::-1]


def flipped(folder: Path, key: str) -> Path:
    """The file in which one bit of a tensor was flipped."""
    from converters.checkpoint import Checkpoint

    box = Checkpoint.open(folder).files.extents(key)[-1]
    content = bytearray(box.file.read_bytes())
    content[box.offset] ^= 1
    box.file.write_bytes(content)
    return box.file


def test_a_flipped_bit_does_not_hold_its_checksum(folders: dict[str, Path], tmp_path: Path, call: Call) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(folders["megatron"], damaged)
    sound = verify(folders["megatron"], folders["layers"])
    assert sound.equal
    assert sound.checksums > 20
    assert verify(folders["megatron"], folders["layers"], sample=1024).checksums == 0
    file = flipped(damaged, QKV)
    for first, second, side in ((damaged, folders["hf"], "A"), (damaged, damaged, "AB"), (folders["te"], damaged, "B")):
        found = verify(first, second)
        assert not found.equal
        assert len(found.damaged) == len(side)
        for told, letter in zip(found.damaged, side, strict=True):
            assert told.startswith(f"{letter}: {QKV}: ")
            assert str(file) in told
    code, out, _ = call(damaged, damaged)
    assert code == 1
    assert "2 records damaged" in out
    assert json.loads(call(damaged, damaged, "--json")[1])["equal"] is False
    convert_folder(damaged, tmp_path / "unasked", target_column="hf")
    for target in ("hf", None):
        with pytest.raises(CheckpointError, match=r"not those that were written \(1\)(.|\n)*linear_qkv") as caught:
            convert_folder(damaged, tmp_path / "made", target_column=target, check_source=True)
        assert str(file) in str(caught.value)
        assert not (tmp_path / "made").exists()
    told = convert_folder(folders["megatron"], tmp_path / "good", target_column="hf", check_source=True).notices
    assert any("have the checksums that they were written with" in notice for notice in told)
    told = convert_folder(folders["hf"], tmp_path / "none", target_column="te", check_source=True).notices
    assert any("notes no checksums" in notice for notice in told)


@pytest.mark.parametrize("target", ["te", "megatron"])
def test_a_checkpoint_against_its_digests(folders: dict[str, Path], tmp_path: Path, call: Call, target: str) -> None:
    made, account = tmp_path / "made", tmp_path / "digests.json"
    convert_folder(folders["hf"], made, target_column=target, digests=account)
    found = verify_digests(made, account)
    assert found.equal, found.different
    assert found.elements == sum(info.elements for info in _tensors(made).values())
    code, out, _ = call(made, "--digests", account)
    assert (code, "every tensor has the digest" in out) == (0, True)
    key = QKV if target == "megatron" else NORM
    key = key if key in _tensors(made) else next(key for key in _tensors(made) if key.endswith("layer_norm_weight"))
    flipped(made, key)
    found = verify_digests(made, account)
    assert [each.key for each in found.different] == [key]
    assert "expected" in found.different[0].faults[0]
    assert len(found.damaged) == (target == "megatron")
    assert call(made, "--digests", account)[0] == 1
    held = json.loads(account.read_text())
    lost = held["tensors"].pop(key)
    account.write_text(json.dumps(held))
    assert verify_digests(made, account).different[0].faults == ("no digest",)
    held["tensors"]["other"] = lost
    account.write_text(json.dumps(held))
    assert verify_digests(made, account).different[-1].faults == ("the checkpoint lacks it",)
    with pytest.raises(ConversionError, match="compare the two checkpoints themselves"):
        verify_digests(folders["hf"], account)
    lost["boxes"] = lost["boxes"][1:]
    for content in (json.dumps(held), "{", "[]", '{"digest": "x"}'):
        account.write_text(content)
        with pytest.raises(CheckpointError, match="digests"):
            verify_digests(made, account)
    assert call(made)[0] == 2
    assert call(made, made, "--digests", account)[0] == 2


def test_another_layout_has_the_same_digests(folders: dict[str, Path], tmp_path: Path) -> None:
    account = tmp_path / "digests.json"
    convert_folder(folders["megatron"], tmp_path / "hf", target_column="hf", digests=account)
    convert_folder(tmp_path / "hf", tmp_path / "shards", target_column=None, max_shard_size=10_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert verify_digests(tmp_path / "shards", account).equal


def _tensors(folder: Path) -> Any:
    from converters.checkpoint import Checkpoint

    return Checkpoint.open(folder).tensors
