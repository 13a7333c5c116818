"""The report of a run of pytest: its files are claimed before the first test, and written after the last."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from converters.errors import ConversionError
from parity.case import Case
from parity.options import Options
from parity.report.facts import Record, cases_of, digest, errors_of, machine, record_of
from parity.report.terminal import write


def claim_all(config: pytest.Config, paths: Sequence[Path]) -> None:
    """Make sure, before a run, that every report can be written after it. Workers of pytest-xdist write none.

    Raises:
        pytest.UsageError: One of them cannot.
    """
    from parity.report.files import ReportError, claim

    if hasattr(config, "workerinput") or config.option.collectonly:
        return
    wrong = []
    for path in paths:
        try:
            claim(config.invocation_params.dir / path)
        except ReportError as error:
            wrong.append(f"--parity-report: {error}")
    if wrong:
        raise pytest.UsageError("\n".join(wrong))


def summarise(
    terminal: pytest.TerminalReporter,
    *,
    options: Options,
    cases: Sequence[Case],
    left_out: Sequence[tuple[str, str]],
    versions: Mapping[str, str],
    started: float,
    interrupted: bool,
) -> None:
    """Write the table to the terminal, and the files that were asked for."""
    config = terminal.config
    suite = config.args_source is not pytest.Config.ArgsSource.ARGS
    record = record_of(
        cases_of(terminal.stats, cases, suite=suite),
        left_out=left_out,
        started=datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        seconds=round(time.time() - started, 2),
        command=shlex.join(["pytest", *map(str, config.invocation_params.args)]),
        versions=dict(versions),
        machine=machine(_devices(cases)),
        models=_models(options, cases),
        interrupted=interrupted,
        errors=errors_of(terminal.stats),
    )
    write(terminal, record)
    if not cases:
        return
    from parity.report.files import ReportError
    from parity.report.files import write as write_file

    for path in options.parity_report:
        try:
            write_file(config.invocation_params.dir / path, record)
        except ReportError as error:
            terminal.write_line(f"parity: no report: {error}", red=True)
        else:
            terminal.write_line(f"parity: report written to {path}")


def _devices(cases: Sequence[Case]) -> str:
    from parity.devices import device_of

    return ", ".join(sorted({device_of(case) for case in cases}))


def _models(options: Options, cases: Sequence[Case]) -> list[Record]:
    from parity.subjects import config_of, weights_note

    models = []
    for model in options.models:
        fields: Record = {"name": model, "revision": options.revision, "size": options.size, "layers": options.layers}
        fields["weights"] = weights_note(model, options.weights)
        try:
            found = config_of(model, revision=options.revision, size=options.size, layers=options.layers)
            fields["config"] = digest(found)
        except (ConversionError, OSError):  # it was there when the run began, or there would be no cases
            fields["config"] = None
        models.append(fields)
    return models if cases else []
