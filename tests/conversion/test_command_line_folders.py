"""`import`, `export`, `convert` and `reshard` on the command line: what they print, refuse, and never import."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from converters import __main__ as command_line
from converters.commands.sizes import size
from converters.progress import Progress
from parity.seeded import write_checkpoint
from parity.tiny import odd_config, with_layers

ROOT = Path(command_line.__file__).parents[1]
MODEL = with_layers(odd_config(), 2) | {"hidden_size": 30, "intermediate_size": 45}
Call = Callable[..., tuple[int, str, str]]
ALONE = """
import sys
from converters.__main__ import main

code = main(sys.argv[1:])
heavy = sorted({"torch", "transformers", "megatron", "safetensors", "huggingface_hub", "rich"} & set(sys.modules))
assert heavy == ["rich"] * ("--quiet" not in sys.argv), heavy
sys.exit(code)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(MODEL, tmp_path_factory.mktemp("source") / "hf", shards=2)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = command_line.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def test_import_and_export(source: Path, tmp_path: Path, call: Call) -> None:
    megatron, back = tmp_path / "megatron", tmp_path / "hf"
    options = ("--layers", "local", "--digests", tmp_path / "digests.json")
    code, out, err = call("import", "--hf", source, "--megatron", megatron, *options)
    words = " ".join(out.split())
    assert (code, err) == (0, "")
    assert f"source {source} (hf) target {megatron} (megatron) tensors" in words
    assert "MB/s; every bit kept" in words
    assert "carried generation_config.json, tokenizer.json, tokenizer_config.json" in words
    assert f"digests {tmp_path / 'digests.json'}" in words
    assert json.loads((tmp_path / "digests.json").read_text())["column"] == "megatron"
    code, out, err = call("export", "--megatron", megatron, "--hf", back, "--max-shard-size", "30KB")
    assert (code, err) == (0, "")
    assert "left alone _extra_state: 8 objects" in " ".join(out.split())
    assert len(list(back.glob("model-*.safetensors"))) > 2
    assert call("verify", source, back, "--quiet") == (0, "", "")
    code, out, err = call("export", "--megatron", megatron, "--hf", back, "--quiet")
    assert (code, out) == (2, "")
    assert "exists already" in err
    assert call("export", "--megatron", megatron, "--hf", back, "--quiet", "--overwrite", "--like", source)[0] == 0
    assert {path.name for path in back.iterdir()} == {path.name for path in source.iterdir()}


def test_convert_and_reshard(source: Path, tmp_path: Path, call: Call) -> None:
    assert call("convert", "--to", "megatron", "--per-layer", "--quiet", source, tmp_path / "layers") == (0, "", "")
    assert call("reshard", "--stacked", "--quiet", tmp_path / "layers", tmp_path / "stacked") == (0, "", "")
    assert call("convert", "--from", "megatron", "--to", "te", "--quiet", tmp_path / "stacked", tmp_path / "te")[0] == 0
    code, out, _ = call("verify", tmp_path / "te", tmp_path / "layers")
    assert code == 0, out
    code, out, err = call("convert", "--to", "megatron", tmp_path / "layers", tmp_path / "x")
    assert (code, out) == (2, "")
    assert "python -m converters reshard" in err
    code, _, err = call("convert", "--to", "megatron", "--iteration", 3, source, tmp_path / "x")
    assert (code, "is no Megatron checkpoint" in err) == (2, True)
    assert not (tmp_path / "x").exists()


def test_only_the_first_of_several_ranks_prints(
    source: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert call("import", "--hf", source, "--megatron", tmp_path / "megatron") == (0, "", "")
    assert call("verify", source, tmp_path / "megatron") == (0, "", "")


@pytest.mark.parametrize("quiet", [["--quiet"], []], ids=["quiet", "table"])
def test_nothing_heavy_is_imported(source: Path, tmp_path: Path, quiet: list[str]) -> None:
    """Not torch, transformers or megatron; and what prints, only to print."""
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    for arguments in (
        ["import", "--hf", source, "--megatron", megatron],
        ["export", "--megatron", megatron, "--hf", back],
        ["convert", "--to", "te", megatron, tmp_path / "te"],
        ["reshard", "--per-layer", megatron, tmp_path / "layers"],
        ["verify", source, tmp_path / "layers"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", ALONE, *map(str, arguments), *quiet],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert bool(done.stdout) != bool(quiet)
        assert done.stderr == ""


@pytest.mark.parametrize("name", ["import", "export", "convert", "reshard", "verify"])
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command_line.main([name, "--help"])
    said = capsys.readouterr().out
    assert "None" not in said
    assert "--quiet" in said


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GB", 2_000_000_000), ("500MB", 500_000_000), ("1.5 kb", 1500), ("4GiB", 2**32), ("12", 12)],
)
def test_sizes(text: str, count: int) -> None:
    assert size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "2 apples", "-1GB", "0", "0.0GB"])
def test_what_is_no_size(text: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command_line.main(["reshard", f"--max-shard-size={text}", str(source), str(tmp_path / "x")])
    assert "expected a size as 2GB or 500MB" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        ("--iteration", "x"),
        ("--iteration", "-1"),
        ("--tp", "0"),
        ("--padded-vocab-size", "-3"),
        ("--make-vocab-size-divisible-by", "0"),
    ],
    ids=" ".join,
)
def test_what_is_no_count(
    option: tuple[str, str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, value = option
    with pytest.raises(SystemExit, match="2"):
        command_line.main(["convert", "--to", "megatron", f"{name}={value}", str(source), str(tmp_path / "x")])
    said = capsys.readouterr().err
    assert f"argument {name}: expected" in said
    assert repr(value) in said


def test_a_bar_is_drawn_when_it_is_worth_its_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("converters.progress.SOON", -1.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with Progress("converting", 4_000_000, done=1_000_000) as progress:
        progress.advance(1_000_000)
    said = capsys.readouterr()
    assert said.out == ""
    assert "converting" in said.err
    assert "2.0/4.0 MB" in said.err
    with Progress("converting", 100, quiet=True) as progress:
        progress.advance(1)
    assert capsys.readouterr() == ("", "")
