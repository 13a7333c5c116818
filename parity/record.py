"""The fixture `record`: what a check finds is stored first, so that the report has it, then judged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

import pytest

from parity.causes import Cause
from parity.findings import Account, Finding, Map, Measurement

PROPERTY = "parity"
"""Name of the user property that carries one measurement from the test to the report."""
PICTURE = "parity_picture"
"""Name of the user property that carries one picture: its fields, and `kind`, `lines` or `map`."""

ACCOUNT = "parity_account"
"""Name of the user property that carries one account of names: its title and its rows."""

CAUSES = 6
"""Causes that a failure's text names."""


class Record:
    """Stores what checks find, and fails the test if any measurement does not pass.

    Args:
        store: Takes the name and value of a user property (as pytest's `record_property`).
        subject: What the test is about, for failure messages: the id of its case, or the test's own.
    """

    def __init__(self, store: Callable[[str, object], None], subject: str) -> None:
        self._store = store
        self._subject = subject
        self._since = time.perf_counter()

    def all(self, findings: Iterable[Finding]) -> None:
        """Store every finding, then fail with the text of each measurement that does not pass.

        A check goes on after a measurement that fails: what it finds next, and its pictures, may say why.
        """
        failures, measured = [], False
        for finding in findings:
            measured = measured or isinstance(finding, Measurement)
            if text := self._keep(finding):
                failures.append(text)
        if not measured:
            pytest.fail(f"{self._subject}: the check measured nothing", pytrace=False)
        if failures:
            pytest.fail("\n".join(failures), pytrace=False)

    def within(self, check: str, **given: Any) -> None:
        """`Measurement.within`, stored and judged."""
        self.all([Measurement.within(check, **given)])

    def equal(self, check: str, **given: Any) -> None:
        """`Measurement.equal`, stored and judged."""
        self.all([Measurement.equal(check, **given)])

    def proved(self, check: str, **given: Any) -> None:
        """`Measurement.proved`, stored and judged."""
        self.all([Measurement.proved(check, **given)])

    def _keep(self, finding: Finding) -> str:
        """Store one finding; the failure message, or an empty string."""
        if isinstance(finding, Account):
            self._store(ACCOUNT, asdict(finding))
            return ""
        if not isinstance(finding, Measurement):
            kind = "map" if isinstance(finding, Map) else "lines"
            self._store(PICTURE, {"kind": kind, **asdict(finding)})
            return ""
        now = time.perf_counter()
        measurement = replace(finding, seconds=now - self._since)
        self._since = now
        self._store(PROPERTY, measurement.as_json())
        if measurement.passed:
            return ""
        lines = [measurement.verdict, f"  case   {self._subject}"]
        lines += [f"  where  {measurement.where}"] if measurement.where else []
        lines += [f"  cause: {Cause.from_json(cause)}" for cause in measurement.causes[:CAUSES]]
        more = len(measurement.causes) - CAUSES
        lines += [f"  and {more} further causes"] * (more > 0)
        return "\n".join([*lines, *(f"  {line}" for line in measurement.detail.splitlines())])
