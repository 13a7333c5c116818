"""What a conversion never deletes, writes over or follows: others' folders, training runs, sources, links."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converters import __main__ as command_line
from converters import targets
from converters.checkpoint import Checkpoint
from converters.convert import Conversion, convert_folder
from converters.errors import CheckpointError, ConversionError, SourceError
from converters.files import place
from converters.files.interruption import Interrupted
from converters.files.partial import LONGEST, Partial
from converters.files.pending import Pending
from converters.files.verify import verify
from converters.sources import read_config
from parity.seeded import write_checkpoint
from parity.tiny import odd_config, with_layers

MODEL = with_layers(odd_config(), 1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(MODEL, tmp_path_factory.mktemp("source") / "hf")


def convert(source: Path | str, target: Path | str, column: str = "megatron", **options: Any) -> Conversion:
    return convert_folder(source, target, target_column=column, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def folder(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("mine")
    return path


@pytest.mark.parametrize("resume", [False, True])
def test_a_link_in_the_place_of_a_partial_folder_is_not_followed(source: Path, tmp_path: Path, resume: bool) -> None:
    target = tmp_path / "out"
    victim = folder(tmp_path / "victim", "lock", "state", "small/thesis.tex")
    Partial(target).root.symlink_to(victim)
    before = files(victim)
    with pytest.raises(CheckpointError, match=r"\.out\.partial is a link, and .*move it away"):
        convert(source, target, resume=resume)
    assert files(victim) == before
    Partial(target).root.unlink()
    Partial(target).root.symlink_to(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is a link"):
        convert(source, target)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("names", [("thesis.tex",), ("state", "journal-0", "folder/a", "notes/b"), ("folder",)])
def test_a_folder_that_no_conversion_left_is_not_cleared(source: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    root = folder(Partial(tmp_path / "out").root, *names)
    before = files(root)
    named = {"folder/a": "notes"}.get(names[-2] if len(names) > 1 else "", names[0])
    with pytest.raises(CheckpointError, match=rf"no conversion leaves \(1\):\n  {named}\n.*choose another target"):
        convert(source, tmp_path / "out")
    assert files(root) == before


@pytest.mark.parametrize("name", ["lock", "folder", "small", "journal-0", "state"])
def test_a_link_in_a_partial_folder_is_not_followed(source: Path, tmp_path: Path, name: str) -> None:
    root = folder(Partial(tmp_path / "out").root, "stopped")
    victim = folder(tmp_path / "victim", "x") if name in ("folder", "small") else folder(tmp_path, "x") / "x"
    (root / name).symlink_to(victim)
    with pytest.raises(CheckpointError, match=rf"{name} \(a link\)"):
        convert(source, tmp_path / "out")
    assert (victim / "x" if victim.is_dir() else victim).read_text() == "mine"


@pytest.mark.parametrize("column", ["megatron", "te"])
def test_only_a_checkpoint_is_replaced(source: Path, tmp_path: Path, column: str) -> None:
    target = folder(tmp_path / "home", "thesis.tex", "photos/1.jpg")
    before = files(target)
    with pytest.raises(CheckpointError, match=r"does not look like a checkpoint.*found photos, thesis\.tex\. Remove"):
        convert(source, target, column, overwrite=True)
    assert files(tmp_path) == {f"home/{name}": data for name, data in before.items()}


@pytest.mark.parametrize(
    "name",
    ["", "config.json", "a.safetensors", ".metadata", "__0_0.distcp", "iter_0000003/common.pt", "mp_rank_00/model.pt"],
)
def test_a_checkpoint_of_any_format_is_replaced(tmp_path: Path, name: str) -> None:
    target = tmp_path / "out"
    target.mkdir()
    place.check_target(folder(target, *[name][: bool(name)]), overwrite=True)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["iter_0000100/common.pt", "iter_0000200/common.pt"],
            r"holds 2 iterations .iter_0000100 to iter_0000200. of a training run",
        ),
        (["config.json", ".git/HEAD"], r"holds \.git, whose history would go"),
    ],
    ids=["a training run", "a repository"],
)
def test_more_than_a_checkpoint_is_not_replaced(source: Path, tmp_path: Path, names: list[str], words: str) -> None:
    target = folder(tmp_path / "target", *names)
    before = files(target)
    with pytest.raises(CheckpointError, match=rf"target {words}"):
        convert(source, target, overwrite=True)
    assert files(target) == before


def test_a_target_keeps_clear_of_all_that_is_read(source: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    convert(source, run)
    shutil.copytree(run / "iter_0000000", run / "iter_0000001")
    shutil.copytree(source, tmp_path / "like")
    before = files(tmp_path)
    for given, target in (
        (run, run / "iter_0000001"),
        (run / "iter_0000000", run / "iter_0000001"),
        (run, run / "hf"),
        (run, tmp_path / "like"),
        (run, tmp_path / "like" / "out"),
    ):
        with pytest.raises(CheckpointError, match=r"lies inside the source|is the source itself"):
            convert(given, target, "hf", overwrite=True, like=tmp_path / "like")
    assert files(tmp_path) == before


def test_digests_take_no_other_file(source: Path, tmp_path: Path) -> None:
    copy, target = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(source, copy)
    folder(tmp_path, "notes")
    (tmp_path / "link").symlink_to(copy / "config.json")
    (tmp_path / "there").mkdir()
    before = files(tmp_path)
    for digests, overwrite, text in (
        (copy / "config.json", True, "lies inside"),
        (copy / "new.json", False, "lies inside"),
        (tmp_path / "link", True, "lies inside"),
        (target / "digests.json", False, "lies inside"),
        (tmp_path / "notes", False, "exists already.*--overwrite"),
        (tmp_path / "there", True, "expected a file or nothing"),
        (tmp_path / "notes" / "deep" / "x", False, "notes is no folder"),
        (tmp_path / ("x" * 300), False, "File name too long"),
    ):
        with pytest.raises(CheckpointError, match=text):
            convert(copy, target, digests=digests, overwrite=overwrite)
        assert files(tmp_path) == before, digests
    convert(copy, target, digests=tmp_path / "notes", overwrite=True)
    assert json.loads((tmp_path / "notes").read_text())["column"] == "megatron"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "link", "notes", "out", "there"]


def test_the_longest_name_that_a_folder_can_have(source: Path, tmp_path: Path) -> None:
    name = "é" * 120 + "x" * (LONGEST - 240)
    roots = {Partial(tmp_path / each).root.name for each in (name, name[:-1] + "y", "x" * 246, "x" * 247)}
    assert len(roots) == 4
    assert all(len(os.fsencode(root)) <= LONGEST for root in roots)
    convert(source, tmp_path / name)
    assert verify(source, tmp_path / name).equal
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["x" * 256, "a\0b", "x" * 300 + "/out", "/".join(["deep"] * 1200), "\ud800"])
def test_names_that_no_folder_can_have(source: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError):
        convert(source, tmp_path / name)
    with pytest.raises(CheckpointError):
        convert(source, tmp_path / name, overwrite=True, resume=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 5000, "/" + "x" * 5000, "a\0b", "./a\0b", "~" + "x" * 300, "\ud800"])
def test_names_that_no_model_can_have(source: Path, tmp_path: Path, name: str) -> None:
    for ask in (
        lambda: convert(name, tmp_path / "out"),
        lambda: verify(source, name),
        lambda: verify(name, source),
        lambda: Checkpoint.open(name),
        lambda: read_config(name),
    ):
        with pytest.raises(SourceError) as told:
            ask()
        assert len(str(told.value)) < 2000


def test_a_tilde_is_the_home_everywhere(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    shutil.copytree(source, tmp_path / "hf")

    def call(*arguments: str) -> None:
        assert command_line.main([*arguments]) == 0

    call("import", "--hf=~/hf", "--megatron=~/megatron", "--digests=~/digests.json", "--quiet")
    call("export", "--megatron=~/megatron", "--hf=~/back", "--like=~/hf", "--quiet")
    call("verify", "~/hf", "~/megatron", "--like=~/hf", "--quiet")
    call("reshard", "~/megatron", "~/layers", "--per-layer", "--quiet")
    call("quantize", "~/hf", "~/fp8", "--format", "compressed-tensors")
    assert list(Path.cwd().iterdir()) == []
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["back", "digests.json", "fp8", "hf", "layers", "megatron", "work"]


def test_no_fewer_elements_than_none_are_shown(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command_line.main(["verify", str(source), str(source), "--show", "-1"])
    assert stop.value.code == 2
    assert "expected 0 or more, found '-1'" in capsys.readouterr().err
    assert command_line.main(["verify", str(source), str(source), "--show", "0", "--quiet"]) == 0


@pytest.mark.parametrize("column", ["megatron", "te"])
def test_large_files_are_carried_in_pieces(source: Path, tmp_path: Path, column: str) -> None:
    copy, size = tmp_path / "copy", 3 * targets.LARGE
    shutil.copytree(source, copy)
    (copy / "1_Pooling").mkdir()
    (copy / "1_Pooling" / "config.json").write_text("{}")
    pattern = bytes(range(256)) * 4096
    with (copy / "1_Pooling" / "tokens.txt").open("wb") as file:
        for _ in range(size // len(pattern)):
            file.write(pattern)
    tracemalloc.start()
    try:
        done = convert(copy, tmp_path / "out", column)
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()
    assert Path("1_Pooling/tokens.txt") in done.carried
    convert(tmp_path / "out", tmp_path / "back", "hf")
    kept = {str(path) for path in done.carried}
    found, expected = files(tmp_path / "back"), files(copy)
    assert {name: found[name] for name in kept} == {name: expected[name] for name in kept}


def test_a_resumed_run_copies_large_files_anew(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, target = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(source, copy)
    (copy / "tokens.txt").write_bytes(b"x" * 1000)
    monkeypatch.setattr(targets, "LARGE", 500)

    def stop(pending: Pending) -> None:
        raise KeyboardInterrupt

    def stopped(change: Callable[[Path], object], **options: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Pending, "commit", stop)
            with pytest.raises(Interrupted):
                convert(copy, target, **options)
        change(Partial(target).small / "iter_0000000" / "hf" / "tokens.txt")

    stopped(lambda path: path.unlink())
    stopped(lambda path: path.write_bytes(b"?"), resume=True)
    assert convert(copy, target, resume=True).resumed > 0
    assert (target / "iter_0000000" / "hf" / "tokens.txt").read_bytes() == b"x" * 1000
    stopped(lambda path: None, overwrite=True)
    (copy / "tokens.txt").write_bytes(b"y" * 1001)
    with pytest.raises(ConversionError, match="other files to write"):
        convert(copy, target, overwrite=True, resume=True)
