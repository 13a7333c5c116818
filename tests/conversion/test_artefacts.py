"""Folders that appear whole or not at all, and the files beside the weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from converters.artefacts import begin, carried, commit, patched
from converters.errors import CheckpointError
from converters.files import place
from converters.models.llama_fields import FIELDS

SPELLINGS = {known.name: known.paths for known in FIELDS.fields}


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "exported"
    partial = begin(target)
    (partial / "file").write_text("x")
    assert partial.parent == target.parent  # one file system, so that a rename is one step
    assert not target.exists()
    commit(partial, target)
    assert (target / "file").read_text() == "x"
    assert [path.name for path in target.parent.iterdir()] == ["exported"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_an_existing_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already; choose another folder, or allow it to be replaced"):
        begin(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_replaced_target_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    target = tmp_path / "exported"
    target.mkdir()
    (target / "old.safetensors").write_text("x")
    partial = begin(target, overwrite=True)
    (partial / "new").write_text("y")
    assert [path.name for path in target.iterdir()] == ["old.safetensors"]
    commit(partial, target)
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


@pytest.mark.parametrize("exchanged", [False, True])
def test_a_failed_rename_leaves_the_old_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanged: bool
) -> None:
    target = tmp_path / "exported"
    target.mkdir()
    (target / "old.safetensors").write_text("x")
    partial = begin(target, overwrite=True)
    rename = Path.rename

    def fails(self: Path, to: Path) -> Path:
        if self == partial:
            raise OSError("no")
        return rename(self, to)

    def cannot(one: Path, other: Path) -> bool:
        if exchanged:
            raise OSError("no")
        return False

    monkeypatch.setattr(Path, "rename", fails)
    monkeypatch.setattr(place, "exchange", cannot)
    with pytest.raises(OSError, match="no"):
        commit(partial, target)
    assert [path.name for path in target.iterdir()] == ["old.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([partial.name, "exported"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="cannot write beside"):
        begin(tmp_path / "exported")


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot write beside"):
        begin(tmp_path / "file" / "exported")


def test_what_is_carried_over(tmp_path: Path) -> None:
    kept = ["LICENSE.txt", "chat_template.jinja", "generation_config.json", "merges.txt", "tokenizer.json"]
    kept += ["tokenizer.model", "tokenizer_config.json", "README.md"]
    left = ["config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "x.gguf"]
    left += ["pytorch_model.bin.index.json", "optimizer.pt"]
    for name in [*kept, *left, "modeling_x.py"]:
        (tmp_path / name).write_text(name)
    (tmp_path / "folder.json").mkdir()
    assert [path.name for path in carried(tmp_path)] == sorted(kept)
    assert [path.name for path in carried(tmp_path, code=True)] == sorted([*kept, "modeling_x.py"])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_theta": 1.0, "x": [1]}, {"rope_theta": 2.0, "x": [1]}),
        ({"rope_parameters": {"rope_theta": 1.0, "y": 1}}, {"rope_parameters": {"rope_theta": 2.0, "y": 1}}),
        (
            {"rope_theta": 1.0, "rope_scaling": {"rope_theta": 1.0}},
            {"rope_theta": 2.0, "rope_scaling": {"rope_theta": 2.0}},
        ),
        ({"rope_scaling": None}, {"rope_scaling": None, "rope_theta": 2.0}),
        ({"rope_parameters": {}}, {"rope_parameters": {"rope_theta": 2.0}}),
    ],
)
def test_a_change_goes_where_the_field_stands(config: dict[str, object], expected: dict[str, object]) -> None:
    before = json.dumps(config)
    assert json.loads(patched(config, {"rope_theta": 2.0}, SPELLINGS)) == expected
    assert json.dumps(config) == before


def test_a_change_keeps_the_other_fields_in_their_order() -> None:
    config = {"z": 1, "torch_dtype": "float32", "a": {"b": None}, "vocab_size": 7}
    text = patched(config, {"dtype": "bfloat16"}, SPELLINGS)
    assert list(json.loads(text).items()) == list((config | {"torch_dtype": "bfloat16"}).items())
    assert text.endswith("}\n")
