"""`parity compare A B`: one checkpoint held against another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from parity.seeded import write_checkpoint
from parity.tiny import odd_config, with_layers

ROOT = Path(__file__).parents[2]
FILE = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    folders = tmp_path / "first", tmp_path / "second"
    for folder in folders:
        write_checkpoint(with_layers(odd_config(), 2), folder)
        (folder / "generation_config.json").write_text('{"eos_token_id": [505, 501]}')
    return folders


def compare(first: Path, second: Path, *options: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "parity", "compare", str(first), str(second), "-p", "no:cacheprovider", *options]
    environ = {**os.environ, "COLUMNS": "300"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def test_the_same_and_a_release_in_half_precision(pair: tuple[Path, Path]) -> None:
    first, second = pair
    config = json.loads((second / "config.json").read_text())
    config["rope_parameters"] = {**config.pop("rope_scaling"), "rope_theta": config.pop("rope_theta")}
    config["torch_dtype"] = "bfloat16"
    (second / "config.json").write_text(json.dumps(config))
    rewrite(second, lambda tensors: tensors.update({key: tensor.bfloat16() for key, tensor in tensors.items()}))
    for precision in ("bf16", "fp32"):
        status, said = compare(first, second, f"--precision={precision}")
        assert status == 0, said
        assert "rounded once float32 -> bfloat16" in said


def test_what_differs_is_named(pair: tuple[Path, Path]) -> None:
    first, second = pair
    config = json.loads((second / "config.json").read_text())
    config["rms_norm_eps"] = 1e-5
    (second / "config.json").write_text(json.dumps(config))
    (second / "generation_config.json").write_text('{"eos_token_id": 505}')

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        gate = UP.replace("up_proj", "gate_proj")
        tensors[UP], tensors[gate] = tensors[gate], tensors[UP]

    rewrite(second, swap)
    status, said = compare(first, second)
    assert status == 1, said
    assert "rms_norm_eps is 7e-05 in one and 1e-05 in the other" in said
    assert "generation_config.json: not the same bytes" in said
    assert "gate_proj and up_proj are exchanged, in layer 1" in said
    assert "logits" in said


def test_with_nothing_to_compare_with(pair: tuple[Path, Path], tmp_path: Path) -> None:
    status, said = compare(pair[0], tmp_path / "nowhere")
    assert status == pytest.ExitCode.USAGE_ERROR, said
    assert "nowhere" in said
