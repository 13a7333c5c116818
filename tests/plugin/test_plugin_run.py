"""Whole runs of pytest with the plugin, each in its own process."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from _pytest.pytester import LineMatcher

import parity
import parity.__main__
from parity.options import OPTIONS

Run = Callable[..., pytest.RunResult]
ROOT = Path(parity.__file__).parents[1]
HEAVY = {"torch", "transformers", "megatron", "numpy", "rich", "safetensors", "huggingface_hub", "xdist"}


def table(result: pytest.RunResult) -> list[str]:
    """The lines of the table and its conclusion, seconds left out."""
    start = next(i for i, line in enumerate(result.outlines) if line.startswith("===") and " parity " in line)
    lines = result.outlines[start + 1 :]
    end = next(i for i, line in enumerate(lines) if line.startswith("==="))
    timeless = (re.sub(r"\S+ +(pass|FAIL|error|skip|xfail)\b", r"\1", line) for line in lines[:end])
    return [" ".join(line.split()) for line in timeless]


def test_loads_nothing_heavy() -> None:
    code = "import sys, parity.plugin; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not HEAVY & set(loaded.stdout.split())


def test_runs_the_suite_from_an_empty_folder(run: Run, model: Path) -> None:
    result = run(f"--model={model}", "--tp", "1,2")
    result.assert_outcomes(passed=8)
    result.stdout.fnmatch_lines(
        [
            "parity: *Llama-Small (weights: the checkpoint's)",
            "parity: 2 combinations asked for, 2 to check",
            "parity: *torch *",
            "  check  * measured  * bound  margin  seconds  verdict  unit",
            "llama-small-tp1-pp1-fp32-megatron",
            "  plan  * 0  * 0  * exact  * pass  * of 1,235,814,400 elements unproved",
            "  weights to Megatron  * exact  * pass  * of 146 tensors differ",
            "  weights back  * exact  *",
            "  logits  * 5.5e-05  9.5e-04  * 17x  * pass  * max |d|, every token",
            "llama-small-tp2-pp1-fp32-megatron",
            "10 checks in 2 cases: all passed",
        ]
    )
    assert result.ret == 0


def test_writes_nothing_into_the_model(run: Run, model: Path) -> None:
    """Not even where pytest takes the model's folder for its root, as it may for `--model FOLDER`."""
    result = run("--model", model, "--rootdir", model)
    assert result.ret == 0
    assert [path.name for path in model.iterdir()] == ["config.json"]


def test_same_table_under_xdist_and_one_worker_a_topology(run: Run, model: Path, places: Path) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist")
    asked = (f"--model={model}", "--tp=1,2,4", "--precision=fp32,bf16", "-p", "no:cacheprovider")
    alone = run(*asked)
    places.unlink()
    spread = run(*asked, "-n", "2")
    assert alone.ret == spread.ret == 0
    assert table(spread) == table(alone)
    assert "30 checks in 6 cases: all passed" in table(spread)
    workers: dict[str, set[str]] = {}
    for line in places.read_text().splitlines():
        topology, worker = line.split()
        workers.setdefault(topology, set()).add(worker)
    assert sorted(workers) == ["tp1-pp1", "tp2-pp1", "tp4-pp1"]
    assert all(len(found) == 1 for found in workers.values()), workers
    assert set.union(*workers.values()) == {"gw0", "gw1"}


def test_a_chosen_way_to_distribute_stays(run: Run, model: Path) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist")
    result = run(f"--model={model}", "-n", "2", "-v", "--dist", "load")
    result.stdout.fnmatch_lines(["scheduling tests via LoadScheduling"])
    run(f"--model={model}", "-n", "2", "-v").stdout.fnmatch_lines(["scheduling tests via ByTopology"])


