"""`python -m converters`: proofs and explanations from configs alone, and what is said when there are none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import converters.__main__ as command_line
from parity.tiny import odd_config

ROOT = Path(command_line.__file__).parents[1]
MODEL = ("--model", "meta-llama/Llama-3.2-1B")
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from converters.__main__ import main
code = main(sys.argv[1:])
assert not {"torch", "transformers", "megatron", "numpy"} & set(sys.modules), "a plan needs no tensors"
sys.exit(code)
"""


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub cache: the packaged configs answer. And a wide terminal: no line is wrapped."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(odd_config()))
    return folder


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = command_line.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_plan(capsys: pytest.CaptureFixture[str], odd: Path) -> None:
    code, out, err = call(capsys, "plan", "--model", odd, "--pp", 2)
    assert (code, err) == (0, "")
    assert "placement 6 layers in 2 chunks, 3 in each" in " ".join(out.split())
    assert "proved  every element of every tensor is written exactly once, and read exactly once, on every rank" in out
    assert "hf -> " in out
    assert "float32" in out


def test_plan_shows_padding_ties_and_what_was_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--tp", 2, "--pp", 3, "--make-vocab-size-divisible-by", 1000)
    code, out, _ = call(capsys, "plan", *MODEL, *options)
    assert code == 0
    assert "they divide evenly only with the embedding and the loss counted as a layer each" in out
    words = " ".join(out.split())
    assert (
        f"padding embedding.word_embeddings.weight: {(130_000 - 128_256) * 2048:,} constant elements, written" in words
    )
    assert f"tied tied head: {128_256 * 2048:,} elements, a second copy" in words


def test_plan_as_json(capsys: pytest.CaptureFixture[str], odd: Path) -> None:
    code, out, _ = call(capsys, "plan", "--model", odd, "--tp", 5, "--json")
    account: dict[str, Any] = json.loads(out)
    assert code == 0
    assert account["holds"] is True
    assert account["faults"] == []
    assert (account["source"], account["target"]) == ("hf", "megatron")
    assert account["padding"]["output_layer.weight"] == (510 - 509) * 210
    assert account["bytes"] == account["elements"] * 4
    assert len(account["rank_bytes"]) == 5
    assert account["topology"] == "tp5-pp1"
    assert account["dtype"] == "float32"


def test_plan_the_other_way(capsys: pytest.CaptureFixture[str], odd: Path) -> None:
    back = json.loads(call(capsys, "plan", "--model", odd, "--from", "megatron", "--to", "hf", "--tp", 5, "--json")[1])
    there = json.loads(call(capsys, "plan", "--model", odd, "--tp", 5, "--json")[1])
    assert back["holds"]
    assert back["elements"] == there["elements"]
    assert back["constants"] == there["padding"]


