"""Damaged checkpoints, by the hundred: each converts, or says what is wrong; nothing hangs, nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors_folders import raw

from converters.convert import convert_folder
from converters.errors import ConversionError
from converters.files.safetensors import INDEX, SINGLE, SafetensorsFiles
from parity.seeded import write_checkpoint
from parity.tiny import odd_config, with_layers

HUGE = 10**30
NUMBERS = st.one_of(
    st.integers(-3, 40), st.sampled_from([2**31, 2**63 - 1, 2**63, HUGE, -HUGE]), st.floats(allow_infinity=True)
)
TEXTS = st.one_of(
    st.text(max_size=6), st.sampled_from(["F32", "BF16", "../x.safetensors", "/etc/passwd", "\0", SINGLE])
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
COLUMNS = st.sampled_from(["te", "megatron"])


def fuzzed(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """JSON with one to three of its parts replaced, removed, doubled under another name, or exchanged for another."""
    made = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        at = made
        while True:
            if not isinstance(at, dict | list) or not at:
                break
            step = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
            if isinstance(at[step], dict | list) and at[step] and draw(st.integers(0, 3)):
                at = at[step]
                continue
            how = draw(st.integers(0, 4))
            if how == 0:
                del at[step]
            elif how == 1 and isinstance(at, dict):
                at[draw(TEXTS)] = at[step]
            elif how == 2:
                other = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
                at[step], at[other] = at[other], at[step]
            elif how == 3 and isinstance(at[step], int):
                at[step] += draw(st.sampled_from([-1, 1, 8, HUGE]))
            else:
                at[step] = draw(VALUES)
            break
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A good checkpoint in one file and in two."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("fuzz")
    config = with_layers(odd_config(), 2)
    for shards in (1, 2):
        write_checkpoint(config, root / f"{shards}", dtype="bfloat16", shards=shards)
    return {shards: root / f"{shards}" for shards in (1, 2)}


@contextmanager
def damaged(source: Path) -> Iterator[Path]:
    """A copy to damage, in a folder of its own."""
    place = source.parent / "work"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    shutil.copytree(source, place / "source")
    yield place / "source"
    shutil.rmtree(place)


def survives(folder: Path, column: str = "te") -> None:
    """Converting `folder` gives a whole checkpoint or a clear error, and touches nothing else."""
    target = folder.parent / "deep" / "target"
    target.parent.mkdir()
    (folder.parent / "canary").write_text("untouched")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    try:
        done = convert_folder(folder, target, target_column=column, workers=1)
    except ConversionError as error:
        message = str(error)
        message.encode()
        assert message
        assert len(message) < 20_000
        assert not list(target.parent.iterdir())
    else:
        assert done.target == target
        assert list(target.parent.iterdir()) == [target]
        if column == "te":
            assert SafetensorsFiles(target).tensors()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["canary", "deep", folder.name]
    assert (folder.parent / "canary").read_text() == "untouched"


@fuzzed(40)
@given(data=st.data(), column=COLUMNS)
def test_a_header(source: dict[int, Path], data: st.DataObject, column: str) -> None:
    content = (source[1] / SINGLE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = data.draw(mutated(json.loads(content[8 : 8 + length])))
    with damaged(source[1]) as folder:
        (folder / SINGLE).write_bytes(raw(header, 0) + content[8 + length :])
        survives(folder, column)


@fuzzed(40)
@given(data=st.data())
def test_bytes_of_a_file(source: dict[int, Path], data: st.DataObject) -> None:
    """Cut off, changed, moved, put in."""
    content = bytearray((source[1] / SINGLE).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(header, len(content))) | st.integers(0, len(content)))
        match data.draw(st.integers(0, 3)):
            case 0:
                del content[at:]
            case 1:
                content[at : at + 1] = data.draw(st.binary(min_size=1, max_size=9))
            case 2:
                del content[at : at + data.draw(st.integers(1, 9))]
            case _:
                content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    with damaged(source[1]) as folder:
        (folder / SINGLE).write_bytes(content)
        survives(folder)


@fuzzed(40)
@given(data=st.data(), column=COLUMNS)
def test_an_index(source: dict[int, Path], data: st.DataObject, column: str) -> None:
    index = data.draw(mutated(json.loads((source[2] / INDEX).read_text())))
    with damaged(source[2]) as folder:
        (folder / INDEX).write_text(json.dumps(index))
        survives(folder, column)


@fuzzed(80)
@given(data=st.data(), column=COLUMNS)
def test_a_config(source: dict[int, Path], data: st.DataObject, column: str) -> None:
    config = data.draw(mutated(json.loads((source[1] / "config.json").read_text())))
    with damaged(source[1]) as folder:
        (folder / "config.json").write_text(json.dumps(config))
        survives(folder, column)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"x"', '{"a": ' + "[" * 100_000, "\ufeff{}", "{}"])
def test_a_config_that_is_none(source: dict[int, Path], text: str) -> None:
    with damaged(source[1]) as folder:
        (folder / "config.json").write_text(text)
        survives(folder)


@pytest.mark.parametrize("value", [0, -1, 1.5, None, [], 10**9, HUGE, float("nan")])
def test_every_number_of_a_config(source: dict[int, Path], value: object) -> None:
    """Each field in turn, so that no size goes unguarded."""
    config = json.loads((source[1] / "config.json").read_text())
    for name, said in config.items():
        if isinstance(said, int | float):
            with damaged(source[1]) as folder:
                (folder / "config.json").write_text(json.dumps(config | {name: value}))
                survives(folder, "megatron")
