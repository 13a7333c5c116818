"""Folders in the te column where they do not belong, and what a conversion says of sources, targets and dtypes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters import __main__ as command_line
from converters.convert import convert_folder
from converters.errors import CheckpointError, ConfigError, ConversionError, SourceError
from converters.quantized.export import quantize
from converters.quantized.restore import dequantize
from converters.sources import read_config
from converters.te import convert
from parity.seeded import write_checkpoint
from parity.subjects import config_of
from parity.tiny import odd_config, require_llama, shrink, with_layers

TIED = with_layers(shrink(read_config("meta-llama/Llama-3.2-1B")), 2)
WAY_OUT = "python -m converters convert --to hf SOURCE TARGET"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("made")
    hf = write_checkpoint(TIED, root / "hf")
    convert_folder(hf, root / "te", target_column="te")
    return {"hf": hf, "te": root / "te"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def mixed(source: Path, target: Path) -> Path:
    """A copy of the checkpoint with one of q, k and v, which are one tensor of TE, in another dtype."""
    target.mkdir()
    held = weights(source)
    key = "model.layers.1.self_attn.k_proj.weight"
    save_file(held | {key: held[key].bfloat16()}, target / "model.safetensors", metadata={"format": "pt"})
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    return target


def test_what_reads_hugging_face_folders_names_the_way_from_te(made: dict[str, Path], tmp_path: Path) -> None:
    for refused in (
        lambda: quantize(made["te"], tmp_path / "out", "fine-grained"),
        lambda: dequantize(made["te"], tmp_path / "out"),
        lambda: config_of(str(made["te"])),
        lambda: require_llama(json.loads((made["te"] / "config.json").read_text())),
    ):
        with pytest.raises(ConfigError, match="the checkpoint is in the 'te' column") as caught:
            refused()
        assert WAY_OUT in str(caught.value)


def test_dtypes_change_on_request(made: dict[str, Path], tmp_path: Path) -> None:
    source = mixed(made["hf"], tmp_path / "mixed")
    with pytest.raises(CheckpointError, match=r"(?s)bfloat16 -> float32|float32 -> bfloat16") as caught:
        convert_folder(source, tmp_path / "te", target_column="te")
    assert "convert --dtype" in str(caught.value)
    te, back = tmp_path / "te", tmp_path / "back"
    assert command_line.main(["convert", "--to", "te", "--dtype", "bfloat16", str(source), str(te)]) == 0
    assert json.loads((te / "config.json").read_text())["dtype"] == "bfloat16"
    assert command_line.main(["convert", "--to", "hf", "--quiet", str(te), str(back)]) == 0
    expected = {key: tensor.bfloat16() for key, tensor in weights(source).items()}
    found = weights(back)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in expected.items())
    with pytest.raises(ConversionError, match="dtype 'float8', expected float32, bfloat16 or float16"):
        convert_folder(source, tmp_path / "x", target_column="te", dtype="float8")


def test_a_file_is_no_model(made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made["hf"].parent)
    for name in ("hf/model.safetensors", str(made["hf"] / "model.safetensors")):
        with pytest.raises(SourceError, match="it is a file, expected the folder that holds it") as caught:
            convert_folder(name, tmp_path / "te", target_column="te")
        assert "--weights" not in str(caught.value)


def test_a_target_that_exists_names_both_ways(made: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"allow it to be replaced \(--overwrite, in Python overwrite=True\)"):
        convert_folder(made["hf"], made["te"], target_column="te")


def test_a_model_is_not_saved_beside_the_files_of_another(made: dict[str, Path], tmp_path: Path) -> None:
    model = convert.load(made["te"], device="cpu")
    other = write_checkpoint(with_layers(odd_config(), 3), tmp_path / "other")
    with pytest.raises(ConfigError, match=r"does not stem from .*: sizes differ") as caught:
        convert.save(model, other, tmp_path / "out")
    assert "num_hidden_layers: 2, the source 3" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command_line.main(["--help"])
    intro = capsys.readouterr().out.split("positional arguments")[0]
    assert all(f"`{name}`" in intro for name in ("plan", "explain", "convert", "quantize", "dequantize"))
