"""The shipped suite on checkpoint folders, as a user runs it: `pytest --model FOLDER`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from converters.sources import read_config
from parity.seeded import write_checkpoint
from parity.tiny import odd_config, shrink, with_layers


def run(folder: Path, tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The suite on `folder`, from a folder of its own."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-p", "parity.plugin", "-p", "no:cacheprovider", f"--model={folder}"]
    here = tmp_path / "here"
    here.mkdir()
    return subprocess.run(
        [*command, *options],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


# Fifteen ranks on a few cores: weights and logits alone.
@pytest.mark.parametrize(
    "options",
    [("--tp=5", "--pp=1"), ("--tp=1", "--pp=3"), ("--tp=15", "-k=metadata or weights or forward")],
    ids=["tp5", "pp3", "tp15-over-5-groups"],
)
def test_an_odd_model_in_several_shards(options: tuple[str, ...], tmp_path: Path) -> None:
    folder = write_checkpoint(with_layers(odd_config(), 3), tmp_path / "odd", shards=3)
    done = run(folder, tmp_path, *options)
    assert done.returncode == 0, done.stdout
    assert " checks in 1 case: all passed" in done.stdout


def test_a_bfloat16_checkpoint_at_the_default_precision(tmp_path: Path) -> None:
    folder = write_checkpoint(shrink(read_config("Llama-3.2-1B")), tmp_path / "half", dtype="bfloat16", shards=2)
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    done = run(folder, tmp_path, "--tp=2")
    assert done.returncode == 0, done.stdout
    assert " checks in 1 case: all passed" in done.stdout


def test_weights_that_are_no_numbers_are_named_as_the_cause(tmp_path: Path) -> None:
    folder = write_checkpoint(with_layers(odd_config(), 3), tmp_path / "odd")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].copy()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    done = run(folder, tmp_path)
    assert done.returncode == 1, done.stdout
    assert "transformers itself gives logits that are no numbers" in done.stdout
