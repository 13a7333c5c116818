"""A tiny suite and model for the plugin, and pytest runs of it in processes of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import parity

LLAMA = {
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_size": 96,
    "intermediate_size": 144,
    "num_hidden_layers": 6,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

STAND_IN = (
    '"""Puts a small suite in place of the shipped one."""\nimport parity.plugin\nparity.plugin.SUITE = "small_suite"\n'
)

CHECKS = """
import os, warnings

def test_plan(case, record):
    warnings.warn("a library's", UserWarning)
    record.proved("plan", count=1_235_814_400, unit="elements")


def test_weights(case, record):
    record.equal("weights to Megatron", count=146, unit="tensors")
    record.equal("weights back", count=146, unit="tensors")


def test_logits(case, record, tmp_path_factory):
    record.within("logits", measured=5.5e-5, bound=9.5e-4, unit="max |d|, every token")


def test_worker(case):
    name = os.environ.get("PYTEST_XDIST_WORKER", "main")
    with open(os.environ["PLACES"], "a") as file:
        file.write(f"{case.topology} {name}\\n")
"""

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that holds nothing but a config, away from the folder that the runs start in."""
    folder = tmp_path / "Llama-Small"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


@pytest.fixture
def checks(tmp_path: Path) -> Path:
    """The small suite's first module; more may be written beside it."""
    suite = tmp_path / "plugins" / "small_suite"
    suite.mkdir(parents=True)
    (suite / "__init__.py").write_text("")
    (suite.parent / "stand_in.py").write_text(STAND_IN)
    (suite / "test_a_small.py").write_text(CHECKS)
    return suite / "test_a_small.py"


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """Where `test_worker` writes which worker ran which topology."""
    return tmp_path / "places.txt"


@pytest.fixture
def run(pytester: pytest.Pytester, checks: Path, places: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run pytest on the small suite in an empty folder, in its own process; extra arguments are pytest's."""
    root = Path(parity.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{root}:{checks.parents[1]}")
    monkeypatch.setenv("PARITY_CACHE", str(places.parent / "cache"))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("PLACES", str(places))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)

    def run(*arguments: object) -> pytest.RunResult:
        plugins = ("-p", "parity.plugin", "-p", "stand_in", "-p", "no:hypothesispytest", "-p", "no:timeout")
        return pytester.runpytest_subprocess(*plugins, *map(str, arguments), timeout=60)

    return run
