"""Several processes write one checkpoint: the bytes are those of a single one, and all of them end when one does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torchrun_files import convert

from converters.convert import convert_folder
from parity.ranks import Zygote
from parity.seeded import write_checkpoint
from parity.tiny import odd_config, with_layers


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(with_layers(odd_config(), 3), tmp_path_factory.mktemp("shared") / "hf", shards=3)


@pytest.fixture(scope="module")
def single(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    """What one process writes."""

    def files_of(column: str) -> dict[str, bytes]:
        target = tmp_path_factory.mktemp("single") / "out"
        convert_folder(source, target, target_column=column)
        return files(target)

    return files_of


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Zygote]:
    """Forks ranks that have torch already, and a process group."""
    with Zygote(preload=("torch", "torch.distributed")) as zygote:
        yield zygote


def torchrun(count: int, *arguments: str) -> tuple[int, str]:
    """One conversion by the ranks of a torchrun; its exit status, and what they said."""
    script = str(Path(__file__).with_name("torchrun_files.py"))
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={count}",
            script,
            *arguments,
        ],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return ran.returncode, ran.stdout or ran.stderr


@pytest.mark.parametrize(("count", "column", "launcher"), [(2, "te", ""), (3, "te", ""), (3, "megatron", "torchrun")])
def test_the_bytes_are_those_of_one_process(
    tmp_path: Path,
    source: Path,
    ranks: Zygote,
    single: Callable[[str], dict[str, bytes]],
    count: int,
    column: str,
    launcher: str,
) -> None:
    arguments = str(source), str(tmp_path / "out"), column
    if launcher:
        code, said = torchrun(count, *arguments)
        assert code == 0, said
    else:
        said = "\n".join(ranks.run(convert, *arguments, world=count, timeout=60))
    assert files(tmp_path / "out") == single(column)
    wrote = [tuple(map(int, found)) for found in re.findall(r"wrote (\d+) of (\d+)", said)]
    assert len(wrote) == count
    assert sum(own for own, _ in wrote) == wrote[0][1]
    assert min(own for own, _ in wrote) > 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failing", [0, 1])
def test_when_one_fails_all_say_why(tmp_path: Path, source: Path, ranks: Zygote, failing: int) -> None:
    said = ranks.run(convert, str(source), str(tmp_path / "out"), "te", f"fail:{failing}", world=2, timeout=60)
    why = r"model.*\.safetensors: \S+ is not what it should be"
    assert re.search(rf"rank {failing} ended with CheckpointError: {why}", said[failing])
    assert re.search(rf"rank {1 - failing} ended with \w+: rank {failing}: {why}", said[1 - failing])
    assert list(tmp_path.iterdir()) == []


def test_when_one_is_killed_the_rest_is_kept(
    tmp_path: Path, source: Path, single: Callable[[str], dict[str, bytes]]
) -> None:
    code, said = torchrun(2, str(source), str(tmp_path / "out"), "te", "kill:1")
    assert code != 0
    assert "rank 0 wrote" not in said
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    done = convert_folder(source, tmp_path / "out", target_column="te", resume=True)
    assert done.resumed > 0
    assert files(tmp_path / "out") == single("te")