FAILING = """
import pytest


def test_gradients(case, record):
    record.within("loss", measured=0.0, bound=2e-6, unit="|d|")
    record.within("gradients", measured=float("nan"), bound=1e-4, unit="max |d|", where="layer 3", detail="q_proj")
    raise AssertionError("never reached")


def test_decode(case):
    raise RuntimeError("rank 3 (tp=3) died")


def test_beam(case):
    pytest.skip("no beams here")


@pytest.fixture
def broken():
    raise OSError("no such file")


def test_early(case, broken, record):
    pass


def test_after(case, record):
    record.within("after", measured=0.0, bound=2e-6, unit="|d|")
    assert case is None


@pytest.mark.xfail(reason="known")
def test_known(case, record):
    record.within("known", measured=1.0, bound=2e-6, unit="|d|")
"""


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_failures_are_in_the_table_and_first_repeated(
    run: Run, model: Path, checks: Path, workers: tuple[str, ...]
) -> None:
    (checks.parent / "test_b_failing.py").write_text(FAILING)
    result = run(f"--model={model}", "-p", "no:cacheprovider", *workers)
    assert result.ret == 1
    text = LineMatcher(table(result))
    text.fnmatch_lines(
        [
            "loss 0 2.0e-06 exact pass |d|",
            "gradients nan 1.0e-04 - FAIL max |d|",
            "decode - - - error RuntimeError: rank 3 (tp=3) died",
            "beam - - - skip no beams here",
            "early - - - error OSError: no such file",
            "after 0 2.0e-06 exact pass |d|",
            "after - - - error AssertionError: *",
            "known 1 2.0e-06 500,000x over xfail |d|",
            "first failure: llama-small-tp1-pp1-fp32-megatron, gradients",
            "gradients: measured nan max |d|, allowed 1.0e-04",
            "case llama-small-tp1-pp1-fp32-megatron",
            "where layer 3",
            "q_proj",
        ],
        consecutive=False,
    )
    result.stdout.fnmatch_lines(["13 checks in 1 case: 7 passed, 4 failed, 2 skipped"])


def test_left_out_combinations_are_in_the_header(run: Run, model: Path) -> None:
    result = run(f"--model={model}", "--tp=2,5", "--pp=1,4", "--sp=off,on")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "parity: 8 combinations asked for, 4 to check",
            "parity: 4 left out",
            "  a feed-forward width of 144 does not divide over tp=5:",
            "    llama-small-tp5-pp1-fp32-megatron",
            "    llama-small-tp5-pp1-sp-fp32-megatron",
            "  layers do not divide evenly, so the embedding and the loss count as a layer each:",
            "    llama-small-tp2-pp4-count-embedding-count-loss-fp32-megatron",
            "*; 4 left out",
        ]
    )


def test_no_possible_case_fails_with_the_reasons(run: Run, model: Path) -> None:
    result = run(f"--model={model}", "--tp=5,7")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [
            "ERROR: none of the 2 combinations asked for is possible",
            "  a feed-forward width of 144 does not divide over tp=5:",
            "    llama-small-tp5-pp1-fp32-megatron",
            "  a feed-forward width of 144 does not divide over tp=7:",
        ]
    )


def test_unknown_model_fails_at_once(run: Run) -> None:
    result = run("--model=./Lama-3.2-1B")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --model ./Lama-3.2-1B: *Lama-3.2-1B*"])


def test_wrong_values_fail_at_once(run: Run, model: Path) -> None:
    result = run(f"--model={model}", "--tp=x", "--precision=bf61")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["ERROR: --tp: expected a whole number *", "--precision: expected fp32 or bf16 or fp8-delayed *"]
    )
    result = run("--tp=2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --tp: no effect without --model; add --model NAME"])


def test_unknown_option_fails(run: Run, model: Path) -> None:
    assert run(f"--model={model}", "--tpp=2").ret == pytest.ExitCode.USAGE_ERROR


def test_ini_of_another_project_does_not_matter(run: Run, model: Path, pytester: pytest.Pytester) -> None:
    pytester.makeini(
        """
        [pytest]
        testpaths = tests
        python_files = check_*.py
        python_functions = check_*
        filterwarnings = error
        addopts = --strict-markers --strict-config
        """
    )
    (pytester.path / "tests").mkdir()
    (pytester.path / "tests" / "check_theirs.py").write_text("import nothing_of_the_kind")
    result = run(f"--model={model}")
    result.assert_outcomes(passed=4, warnings=1)


def test_ini_and_tool_table_are_read(run: Run, model: Path, pytester: pytest.Pytester) -> None:
    pytester.makepyprojecttoml(
        """
        [tool.pytest.ini_options]
        parity_tp = "1,2"
        parity_precision = "bf16"
        [tool.parity]
        precision = "fp32"
        cp = [1, 2]
        """
    )
    result = run(f"--model={model}", "--tp=4", "--collect-only", "-q", "-k", "plan")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "*test_plan[[]llama-small-tp4-pp1-bf16-megatron[]]",
            "*test_plan[[]llama-small-tp4-pp1-cp2-bf16-megatron[]]",
            "2/8 tests collected (6 deselected)*",
        ]
    )
    assert not any("checks in" in line for line in result.outlines)


