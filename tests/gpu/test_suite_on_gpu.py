"""The shipped suite on a GPU: Megatron-Core with Transformer Engine's layers, and the Llama model on them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from on_gpu import lacking, needs_te, precisions

from parity.devices import gpus

pytestmark = needs_te
COMMAND = [sys.executable, "-m", "pytest", "-p", "parity.plugin", "--model", "meta-llama/Llama-3.2-1B"]


def passes(folder: Path, *options: str) -> None:
    every = [*COMMAND, "--weights", "seeded", "--size", "tiny", "--device", "cuda", *options]
    done = subprocess.run(every, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout.splitlines()[-1]


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_megatron_on_one_gpu(precision: str, tmp_path: Path) -> None:
    passes(tmp_path, "--backend", "megatron", "--precision", precision)


PRECISIONS: list[Any] = ["fp32", "bf16", *precisions()]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_transformer_engine_on_one_gpu(precision: str, tmp_path: Path) -> None:
    passes(tmp_path, "--backend", "te", "--precision", precision)


def test_the_driver_shows_the_gpus_that_torch_has() -> None:
    """The suite counts them without importing torch; where it counts none, every check on a GPU would skip."""
    import torch

    assert not lacking()
    assert gpus() >= torch.cuda.device_count()
