"""The table as text: its widths, its alignment, and its words."""

from __future__ import annotations

import pytest

from parity.findings import Measurement
from parity.report import Row, conclusion, render


def row(case: str, check: str, verdict: str = "pass", *, unit: str = "max |d|", index: int = 0, cause: str = "") -> Row:
    measurement = Measurement(
        check=check,
        measured=5.5e-5,
        bound=9.5e-4 if verdict == "pass" else 1e-9,
        unit=unit,
        margin=9.5e-4 / 5.5e-5 if verdict == "pass" else 1e-9 / 5.5e-5,
        passed=verdict == "pass",
    )
    bare = verdict in ("skip", "error")
    return Row(
        case=case,
        order=("test_a.py", 1, check, index),
        measurement=None if bare else measurement,
        check=check,
        verdict=verdict,
        seconds=1.5,
        cause=cause,
    )


ROWS = [
    row(
        "llama-tp1-pp1-fp32-megatron", "logits", unit="max |d|, every token of every probe of the catalogue, in floors"
    ),
    row("llama-tp1-pp1-fp32-megatron", "loss", "FAIL"),
    row("llama-tp2-pp1-fp32-megatron", "gradients", "skip", cause="not compared yet"),
    row(
        "llama-tp2-pp1-fp32-megatron", "decode of a very long name that says all", "error", cause="RuntimeError: rank 3"
    ),
]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_fits_the_terminal(width: int) -> None:
    lines = render(ROWS, colour=False, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert all(line == line.rstrip() for line in lines)
    assert not any("\x1b" in line for line in lines)


def test_one_heading_a_case_and_aligned_numbers() -> None:
    text = render(ROWS, colour=False, width=100)
    assert text.count("llama-tp1-pp1-fp32-megatron\n") == text.count("llama-tp2-pp1-fp32-megatron\n") == 1
    heading, _, first, *rest = text.splitlines()
    assert heading.split() == ["check", "measured", "bound", "margin", "seconds", "verdict", "unit"]
    loss = next(line for line in rest if line.lstrip().startswith("loss"))
    for column, value in (("measured", "5.5e-05"), ("bound", "9.5e-04"), ("margin", "17x"), ("seconds", "1.50")):
        assert first.index(value) + len(value) == heading.index(column) + len(column), column
    assert loss.split() == ["loss", "5.5e-05", "1.0e-09", "55,000x", "over", "1.50", "FAIL", "max", "|d|"]


def test_colour_is_on_request() -> None:
    text = render(ROWS, colour=True, width=100)
    assert "\x1b[1;31m" in next(line for line in text.splitlines() if "FAIL" in line)
    assert "\x1b[32m" in next(line for line in text.splitlines() if "pass" in line)
    assert "\x1b[1mllama-tp1-pp1-fp32-megatron" in text


def test_conclusion() -> None:
    assert conclusion([ROWS[0]]) == "1 check in 1 case: all passed"
    assert conclusion([ROWS[0]] * 2, left_out=3) == "2 checks in 1 case: all passed; 3 combinations left out"
    assert conclusion(ROWS, left_out=1) == (
        "4 checks in 2 cases: 1 passed, 2 failed, 1 skipped; 1 combination left out"
    )
