"""Run records for the tests of reports, put together by the functions that put together real ones."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from parity.findings import Lines, Map, Measurement
from parity.report.facts import Record, finite, machine, record_of

TP1, TP2 = "llama-tp1-pp1-fp32-megatron", "llama-tp2-pp1-fp32-megatron"

LINES = Lines(
    title="Error by layer",
    x="layer",
    y="max |d|",
    curves={"attention": [1e-5, 0.0, math.nan, 3e-5], "mlp": [2e-5, 1e-5, math.inf, 1e-6]},
    marks={"floor": 2e-5, "gate": 2e-4},
    ticks=["embedding", "0", "1", "final"],
)
MAP = Map(title="qkv", x="column", y="row", values=[[0.0, 1e-3], [math.nan, 2e-3]], rows=["q", "k"], columns=["0", "1"])
ACCOUNT = {"title": "config", "rows": [{"name": "rope_theta", "side": "hf", "class": "renamed", "reason": ""}]}


def measurement(check: str, *, margin: float = 10.0, test: str = "logits", **fields: Any) -> Record:
    """A measurement as a run record has it, `margin` times below its bound, or above where that is less than one."""
    given = {"unit": "max |d|", "where": "token 3", "detail": "floor 2.0e-05: measured"} | fields
    found = Measurement.within(check, measured=2e-4 / margin, bound=2e-4, **given)
    return {"test": test, **found.as_json(), "verdict": "pass" if found.passed else "FAIL"}


def case(name: str, measurements: list[Record], *, verdict: str = "", cause: str = "", **fields: Any) -> Record:
    """A case with one test, `logits`, that measured all of `measurements`."""
    failed = any(one["verdict"] == "FAIL" for one in measurements)
    test = {
        "name": "logits",
        "nodeid": f"test_3_forward.py::test_logits[{name}]",
        "verdict": verdict or ("FAIL" if failed else "pass"),
        "seconds": 1.5,
        "cause": cause,
        "command": "pytest --model llama -k test_logits",
    }
    known = {"model": "llama", "topology": "tp1-pp1", "precision": "fp32", "backend": "megatron", "converter": "own"}
    known |= {"device": "cpu", "floors": 10.0, "note": "", "command": "pytest --model llama"}
    empty: Record = {"pictures": [], "accounts": []}
    return {"id": name, **known, "tests": [test], "measurements": measurements, **empty, **fields}


def pictured(picture: Lines | Map) -> Record:
    """A picture as a run record has it."""
    kind = "map" if isinstance(picture, Map) else "lines"
    found: Record = finite({"test": "logits", "kind": kind, **asdict(picture)})
    return found


def run(*cases: Record, **fields: Any) -> Record:
    """A run record of `cases`."""
    facts: Record = {
        "started": "2026-01-02T03:04:05+00:00",
        "seconds": 1.5,
        "command": "pytest --model llama",
        "versions": {"torch": "2.13.0"},
        "machine": machine("cpu"),
        "models": [],
        "interrupted": False,
        "errors": [],
    }
    return record_of(list(cases), **(facts | fields))
