"""Two checkpoint folders: each kind of difference is said, with its cause, and nothing else is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.topology import Topology
from parity.causes import Cause
from parity.difference_map import BLOCKS, difference_map, worst
from parity.folders import compare_folders
from parity.seeded import write_checkpoint
from parity.tiny import odd_config, with_layers

FILE = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(with_layers(odd_config(), 2), tmp_path_factory.mktemp("source") / "model")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_text("notes")
    # What is not compared: pickles, code, what is hidden, and a card of this very folder.
    for name in ("training_args.bin", "modeling_odd.py", ".gitattributes", "parity-certificate.json"):
        (folder / name).write_text("not compared")
    return folder


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def rewrite(folder: Path) -> None:
        held = load_file(folder / FILE)
        change(held)
        save_file(held, folder / FILE)

    return rewrite


def config(**changes: Any) -> Change:
    """Other fields; `None` takes one away."""

    def rewrite(folder: Path) -> None:
        fields = {**json.loads((folder / "config.json").read_text()), **changes}
        fields = {name: value for name, value in fields.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(fields))

    return rewrite


def rope(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    fields["rope_scaling"]["factor"] = 3.5
    (folder / "config.json").write_text(json.dumps(fields))


def one_element(held: dict[str, torch.Tensor]) -> None:
    held[UP][3, 4] += 1


def padded(held: dict[str, torch.Tensor]) -> None:
    held["lm_head.weight"] = torch.cat([held["lm_head.weight"], torch.zeros_like(held["lm_head.weight"][:3])])


def halved(held: dict[str, torch.Tensor]) -> None:
    held[UP] = held[UP].half()


def renamed(held: dict[str, torch.Tensor]) -> None:
    held["model.layers.1.mlp.up.weight"] = held.pop(UP)


def written(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text)


KINDS: dict[str, tuple[Change, str, list[Cause]]] = {
    "an element": (
        tensors(one_element),
        f"{UP}: 1 of ",
        [Cause(kind="unexplained", what=("up_proj",))],
    ),
    "a name": (
        tensors(renamed),
        f"{UP}: lost",
        [Cause(kind="extra tensors", what=("up",)), Cause(kind="missing tensors", what=("up_proj",))],
    ),
    "a shape": (tensors(padded), "lm_head.weight: expected shape", [Cause(kind="padding", what=("lm_head",))]),
    "a dtype": (
        tensors(halved),
        f"{UP}: expected torch.float32, found torch.float16",
        [Cause(kind="dtype", what=("up_proj",))],
    ),
    "a truncated file": (
        lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-8]),
        f"{FILE}: ",
        [Cause(kind="unreadable", what=(FILE,))],
    ),
    "a file gone": (
        lambda folder: (folder / "extra" / "notes.txt").unlink(),
        "extra/notes.txt: missing",
        [Cause(kind="files", what=("extra/notes.txt",))],
    ),
    "a file changed": (
        written("chat_template.jinja", "{{ message }}"),
        "chat_template.jinja: not the same bytes",
        [Cause(kind="files", what=("chat_template.jinja",))],
    ),
    "a field": (
        config(rms_norm_eps=1e-5),
        "config.json: rms_norm_eps was 7e-05 and is 1e-05",
        [Cause(kind="config", what=("rms_norm_eps",))],
    ),
    "a field gone": (
        config(head_dim=None),
        "config.json: head_dim was 24 and is None",
        [Cause(kind="config", what=("head_dim",))],
    ),
    "the vocabulary": (
        config(vocab_size=1024),
        "config.json: vocab_size was ",
        [Cause(kind="config", what=("vocab_size",))],
    ),
    "a field of the rope": (
        rope,
        "config.json: rope_scaling was ",
        [Cause(kind="config", what=("rope_scaling.factor",))],
    ),
    "all of the rope": (
        config(rope_scaling=None),
        "config.json: rope_scaling was ",
        [Cause(kind="config", what=("rope_scaling",))],
    ),
    "no config": (
        written("config.json", "{"),
        "config.json: no JSON",
        [Cause(kind="unreadable", what=("config.json",))],
    ),
    "other bytes of a config": (
        config(),
        "config.json: not the same bytes",
        [Cause(kind="files", what=("config.json",))],
    ),
}


@pytest.mark.parametrize(("change", "line", "causes"), KINDS.values(), ids=KINDS)
def test_each_kind_of_difference(change: Change, line: str, causes: list[Cause], source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(source, target)
    change(target)
    found = compare_folders(source, target, torch.float32, Topology())
    assert any(said.startswith(line) for said in found.differing), found.differing
    assert len(found.causes) == len(causes), found.causes
    assert all(any(one.names(cause) for one in found.causes) for cause in causes), found.causes
    assert (found.worst is not None) == (causes[0].kind == "unexplained")


def test_the_same_folder_and_what_is_not_compared(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(source, target)
    for name in ("training_args.bin", "modeling_odd.py", ".gitattributes", "parity-certificate.json"):
        (target / name).unlink()
    found = compare_folders(source, target, torch.float32, Topology())
    assert (found.differing, found.causes, found.worst) == ((), (), None)
    others = [path for path in target.rglob("*") if path.is_file() and path.name != FILE]
    assert found.count == len(load_file(source / FILE)) + len(others)


def test_an_export_in_half_precision_must_say_so(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(source, target)
    tensors(lambda held: held.update({key: tensor.bfloat16() for key, tensor in held.items()}))(target)
    config(torch_dtype=None, dtype="float32")(target)
    (cause,) = compare_folders(source, target, torch.bfloat16, Topology()).causes
    assert cause.names(Cause(kind="config", what=("dtype",)))
    config(torch_dtype=None, dtype="bfloat16")(target)
    assert compare_folders(source, target, torch.bfloat16, Topology()).differing == ()


def test_the_worst_tensor_is_shown_where_it_is_wrong() -> None:
    right = torch.arange(200.0 * 300).view(200, 300)
    wrong = right.clone()
    wrong[150:, 299] -= 0.5
    few = right.clone()
    few[0, 0] += 100
    found = worst({"few": (few, right), "many": (wrong, right), "none": (right, right)}, is_coded=False)
    assert found is not None
    assert (found.elements, found.picture.title) == (50, "many [200, 300]: how far it is off")
    values = found.picture.values
    assert (len(values), len(values[0])) == (BLOCKS, BLOCKS)
    hit = [(row, column) for row, line in enumerate(values) for column, value in enumerate(line) if value]
    assert hit == [(row, BLOCKS - 1) for row in range(48, BLOCKS)]
    assert {values[row][column] for row, column in hit} == {0.5}
    assert (found.picture.rows[48], found.picture.columns[-1]) == ("150-152", "295-299")
    coded = worst({"many": (wrong, right)}, is_coded=True)
    assert coded is not None
    assert coded.picture.values[63][63] == pytest.approx(1 / 5), "one column of five"
    assert worst({"none": (right, right), "shape": (right[1:], right)}, is_coded=False) is None


def test_a_vector_and_what_is_no_number() -> None:
    right = torch.ones(5)
    wrong = right.clone()
    wrong[2] = float("nan")
    picture = difference_map("norm", wrong, right, is_coded=False)
    assert [str(value) for value in picture.values[0]] == ["0.0", "0.0", "nan", "0.0", "0.0"]
    assert (list(picture.rows), list(picture.columns)) == (["0"], ["0", "1", "2", "3", "4"])
