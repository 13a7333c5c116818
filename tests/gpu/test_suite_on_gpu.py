"""The shipped suite on a GPU, with Transformer Engine's layers: the same table, the other column."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from parity.devices import gpus

pytestmark = [
    pytest.mark.skipif(gpus() < 1, reason="no NVIDIA GPU on this machine"),
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None, reason="transformer-engine is not installed"
    ),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tiny_llama_passes_on_one_gpu(precision: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "parity.plugin", "--model", "meta-llama/Llama-3.2-1B"]
    options = ["--weights", "seeded", "--size", "tiny", "--device", "cuda", "--precision", precision]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "all passed" in done.stdout