def test_a_plan_that_does_not_hold(
    capsys: pytest.CaptureFixture[str], odd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers of the second stage, off by one."""
    from converters.topology import Mesh

    window = Mesh.window

    def off_by_one(self: Mesh, dim: str, extent: int) -> tuple[int, int]:
        start, stop = window(self, dim, extent)
        return (start - 1, stop - 1) if dim == "pp" and start else (start, stop)

    monkeypatch.setattr(Mesh, "window", off_by_one)
    code, out, _ = call(capsys, "plan", "--model", odd, "--pp", 2)
    assert code == 1
    assert "does not hold" in out
    assert "model.layers.5.mlp.down_proj.weight" in out
    code, out, _ = call(capsys, "plan", "--model", odd, "--pp", 2, "--json")
    assert code == 1
    assert json.loads(out)["holds"] is False


def test_explain_a_tensor(capsys: pytest.CaptureFixture[str], odd: Path) -> None:
    code, out, _ = call(capsys, "explain", "--model", odd, "decoder.layers.3.self_attention.linear_qkv.weight")
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "decoder.layers.3.self_attention.linear_qkv.weight [600, 210]: offsets and strides in elements"
    assert len(lines) == 4
    for line, name in zip(lines[1:], "qkv", strict=True):
        assert f"<- model.layers.3.self_attn.{name}_proj.weight" in line


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        # Five groups of three query heads, a key and a value, 24 rows each: the key of group 1 starts at 120 + 72.
        (
            ["decoder.layers.0.self_attention.linear_qkv.weight[192, 5]"],
            "decoder.layers.0.self_attention.linear_qkv.weight[192, 5] <- "
            "model.layers.0.self_attn.k_proj.weight[24, 5]",
        ),
        # The second of five ranks has the second group.
        (
            ["decoder.layers.0.self_attention.linear_qkv.bias[0]", "--tp", "5", "--rank", "1"],
            "decoder.layers.0.self_attention.linear_qkv.bias[0] <- model.layers.0.self_attn.q_proj.bias[72]",
        ),
        # Local layer 1 of the last stage is layer 4.
        (
            ["decoder.layers.1.mlp.linear_fc1.bias[435]", "--pp", "2", "--rank", "1"],
            "decoder.layers.1.mlp.linear_fc1.bias[435] <- model.layers.4.mlp.up_proj.bias[0]",
        ),
        # The padding.
        (["output_layer.weight[101, 0]", "--tp", "5", "--rank", "4"], "output_layer.weight[101, 0] = 0"),
        # A tensor of the source: where it goes.
        (
            ["model.layers.0.self_attn.k_proj.weight[24, 5]"],
            "model.layers.0.self_attn.k_proj.weight[24, 5] <- "
            "decoder.layers.0.self_attention.linear_qkv.weight[192, 5]",
        ),
    ],
)
def test_explain_an_element(capsys: pytest.CaptureFixture[str], odd: Path, arguments: list[str], answer: str) -> None:
    assert call(capsys, "explain", "--model", odd, *arguments) == (0, answer + "\n", "")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["explain", "lm_heads.weight"], 1, "has no tensor 'lm_heads.weight' here"),
        (["explain", "lm_head.weight[509, 0]"], 2, "has shape [509, 210], and no element [509, 0]"),
        (["explain", "lm_head.weight[1]"], 2, "and no element [1]"),
        (["explain", "lm_head.weight[1"], 2, "expected KEY or KEY[i, j], found 'lm_head.weight[1'"),
        (["explain", "lm_head.weight", "--rank", "3"], 2, "rank 3 is outside a world of 1"),
        (["plan", "--pp", "5"], 2, "6 layers do not fit pp=5"),
        (["plan", "--tp", "0"], 2, "tp must be at least 1, found 0"),
        (["plan", "--tp", "2"], 2, "does not divide over tp=2"),
    ],
)
def test_errors(capsys: pytest.CaptureFixture[str], odd: Path, arguments: list[str], code: int, message: str) -> None:
    found, out, err = call(capsys, *arguments, "--model", odd)
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert message in err


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = call(capsys, "plan", "--model", tmp_path / "nothing")
    assert code == 2
    assert "nothing" in err


def test_a_config_that_does_not_translate(capsys: pytest.CaptureFixture[str], odd: Path) -> None:
    (odd / "config.json").write_text(json.dumps(odd_config() | {"rope_scaling": {"type": "yarn", "factor": 2.0}}))
    code, _, err = call(capsys, "plan", "--model", odd)
    assert code == 2
    assert "rope_type='yarn' is not supported" in err


def test_the_largest_model_in_little_memory() -> None:
    """405 billion parameters over 1,024 ranks, in two gigabytes of address space and without torch."""
    options = ["--model", "meta-llama/Llama-3.1-405B", "--tp", "8", "--pp", "16", "--vpp", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "plan", *options], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    account = json.loads(done.stdout)
    assert account["elements"] == 405_853_388_800
    assert account["holds"]
    assert len(account["rank_bytes"]) == 128
