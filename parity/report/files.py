"""Report files: the run record as JSON, written complete or not at all, and read back."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from converters.errors import ConversionError
from parity.options import SUFFIXES
from parity.report.facts import SCHEMA, Record


class ReportError(ConversionError):
    """A report that cannot be written or read."""


def written(record: Record, suffix: str) -> str:
    """The report as text, in the form that `suffix` names: one of `SUFFIXES`."""
    if suffix == ".md":
        from parity.report.markdown import markdown

        return markdown(record)
    if suffix == ".html":
        from parity.report.html import html

        return html(record)
    assert suffix == ".json", f"{suffix} is none of {SUFFIXES}"
    return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def claim(path: Path) -> None:
    """Make sure, before a run, that `path` can be written after it; a report of an earlier run goes.

    Raises:
        ReportError: It is a folder, or its folder cannot be made or written to.
    """
    if path.is_dir():
        raise ReportError(f"{path}: expected a file to write the report to, found a folder")
    _aside(path, lambda aside: None)
    path.unlink(missing_ok=True)


def write(path: Path, record: Record) -> None:
    """Write `record` in the form that the suffix of `path` names, complete or not at all.

    Raises:
        ReportError: The file cannot be written.
    """
    text = written(record, path.suffix)

    def fill(aside: Path) -> None:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        aside.chmod(0o666 & ~mask)
        aside.replace(path)

    _aside(path, fill)


def _aside(path: Path, fill: Callable[[Path], Any]) -> None:
    """Call `fill` with a new file beside `path`, and leave nothing of it behind."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        os.close(handle)
        try:
            fill(Path(name))
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise ReportError(
            f"{path}: expected a place to write the report to, found {error.strerror or error}"
        ) from error


def load(path: Path) -> Record:
    """The run record in a file.

    Raises:
        ReportError: It cannot be read, is no run record, or is one of another version.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path}: expected a report in JSON, found {error.strerror or error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ReportError(
            f"{path}: expected a report in JSON, as --parity-report FILE.json writes it: {error}"
        ) from error
    found = record.get("schema") if isinstance(record, dict) else None
    if found != SCHEMA:
        raise ReportError(f'{path}: expected a report with "schema": "{SCHEMA}", found {found!r}')
    missing = sorted({"summary", "cases", "left_out", "versions", "machine"} - record.keys())
    if missing:
        raise ReportError(f"{path}: expected a whole report, found one without {', '.join(missing)}")
    assert isinstance(record, dict)
    return record
