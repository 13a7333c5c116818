"""Report files of whole runs of pytest, each in its own process."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import parity
from parity.options import OPTIONS
from parity.report.facts import finite, repeat
from parity.report.files import ReportError, claim, load, write

Run = Callable[..., pytest.RunResult]
SCHEMA = json.loads((Path(parity.__file__).parent / "report" / "schema.json").read_text(encoding="utf-8"))

FINDINGS = """
import math

import pytest

from parity.findings import Lines, Map, Measurement


def test_found(case, record, request):
    request.node.user_properties.append(
        ("parity_account", {"title": "config", "rows": [{"name": "a", "side": "hf", "class": "same", "reason": ""}]})
    )
    record.all([
        Measurement.within("loss", measured=math.nan if "tp2" in case.id else 0.0, bound=1e-3, unit="|d|"),
        Lines(title="by layer", x="layer", y="|d|", curves={"a": [1.0, math.nan, math.inf]}, marks={"floor": 0.5}),
        Map(title="qkv", x="column", y="row", values=[[0.0, -math.inf]]),
    ])


def test_beam(case):
    pytest.skip("no beams here")


def test_died(case):
    raise RuntimeError("rank 3 died")
"""


def valid(path: Path) -> dict[str, Any]:
    """The record in `path`, which fits the schema and holds no number that JSON does not have."""
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema")

    def no_such_number(name: str) -> None:
        raise AssertionError(f"{name} in JSON")

    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_constant=no_such_number)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.Draft202012Validator(SCHEMA).validate(record)
    return record


def timeless(value: Any) -> Any:
    """A record without its times and without the command line that made it."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "started", "command")}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def test_reports_of_a_failing_run_with_and_without_workers(
    run: Run, model: Path, checks: Path, pytester: pytest.Pytester
) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist")
    (checks.parent / "test_b_found.py").write_text(FINDINGS)
    asked = (f"--model={model}", "--tp=1,2,5", "-p", "no:cacheprovider")
    alone = run(*asked, "--parity-report=a.json,a.md", "--parity-report=made/a.html")
    assert alone.ret == 1
    lines = alone.outlines
    assert [line for line in lines if "report written" in line] == [
        f"parity: report written to {name}" for name in ("a.json", "a.md", "made/a.html")
    ]
    record = valid(pytester.path / "a.json")
    assert record["summary"] == {
        "verdict": "fail", "checks": 16, "passed": 11, "failed": 3, "skipped": 2, "cases": 2, "left_out": 1,
        "line": "16 checks in 2 cases: 11 passed, 3 failed, 2 skipped; 1 left out",
    }  # fmt: skip
    assert record["summary"]["line"] in "\n".join(lines)
    assert [case["id"] for case in record["cases"]] == [f"llama-small-tp{tp}-pp1-fp32-megatron" for tp in (1, 2)]
    second = record["cases"][1]
    (loss,) = (one for one in second["measurements"] if one["check"] == "loss")
    assert (loss["measured"], loss["margin"], loss["verdict"], loss["test"]) == ("nan", None, "FAIL", "found")
    assert [picture["kind"] for picture in second["pictures"]] == ["lines", "map"]
    assert second["pictures"][0]["curves"] == {"a": [1.0, "nan", "inf"]}
    assert second["accounts"][0]["rows"] == [{"name": "a", "side": "hf", "class": "same", "reason": ""}]
    verdicts = {test["name"]: test["verdict"] for test in second["tests"]}
    assert verdicts["found"] == "FAIL"
    assert verdicts["beam"] == "skip"
    assert verdicts["died"] == "error"
    assert next(test["cause"] for test in second["tests"] if test["name"] == "died") == "RuntimeError: rank 3 died"
    assert record["skipped"][0] == {"case": record["cases"][0]["id"], "check": "beam", "reason": "no beams here"}
    assert "does not divide over tp=5" in record["left_out"][0]["reason"]
    assert second["command"] == f"pytest --model {model} --tp 2"
    assert not record["interrupted"]
    assert "❌" in (pytester.path / "a.md").read_text()
    assert "<svg" in (pytester.path / "made" / "a.html").read_text()

    assert run(*asked, "-n2", "--parity-report=b.json").ret == 1
    assert timeless(valid(pytester.path / "b.json")) == timeless(record)


