"""The harness on a converter that knows nothing of it: passed when it is right, and its bugs found when it is not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from converters.errors import SourceError
from parity.__main__ import main
from parity.case import matrix
from parity.checks import forward, weights
from parity.checks.bench import Bench, Shared
from parity.converter import Named, find
from parity.findings import Measurement
from parity.options import resolve
from parity.ranks import Zygote
from parity.subjects import config_of, subject

CHECKS = {
    "import": weights.imported,
    "export": weights.exported,
    "round trip": weights.round_trip,
    "forward": forward.logits_and_loss,
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A small Llama 2 over two tensor-parallel ranks."""
    options = resolve({"model": "Llama-2-7b-hf", "size": "tiny", "tp": "2"})
    (case,), _ = matrix(options, config_of)
    with Zygote() as zygote:
        shared = Shared(zygote=zygote)
        found = subject(case.model, size=case.size, cache=tmp_path_factory.mktemp("cache"))
        yield Bench(case=case, subject=found, shared=shared)
        shared.close()


@pytest.fixture
def red(bench: Bench) -> Callable[[str], dict[str, list[Measurement]]]:
    """The checks that do not pass a converter, and what they say."""

    def of(name: str) -> dict[str, list[Measurement]]:
        tried = replace(bench, converter=Named(f"naive:{name}"))
        said = {
            check: [one for one in run(tried) if isinstance(one, Measurement) and not one.passed]
            for check, run in CHECKS.items()
        }
        return {check: failed for check, failed in said.items() if failed}

    return of


def test_a_right_one_passes(red: Callable[[str], dict[str, list[Measurement]]]) -> None:
    assert red("Correct") == {}


@pytest.mark.parametrize(
    ("name", "checks", "words"),
    [
        # There and back it undoes itself: the round trip is clean, and proves nothing.
        ("Contiguous", {"import", "export", "forward"}, ("linear_qkv.weight", "is model.layers.0.self_attn.q_proj")),
        ("CutWhole", {"import", "export", "forward"}, ("linear_fc1.weight", "is model.layers.0.mlp.gate_proj")),
        ("ForgetsEpsilon", {"forward"}, ("eps",)),
        ("ShiftsVocabulary", {"export", "round trip"}, ("model.embed_tokens.weight",)),
    ],
)
def test_its_bugs_are_found(
    name: str, checks: set[str], words: tuple[str, ...], red: Callable[[str], dict[str, list[Measurement]]]
) -> None:
    found = red(name)
    assert set(found) == checks
    said = "\n".join(one.detail for failed in found.values() for one in failed)
    for word in words:
        assert word in said


def test_one_that_returns_no_model(bench: Bench) -> None:
    (found,) = weights.imported(replace(bench, converter=Named("naive:Nothing")))
    assert isinstance(found, Measurement)
    assert not found.passed
    assert "to_megatron returned nothing on rank" in found.detail


def test_from_the_command_line(tmp_path: Path) -> None:
    folders = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    command = ["pytest", "-p", "parity.plugin", "--model=Llama-2-7b-hf", "--size=tiny", "--converter=naive:CutWhole"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--tp=2", "-k", "import", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    assert "linear_fc1.weight" in done.stdout


def test_the_self_test_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Faults around somebody else's converter, on what it can do: it has no pipeline."""
    fault = ["--fault=gate and up exch*", "--seeds=0"]
    assert main(["self-test", "--model=Llama-2-7b-hf", "--converter=naive:Correct", *fault]) == 0
    said = capsys.readouterr().out
    assert "6 caught" in said
    assert "left out: " in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama-partiy", "did you mean 'llama-parity'"),
        ("nowhere:Thing", "cannot be imported: expected module:attribute, on the Python path"),
        ("json:Thing", "cannot be imported"),
        ("json:loads", "has no to_megatron and no to_hf"),
    ],
)
def test_a_converter_that_is_none(name: str, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        find(name)
