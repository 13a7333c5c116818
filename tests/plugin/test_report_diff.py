"""What changed between two runs, and the exit status of `parity report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_samples import TP1, TP2, case, measurement, run

from parity.__main__ import main
from parity.report.diff import difference

BEFORE = run(case(TP1, [measurement("logits", margin=8), measurement("loss", margin=5)]), case(TP2, [measurement("a")]))


def kinds(after: dict[str, Any], before: dict[str, Any] = BEFORE) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for change in difference(before, after).changes:
        found.setdefault(change.kind, []).append(f"{change.case} {change.check} {change.before}>{change.after}".strip())
    return found


def test_a_run_against_itself() -> None:
    assert kinds(BEFORE) == {}
    assert not difference(BEFORE, BEFORE).worse


def test_each_kind_of_change() -> None:
    logits, loss = measurement("logits", margin=3.9), measurement("loss", margin=0.5)
    after = run(
        case(TP1, [logits, loss, measurement("more")]),
        versions={"torch": "2.14.0"},
        left_out=[(TP2, "does not divide")],
    )
    assert kinds(after) == {
        "worse": [f"{TP1} loss pass>FAIL"],
        "gone": [f"{TP2} a pass>"],
        "shrank": [f"{TP1} logits 8.0x>3.9x"],
        "new": [f"{TP1} more >pass"],
        "versions": ["torch 2.13.0>2.14.0"],
    }
    found = {change.kind: change for change in difference(BEFORE, after).changes}
    assert found["gone"].why == "does not divide"
    back = kinds(BEFORE, after)
    assert back["better"] == [f"{TP1} loss FAIL>pass"]
    assert "worse" not in back


@pytest.mark.parametrize(("margin", "told"), [(4.1, False), (3.9, True), (80, False)])
def test_a_margin_may_shrink_by_two(margin: float, told: bool) -> None:
    after = run(case(TP1, [measurement("logits", margin=margin), measurement("loss", margin=5)]), BEFORE["cases"][1])
    assert ("shrank" in kinds(after)) == told
    assert not difference(BEFORE, after).worse


def test_nothing_found_at_all_was_more_room() -> None:
    exact = {**measurement("logits"), "measured": 0.0, "margin": None}
    before, after = run(case(TP1, [exact])), run(case(TP1, [measurement("logits", margin=900)]))
    assert kinds(after, before) == {"shrank": [f"{TP1} logits exact>900x"]}
    assert kinds(before, after) == {}


def test_what_is_skipped_now_is_worse() -> None:
    skipped = run(case(TP1, [], verdict="skip", cause="no GPU"))
    before = run(case(TP1, []))
    assert kinds(skipped, before) == {"worse": [f"{TP1} logits pass>skip"]}


def test_checks_of_one_name_are_told_apart() -> None:
    twice = run(case(TP1, [measurement("logits"), measurement("logits", margin=7)]))
    once = run(case(TP1, [measurement("logits")]))
    assert kinds(once, twice) == {"gone": [f"{TP1} logits pass>"]}
    assert difference(twice, once).worse, "what is gone is as bad as what fails"


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worse = run(case(TP1, [measurement("logits", margin=0.1), measurement("loss", margin=5)]), BEFORE["cases"][1])
    paths = {}
    for name, record in (("before", BEFORE), ("worse", worse)):
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(json.dumps(record))
    asked = ["report", "diff", str(paths["before"])]
    assert main([*asked, str(paths["before"])]) == 0
    assert "3 checks in both runs; nothing that passed is lost" in capsys.readouterr().out
    assert main([*asked, str(paths["worse"])]) == 1
    assert "pass -> FAIL" in capsys.readouterr().out
    assert main([*asked, str(paths["worse"]), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["worse"], [change["kind"] for change in said["changes"]]) == (True, ["worse"])

    assert main(["report", "render", str(paths["worse"]), "-o", str(tmp_path / "out.html")]) == 0
    assert (tmp_path / "out.html").read_text().startswith("<!doctype html>")
    assert main(["report", "render", str(paths["worse"]), "-o", str(tmp_path / "out.pdf")]) == 2
    assert ".json, .md, .html" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("{", "expected a report in JSON"),
        ("[]", "found None"),
        ('{"schema": "llama-parity/report/2"}', "found 'llama-parity/report/2'"),
        ('{"schema": "llama-parity/report/1"}', "without cases, left_out, machine, summary, versions"),
    ],
)
def test_what_is_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, words: str) -> None:
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    assert main(["report", "diff", str(path), str(path)]) == 2
    assert words in capsys.readouterr().err