@pytest.mark.parametrize("how", ["-x", "Ctrl-C", "import"])
def test_what_was_done_before_an_end_is_reported(
    run: Run, model: Path, checks: Path, pytester: pytest.Pytester, how: str
) -> None:
    raised = {"-x": "def test_b(case):\n    assert case is None\n", "import": "import nothing_of_this_name\n"}
    (checks.parent / "test_b.py").write_text(raised.get(how, "def test_b(case):\n    raise KeyboardInterrupt\n"))
    (checks.parent / "test_c.py").write_text("def test_c(case):\n    pass\n")
    (pytester.path / "a.json").write_text("of an earlier run")
    result = run(f"--model={model}", "--parity-report=a.json", "-p", "no:cacheprovider", *["-x"] * (how == "-x"))
    assert result.ret != 0
    record = valid(pytester.path / "a.json")
    assert record["interrupted"]
    assert record["summary"]["verdict"] == ("incomplete" if how == "Ctrl-C" else "fail")
    assert not any(test["name"] == "c" for case in record["cases"] for test in case["tests"])
    assert [error["where"] for error in record["errors"]] == (["test_b.py"] if how == "import" else [])


@pytest.mark.parametrize("name", ["file/a.json", "folder.html"])
def test_a_place_that_takes_no_report_is_an_error_before_the_run(
    run: Run, model: Path, pytester: pytest.Pytester, places: Path, name: str
) -> None:
    (pytester.path / "file").write_text("")
    (pytester.path / "folder.html").mkdir()
    result = run(f"--model={model}", f"--parity-report={name}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: --parity-report: *{name}: expected a *, found *"])
    assert not places.exists(), "a test ran"


def test_an_unknown_suffix_is_an_error_that_names_the_three(run: Run, model: Path) -> None:
    result = run(f"--model={model}", "--parity-report=a.pdf")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--parity-report: expected a file that ends in .json, .md or .html, found 'a.pdf'"])


def test_complete_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("before")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(path, {"a": float("nan")})
    assert (path.read_text(), list(tmp_path.iterdir())) == ("before", [path])
    with path.open() as reader:
        write(path, {"a": 1})
        assert reader.read() == "before", "who reads the old file goes on reading it whole"
    write(path, {"schema": SCHEMA["$id"], **{name: {} for name in SCHEMA["required"][1:]}})
    assert load(path)["cases"] == {}
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o044, "others may read it, as any new file"
    claim(path)
    assert list(tmp_path.iterdir()) == [], "a report of an earlier run does not stay for one of this"
    path.mkdir()
    with pytest.raises(ReportError, match="found a folder"):
        claim(path)


def test_no_number_that_json_does_not_have() -> None:
    assert finite({"a": (1, float("nan"), [-float("inf")], "x", True, None)}) == {
        "a": [1, "nan", ["-inf"], "x", True, None]
    }


def test_a_case_is_repeated_by_its_command_line(model: Path) -> None:
    """The line asks for this case and no other, and for nothing that holds without being asked for."""
    from parity.case import matrix
    from parity.options import resolve
    from parity.subjects import config_of

    asked = {
        "model": str(model),
        "tp": "1,2",
        "pp": "1,2",
        "sp": "on",
        "precision": "bf16",
        "max_floors": "5",
        "layers": "2",
    }
    cases, _ = matrix(resolve(asked), config_of)
    assert len(cases) >= 2
    cases += matrix(resolve({"model": str(model), "against": str(model)}), config_of)[0]
    for case in cases:
        words = shlex.split(repeat(case))
        assert words.pop(0) == "pytest"
        given = {
            name.removeprefix("--").replace("-", "_"): value
            for name, value in zip(words[::2], words[1::2], strict=True)
        }
        assert matrix(resolve(given), config_of)[0] == [case]
        defaults = {option.key: option.default for option in OPTIONS}
        assert all(defaults[key] != value for key, value in given.items())
