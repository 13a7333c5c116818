"""The table as text: its widths, its alignment, and its words."""

from __future__ import annotations

import pytest
from report_samples import TP1, TP2, case, measurement, run

from parity.report.rows import Row, cause_line, grouped, rows_of
from parity.report.terminal import render, story

LONG = "max |d|, every token of every probe of the catalogue, in floors"
RECORD = run(
    case(TP1, [measurement("logits", margin=17, unit=LONG), measurement("loss", margin=1 / 55_000)]),
    case(TP2, [], verdict="error", cause="RuntimeError: rank 3"),
    case("llama-tp4-pp1-fp32-megatron", [], verdict="skip", cause="no such device"),
)
ROWS = rows_of(RECORD)


@pytest.mark.parametrize("width", [80, 100, 120])
def test_fits_the_terminal(width: int) -> None:
    lines = render(ROWS, colour=False, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert all(line == line.rstrip() for line in lines)
    assert not any("\x1b" in line for line in lines)


def test_one_heading_a_case_and_aligned_numbers() -> None:
    text = render(ROWS, colour=False, width=100)
    assert text.count(f"{TP1}\n") == text.count(f"{TP2}\n") == 1
    heading, _, first, *rest = text.splitlines()
    assert heading.split() == ["check", "measured", "bound", "margin", "seconds", "verdict", "unit"]
    loss = next(line for line in rest if line.lstrip().startswith("loss"))
    for column, value in (("measured", "1.2e-05"), ("bound", "2.0e-04"), ("margin", "17x"), ("seconds", "0.00")):
        assert first.index(value) + len(value) == heading.index(column) + len(column), column
    assert loss.split() == ["loss", "11", "2.0e-04", "55,000x", "over", "0.00", "FAIL", "max", "|d|"]


def test_colour_is_on_request() -> None:
    text = render(ROWS, colour=True, width=100)
    assert "\x1b[1;31m" in next(line for line in text.splitlines() if "FAIL" in line)
    assert "\x1b[32m" in next(line for line in text.splitlines() if "pass" in line)
    assert f"\x1b[1m{TP1}" in text


def test_conclusion() -> None:
    whole = run(case(TP1, [measurement("logits")]))["summary"]
    assert (whole["line"], whole["verdict"]) == ("1 check in 1 case: all passed", "pass")
    assert RECORD["summary"]["line"] == "4 checks in 3 cases: 1 passed, 2 failed, 1 skipped"
    assert RECORD["summary"]["verdict"] == "fail"
    some = run(case(TP1, [measurement("logits")]), left_out=[("x", "y")], interrupted=True)["summary"]
    assert some["line"] == "1 check in 1 case: all passed; 1 left out; interrupted, so not everything ran"
    assert some["verdict"] == "incomplete"
    broken = run(case(TP1, [measurement("logits")]), errors=[{"where": "test_a.py", "text": "ImportError"}])["summary"]
    assert broken["verdict"] == "fail"
    assert broken["line"].endswith("; 1 module could not be collected")


def test_many_that_pass_alike_are_one_line_and_failures_stay() -> None:
    probes = [measurement(f"logits, {name}", margin=margin) for name, margin in
              [("prose", 8), ("packed", 1.5), ("left-padded", 30), ("long", 9), ("broken", 0.5)]]  # fmt: skip
    rows = rows_of(run(case(TP1, [*probes, measurement("loss")])))
    found = [(row.check, row.margin, row.verdict) for row in grouped(rows)]
    assert found == [
        ("logits (4 checks)", "1.5x", "pass"),
        ("logits, broken", "2.0x over", "FAIL"),
        ("loss", "10x", "pass"),
    ]
    assert grouped(rows)[0].unit == "max |d|; the tightest: packed"
    few = rows_of(run(case(TP1, probes[:3])))
    assert grouped(few) == few


def test_exact_ones_are_grouped_under_the_tightest() -> None:
    probes = [measurement(f"gradients, {index}", margin=3 + index) for index in range(3)]
    probes.append({**measurement("gradients, 9"), "measured": 0, "margin": None})
    (row,) = grouped(rows_of(run(case(TP1, probes))))
    assert (row.check, row.margin) == ("gradients (4 checks)", "3.0x")


def test_a_failure_names_its_tensor_whole_whatever_the_width() -> None:
    name = "decoder.layers.17.self_attention.linear_qkv.weight"
    cause = {"kind": "keys exchanged", "what": ["k_proj", "v_proj"], "where": "layer 17", "detail": "every row"}
    detail = f"parameters differ (1):\n  tp=0: {name}: 9 of 9 elements differ; the first, [192, 0], should be another"
    failing = {**measurement("import", margin=0.1, detail=detail), "causes": [cause]}
    (row,) = rows_of(run(case(TP1, [failing])))
    assert any(name in line for line in story(row, 45)), "too wide, but whole"
    for width in (60, 120):
        lines = story(row, width)
        assert any(name in line for line in lines)
        assert max(map(len, lines)) <= width
        assert lines[0].startswith("  import: measured 2.0e-03 max |d|, allowed 2.0e-04, 10x")
        assert any("cause  k_proj and v_proj are exchanged, in layer 17" in line for line in lines)
        assert lines[-1] == "  repeat pytest --model llama -k test_logits"


@pytest.mark.parametrize(
    ("cause", "line"),
    [
        ({"kind": "unheard of", "what": ["a", "b"], "where": "layer 1"}, "unheard of: a, b, in layer 1"),
        ({"kind": "unheard of", "what": "a", "detail": "why"}, "unheard of: a: why"),
        ({}, "unknown"),
    ],
)
def test_causes_of_other_versions_are_told_too(cause: dict[str, object], line: str) -> None:
    assert cause_line(cause) == line


def test_a_row_without_a_measurement() -> None:
    row = Row(case=TP1, test="beam", check="beam", verdict="skip", seconds=0.0, cause="no beams here\nnor there")
    assert (row.measured, row.margin, row.sentence, row.causes) == ("-", "-", "no beams here", [])
