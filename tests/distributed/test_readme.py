"""The README says what works: its Python converts, and its commands exist."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import readme
from safetensors.torch import load_file

from converters.__main__ import main as convert
from converters.sources import read_config
from parity.__main__ import main
from parity.options import OPTIONS, resolve
from parity.ranks import Zygote
from parity.seeded import write_checkpoint
from parity.tiny import shrink, with_layers

README = Path(__file__).parents[2] / "README.md"


def test_its_python_converts(zygote: Zygote, tmp_path: Path) -> None:
    folder = write_checkpoint(with_layers(shrink(read_config("Llama-3.2-1B")), 2), tmp_path / "model")
    found = zygote.run(readme.run, README, folder, tmp_path / "exported", world=4)
    written = load_file(tmp_path / "exported" / "model.safetensors")
    assert [(sorted(names), chunks) for names, chunks in found] == [(sorted(written), 1)] * 4
    assert (tmp_path / "exported" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_its_python_generates(zygote: Zygote, tmp_path: Path) -> None:
    config = with_layers(shrink(read_config("Llama-3.2-1B")), 2) | {"pad_token_id": 300}
    folder = write_checkpoint(config, tmp_path / "model")
    ((prompt, made, same),) = zygote.run(readme.generate, README, folder, backend=None)
    assert prompt[0] == made[0] == 2
    assert made[1] > prompt[1]
    assert same


def test_its_commands_convert_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which they stand, and then its Python for the same."""
    source = write_checkpoint(with_layers(shrink(read_config("Llama-3.2-1B")), 2), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    lines = [words[3:] for words in commands("python") if words[1:3] == ["-m", "converters"]]
    files = [words for words in lines if words[0] in ("import", "export", "reshard", "verify") or "./llama-te" in words]
    assert [words[0] for words in files] == ["import", "export", "convert", "reshard", "verify"]
    for words in files:
        assert convert([word.replace("meta-llama/Llama-3.2-1B", str(source)) for word in words]) == 0, words
    for name in (path.name for path in source.iterdir()):
        assert (tmp_path / "exported" / name).read_bytes() == (source / name).read_bytes(), name
    for words in commands("parity"):
        if words[1:2] == ["lint"] or "--roundtrip" in words or "./llama-megatron" in words:
            assert main(words[1:]) == 0, words
    for folder in ("llama-megatron", "exported", "llama-te"):
        shutil.rmtree(tmp_path / folder)
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "import_ckpt" in code]
    exec(compile(block.replace("meta-llama/Llama-3.2-1B", str(source)), str(README), "exec"), {})  # our own README
    assert (tmp_path / "llama-te" / "config.json").is_file()


def commands(program: str) -> list[list[str]]:
    """The lines of its shell blocks that call `program`."""
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(), re.S)
    lines = [part.strip() for block in blocks for line in block.splitlines() for part in line.split("&&")]
    return [words for line in lines if (words := shlex.split(line, comments=True)) and words[0] == program]


def test_its_pytest_options_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)  # where goldens are not made anew
    of_pytest = {"-n", "-k"}
    known = {f"--{option.name}": option for option in OPTIONS}
    found = [words for words in commands("pytest") if "--model" in words]
    assert found
    for words in found:
        given: dict[str, str | None] = {}
        rest = iter(words[1:])
        for word in rest:
            if word in of_pytest:
                next(rest)
                continue
            option = known[word]
            given[option.key] = "on" if option.flag else next(rest)
        resolve(given)


@pytest.mark.parametrize(
    "words", [["check"], ["compare"], ["certify"], ["golden"], ["self-test"], ["report", "diff"], ["lint"]]
)
def test_its_parity_commands_exist(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = [given[1 : 1 + len(words)] for given in commands("parity")]
    assert words in said or words == ["check"]
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == 0
    assert "usage:" in capsys.readouterr().out
