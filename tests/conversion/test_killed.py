"""Runs killed anywhere: what they leave is nothing, or the whole, and a second run ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters.convert import convert_folder
from converters.errors import CheckpointError
from converters.files import stream
from converters.files.interruption import Interrupted
from converters.files.partial import Partial
from parity.seeded import write_checkpoint
from parity.tiny import odd_config, with_layers

Ended = tuple[int, int, str]
Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of three files."""
    return write_checkpoint(with_layers(odd_config(), 2), tmp_path_factory.mktemp("killed") / "hf", shards=3)


@pytest.fixture(scope="module")
def convert(source: Path) -> Iterator[Run]:
    """Converts in a process of its own, killed at a call to the operating system, or not; how that ended."""
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("killed_runs.py"))],
        env=os.environ | {"PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as runs:
        assert runs.stdin is not None
        assert runs.stdout is not None

        def one(target: Path, column: str, *, kill: int | None = None, exchange: bool = True, **options: Any) -> Ended:
            named = {"source": str(source), "target": str(target), "target_column": column}
            print(json.dumps({**named, "kill": kill, "exchange": exchange, **options}), file=runs.stdin, flush=True)
            code, count, call = json.loads(runs.stdout.readline())
            return code, count, call

        yield one
        runs.stdin.close()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def points(first: int, last: int, number: int) -> list[int]:
    """Calls to be killed at: one at random from each part of a run, and its last."""
    draw, count = random.Random(1), last - first + 1
    parts = [(first + count * n // number, first + count * (n + 1) // number) for n in range(number - 1)]
    return [*(draw.randrange(*part) for part in parts), last]


def check_nothing_half(target: Path, whole: dict[str, bytes], old: dict[str, bytes]) -> str:
    """What a kill has left: the target whole, new or old, or none; beside it nothing that could be taken for one."""
    partial = Partial(target)
    assert {path.name for path in target.parent.iterdir()} <= {target.name, partial.root.name}
    if not target.exists():
        if old:
            assert files(partial.replaced) == old
        left = "nothing"
    else:
        left = "new" if files(target) == whole else "old"
        assert files(target) == (whole if left == "new" else old)
    if left != "new" and partial.folder.exists():
        names = {str(path): data for path, data in files(partial.folder).items()}
        if any(path.endswith((".json", ".txt", ".metadata", ".pt", ".yaml")) for path in names):
            assert all(names[path] == whole[path] for path in names)  # the weights are all there
    return left


@pytest.mark.parametrize(
    ("column", "overwrite", "exchange"),
    [("te", False, True), ("megatron", False, True), ("te", True, True), ("te", True, False)],
)
def test_killed_at_random_points(tmp_path: Path, convert: Run, column: str, overwrite: bool, exchange: bool) -> None:
    """Twenty over a whole run; where an old folder is replaced, which matters to the end of a run only, six there."""
    reference, target = tmp_path / "reference" / "out", tmp_path / "runs" / "out"
    options: dict[str, Any] = {"overwrite": overwrite, "exchange": exchange}
    for _ in range(1 + overwrite):
        code, count, said = convert(reference, column, **options)
        assert code == 0, said
    whole = files(reference)
    among = points(1 + count * 3 // 4, count, 6) if overwrite else points(1, count, 20)
    seen, resumed = set(), 0
    for number, point in enumerate(among):
        shutil.rmtree(target.parent, ignore_errors=True)
        target.parent.mkdir(parents=True)
        old: dict[str, bytes] = {}
        if overwrite:
            target.mkdir()
            (target / "old.safetensors").write_text("x")
            old = files(target)
        code, _, call = convert(target, column, kill=point, **options)
        assert code in (-signal.SIGKILL, 0), call
        left = check_nothing_half(target, whole, old)
        seen.add(left)
        if left == "new" and not (Partial(target).state).exists():
            continue
        if number % 4 == 1:  # and the run that resumes, too
            code, _, call = convert(target, column, kill=point // 2 + 1, resume=True, **options)
            assert code in (-signal.SIGKILL, 0), call
            left = check_nothing_half(target, whole, old)
            if left == "new" and not (Partial(target).state).exists():
                continue
        again = convert(target, column, resume=True, **options)
        assert again[0] == 0, again
        resumed += 1
        assert files(target) == whole
        assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert resumed >= len(among) // 2
    assert seen >= ({"old", "new"} if overwrite else {"nothing", "new"})


def test_a_run_after_a_killed_one_begins_anew(tmp_path: Path, convert: Run) -> None:
    target = tmp_path / "out"
    _, count, _ = convert(tmp_path / "reference", "te")
    assert convert(target, "te", kill=count // 2)[0] == -signal.SIGKILL
    (Partial(target).folder / "stray").write_text("x")
    assert convert(target, "te")[0] == 0
    assert files(target) == files(tmp_path / "reference")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "reference"}


def test_a_fault_that_a_run_could_not_report_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(with_layers(odd_config() | {"tie_word_embeddings": True}, 1), tmp_path / "hf")
    held = load_file(folder / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].copy()
    held["lm_head.weight"].reshape(-1).view(np.uint8)[7] ^= 1
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    def interrupted(parts: object, faults: Sequence[str]) -> None:
        if faults:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stream, "_refuse", interrupted)
        with pytest.raises(Interrupted):
            convert_folder(folder, tmp_path / "out", target_column="te")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*differs from it \(1 elements"):
        convert_folder(folder, tmp_path / "out", target_column="te", resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
