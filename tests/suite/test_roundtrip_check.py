"""`parity check --roundtrip DIR`, and `parity compare` of files in any formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from converters import convert
from converters.convert import convert_folder
from converters.sources import read_config
from converters.topology import Topology
from parity import roundtrip
from parity.__main__ import main
from parity.faults.catalogue import Fault
from parity.faults.drafts import Draft, Scene
from parity.faults.mutate import apply
from parity.faults.of_files import FILES
from parity.lint.run import lint
from parity.roundtrip import RoundTrip, round_trip
from parity.seeded import write_checkpoint
from parity.tiny import odd_config, shrink, with_layers

CHECKS = [
    "config ledger",
    "plan, import",
    "plan, export",
    "import",
    "Megatron files",
    "export",
    "weight files",
    "config",
    "other files",
    "lint of the result",
]


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(with_layers(odd_config(), 2), tmp_path_factory.mktemp("release") / "odd", shards=2)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    copy: Path = shutil.copytree(original, tmp_path / "odd")
    return copy


@pytest.fixture(scope="session")
def megatron(original: Path) -> Path:
    target = original.parent / "megatron"
    convert_folder(original, target, target_column="megatron")
    return target


def failed(found: RoundTrip) -> dict[str, str]:
    return {row.check: row.detail for row in found.rows if not row.passed}


@pytest.mark.parametrize(
    ("name", "dtype", "shards"),
    [("odd", "float32", 3), ("Llama-3.2-1B", "bfloat16", 1), ("SmolLM2-135M", "float32", 2)],
)
def test_every_byte_of_a_folder_comes_back(name: str, dtype: str, shards: int, tmp_path: Path) -> None:
    config = odd_config() if name == "odd" else shrink(read_config(name))
    folder = write_checkpoint(with_layers(config, 2), tmp_path / "made", dtype=dtype, shards=shards)
    (folder / "LICENSE").write_text("as you like")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    (folder / ".gitattributes").write_text("")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found = round_trip(folder, loading=False)
    assert [row.check for row in found.rows] == CHECKS
    assert found.passed, failed(found)
    assert found.left == {".gitattributes": "hidden", "training_args.bin": "weights in another format, or a pickle"}
    assert [path.name for path in tmp_path.iterdir()] == ["made"], "what was made for the check is gone"
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert json.loads(json.dumps(found.as_json()))["passed"] is True


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scratch, out = tmp_path / "scratch", tmp_path / "said.json"
    line = ["check", "--roundtrip", str(folder), "--no-load", f"--scratch={scratch}", f"--json={out}"]
    assert main(line) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("takes ")
    assert f"in {scratch} for a while" in " ".join(printed.split())
    assert "10 checks: all passed" in printed
    assert not list(scratch.iterdir())
    assert [row["check"] for row in json.loads(out.read_text())["rows"]] == CHECKS


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (("--roundtrip", "--tp=2"), "--tp does not go with --roundtrip"),
        (("--roundtrip", "-k=logits"), "-k=logits does not go with --roundtrip"),
        (("--scratch=elsewhere",), "--scratch goes with --roundtrip"),
    ],
)
def test_wrong_usage(line: tuple[str, ...], said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(folder), *line]) == 4
    assert said in capsys.readouterr().err


def test_what_is_no_such_folder_is_said(
    folder: Path, megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    te = tmp_path / "te"
    convert_folder(folder, te, target_column="te")
    for place, said in ((tmp_path / "nowhere", "found nothing"), (te, "'te' column"), (megatron, "config.json")):
        assert main(["check", "--roundtrip", str(place)]) == 4
        assert said in capsys.readouterr().err


def test_too_little_disk_is_refused_beforehand(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(roundtrip, "SLACK", 1 << 60)
    assert main(["check", "--roundtrip", str(folder)]) == 4
    assert "choose another place (--scratch DIR)" in capsys.readouterr().err
    assert [path.name for path in folder.parent.iterdir()] == ["odd"]


def changed(path: Path, at: int) -> None:
    held = bytearray(path.read_bytes())
    held[at] ^= 1
    path.write_bytes(held)


SHARD = "model-00001-of-00002.safetensors"


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


@pytest.mark.parametrize(
    ("column", "change", "check", "said"),
    [
        (
            "hf",
            lambda at: changed(at / SHARD, -1),
            "weight files",
            "1 bytes differ, the first",
        ),
        ("hf", lambda at: changed(at / SHARD, 20), "weight files", "in the header"),
        (
            "hf",
            lambda at: longer(at / "config.json"),
            "config",
            "became",
        ),
        ("hf", lambda at: (at / "tokenizer_config.json").unlink(), "other files", "tokenizer_config.json: lost"),
        ("hf", lambda at: (at / "new.txt").write_text("new"), "other files", "new.txt: not in the source"),
        ("megatron", lambda at: changed(next(at.rglob("*.distcp")), 1 << 16), "Megatron files", "1 of"),
    ],
)
def test_a_change_on_the_way_is_named(
    column: str,
    change: Callable[[Path], None],
    check: str,
    said: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spoiled(source: Path, target: Path, *, target_column: str, **options: object) -> convert.Conversion:
        done = convert_folder(source, target, target_column=target_column, **options)  # type: ignore[arg-type]
        if target_column == column:
            change(target)
        return done

    monkeypatch.setattr(roundtrip, "convert_folder", spoiled)
    found = round_trip(folder, loading=False)
    assert said in failed(found).pop(check, ""), failed(found)


def test_a_conversion_that_stops_is_a_failure_that_says_why(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu_new"}))
    found = round_trip(folder, loading=False)
    assert [row.check for row in found.rows] == ["config and weights"]
    assert "gelu_new" in found.rows[0].detail
    shard = min(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4])
    (folder / "config.json").write_text(json.dumps(config))
    assert "truncated" in failed(round_trip(folder, loading=False))["config and weights"]


def test_a_result_that_does_not_lint_is_a_failure(folder: Path) -> None:
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token_id": None}))
    assert "eos-lists" in failed(round_trip(folder, loading=False))["lint of the result"]


def test_formats_are_compared_to_the_bit(
    folder: Path, megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "said.json"
    for first, second in ((folder, megatron), (megatron, folder)):
        assert main(["compare", str(first), str(second), f"--json={out}"]) == 0, capsys.readouterr()
        assert [row["check"] for row in json.loads(out.read_text())] == ["tensors", "config", "other files"]
    assert main(["compare", str(folder), str(megatron), "--sample"]) == 0
    assert "of which a sample was read" in " ".join(capsys.readouterr().out.split())
    assert main(["compare", str(folder), str(megatron), "--tp=2"]) == 4
    assert "not in Hugging Face's format" in capsys.readouterr().err
    assert main(["compare", str(folder), str(folder), "--sample"]) == 4
    assert "--files" in capsys.readouterr().err


def test_what_differs_between_formats_is_named(
    folder: Path, megatron: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    key = next(key for key in tensors if "q_proj.weight" in key)
    tensors[key][3, 4] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    (folder / "tokenizer_config.json").write_text("{}")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert main(["compare", str(megatron), str(folder)]) == 1
    printed = capsys.readouterr()
    for said in (f"{key}: 1 of ", "[3, 4]", "rms_norm_eps is 7e-05 in the first", "tokenizer_config.json: "):
        assert said in printed.out, printed.out
    assert "export" in printed.err


UNSEEN = (
    "the source's weights, whatever was trained",
    "tokenizer stale",
    "chat template lost",
    "generation config lost",
)
"""Faults that a folder alone does not show: it is a good one, of another model."""


@pytest.mark.parametrize("fault", FILES, ids=lambda fault: fault.name)
def test_faults_of_files_that_lint_sees(fault: Fault, original: Path, tmp_path: Path) -> None:
    config = json.loads((original / "config.json").read_text())
    draft = Draft(original)
    # The template in a file of its own, for the faults that are about it.
    draft.files["chat_template.jinja"] = json.loads(draft.files["tokenizer_config.json"])["chat_template"].encode()
    for mutation in fault.does:
        apply(mutation, draft, Scene(config=config, topology=Topology(), layers=(0, 1), source=original))  # type: ignore[arg-type]  # of folders
    draft.write(tmp_path / "faulty")
    found = lint(tmp_path / "faulty", loading=False, ignore=["permissions"])
    assert bool(found.count("error") or found.count("warning")) == (fault.name not in UNSEEN), found.remarks
