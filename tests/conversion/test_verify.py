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
from converters.errors import CheckpointError
from converters.files.verify import verify
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
            held[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(MODEL["head_dim"] // 2)

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