def test_nothing_selected_is_not_green(run: Run, model: Path) -> None:
    result = run(f"--model={model}", "-k", "no_such_check")
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    result.stdout.fnmatch_lines(["parity: no check ran in any case"])


ALIVE = """
ALIVE = []


def test_subject(case, subject):
    assert subject.slug == case.slug == "llama-small-seeded-2layers"
    assert subject.config["num_hidden_layers"] == 2
    ALIVE.append(subject)


def test_is_the_same(case, subject):
    assert all(one is subject for one in ALIVE)


def test_ranks(zygote):
    assert zygote.run("os:getpid", world=2, backend=None) != zygote.run("os:getpid", world=2, backend=None)
"""


def test_subject_and_zygote_are_made_once_a_session(run: Run, model: Path, checks: Path) -> None:
    checks.write_text(ALIVE)
    result = run(f"--model={model}", "--tp=1,2", "--weights=seeded", "--layers=2")
    result.assert_outcomes(passed=5)


def test_the_shipped_suite_is_collected_from_an_empty_folder(
    run: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real suite, whose folder lies under the project's own conftest file where the installation is editable."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = (sys.executable, "-m", "pytest", "-p", "parity.plugin", "--model", "Llama-3.2-1B", "--tp", "2")
    result = pytester.run(*command, "--size", "tiny", "--collect-only", "-q")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["test_*.py::test_*[[]llama-3.2-1b-tiny-tp2-pp1-fp32-megatron[]]"])


THEIRS = """
import pytest


def test_own(case, record, subject):
    record.within("own", measured=0.1, bound=0.2, unit="mm")


@pytest.mark.parametrize("case", ["theirs"])
def test_parameter(case):
    assert case == "theirs"


class TestFixture:
    @pytest.fixture
    def case(self):
        return "theirs"

    def test_fixture(self, case):
        assert case == "theirs"


def test_plain():
    pass
"""


def test_own_tests_use_the_fixtures(run: Run, model: Path, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_theirs=THEIRS)
    result = run(f"--model={model}", "--tp=1,2", "--weights=seeded", "test_theirs.py")
    result.assert_outcomes(passed=5)
    result.stdout.fnmatch_lines(["  own  * 0.1  * 0.2  * 2.0x  * pass  * mm", "2 checks in 2 cases: all passed"])


def test_nothing_changes_without_a_model(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_theirs=THEIRS)
    result = run("-rs")
    result.assert_outcomes(passed=3, skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED * no model to check: add --model NAME"])
    result.stdout.no_fnmatch_line("*parity:*")


def test_the_suite_is_not_collected_without_a_model(run: Run, checks: Path) -> None:
    everything = run(checks.parents[1])
    assert everything.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    asked = run(checks.parent, "-rs")
    asked.assert_outcomes(skipped=4)
    asked.stdout.fnmatch_lines(["SKIPPED * no model to check: add --model NAME"])


def test_junit_holds_the_measurements(run: Run, model: Path, pytester: pytest.Pytester) -> None:
    assert run(f"--model={model}", "--junitxml=out.xml").ret == 0
    text = (pytester.path / "out.xml").read_text()
    assert "parity_case" in text
    assert "max |d|, every token" in text


def test_parity_check_is_pytest_with_a_model(run: Run, model: Path, pytester: pytest.Pytester) -> None:
    command = [
        sys.executable,
        "-m",
        "parity",
        "check",
        model,
        "--tp=1,2",
        "--layers",
        "4",
        "-p",
        "stand_in",
        "-k",
        "plan",
    ]
    result = pytester.run(*command)
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["parity: *, first 4 layers)", "llama-small-4layers-tp2-pp1-*", "2 checks in 2 cases: all passed"]
    )
    assert pytester.run(*command, "--precision=f").ret == pytest.ExitCode.USAGE_ERROR


def test_parity_check_passes_every_option_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(pytest, "main", lambda line: seen.extend(line) or 0)
    given = [f"--{option.name}" if option.flag else f"--{option.name}=x" for option in OPTIONS[1:]]
    assert parity.__main__.main(["check", "m", *given, "-n", "2"]) == 0
    assert seen == ["-p", "parity.plugin", "--model=m", *given, "-n", "2"]


def test_help_names_every_option(run: Run) -> None:
    text = run("--help").stdout.str()
    assert all(f"--{option.name}" in text for option in OPTIONS)
    assert "parity_tp (string):" in text
