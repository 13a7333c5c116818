"""`parity certify DIR` checks a checkpoint and writes its verification card; `--verify` holds it to the card."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from converters.errors import CheckpointError
from parity import certificate
from parity.options import OPTIONS, add_to_argparse

# A folder that is to be certified is checked as it is.
NOT_HERE = ("against", "revision", "weights", "size", "layers", "regen-golden", "parity-report")


def add(commands: Any) -> None:
    """Declare `certify`."""
    certify = commands.add_parser(
        "certify",
        allow_abbrev=False,
        help="write a verification card for a checkpoint folder, or check one",
        usage="%(prog)s DIR [--verify] [options, such as --tp 1,2 --pp 1,2]",
        description="Run the suite on a checkpoint folder, and the self-test of the harness, and write a card of what "
        "was checked, with the digest of every file. No card is written unless everything passes.",
    )
    certify.add_argument("folder", metavar="DIR", type=Path, help="A checkpoint folder.")
    certify.add_argument("--verify", action="store_true", help="Hold the folder against its card; runs nothing.")
    certify.add_argument(
        "--output", metavar="DIR", type=Path, help="Where the card is (default: in the folder itself)."
    )
    certify.add_argument(
        "--self-test",
        metavar="FILE|off",
        default="",
        help="What `parity self-test --json FILE` wrote, or off (default: run it).",
    )
    add_to_argparse(certify, but=NOT_HERE)
    certify.set_defaults(run=_run)


def _run(asked: argparse.Namespace) -> int:
    """0 certified or verified, 1 not, 2 nothing to certify or verify."""
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    folder, output = asked.folder.absolute(), (asked.output or asked.folder).absolute()
    if not (folder / "config.json").is_file():
        errors.print(f"parity certify: expected a checkpoint folder, found no config.json in {folder}", markup=False)
        return 2
    try:
        return _verify(folder, output) if asked.verify else _certify(asked, folder, output)
    except CheckpointError as error:
        errors.print(f"parity certify: {error}", markup=False)
        return 1


def _verify(folder: Path, output: Path) -> int:
    console = Console(highlight=False, soft_wrap=True)
    card = certificate.read(output / f"{certificate.NAME}.json")
    differing = certificate.differences(card, _files(folder, "hold against the card"))
    for line in differing:
        console.print(f"  {line}", style="red", markup=False)
    for name, version in card["versions"].items():
        found = _version(name)
        if found is not None and found != version:
            console.print(f"  note: certified with {name} {version}, here is {found}", markup=False)
    total = sum(file["bytes"] for file in card["files"])
    what = f"{len(card['files'])} files, {total:,} bytes; {len(card['checks'])} checks of {card['made']}"
    if differing:
        console.print(
            f"{folder.name} is not what was certified: {len(differing)} differences ({what})", style="bold red"
        )
        return 1
    console.print(f"{folder.name} is what was certified: {what}", style="bold green")
    return 0


def _certify(asked: argparse.Namespace, folder: Path, output: Path) -> int:
    console = Console(highlight=False, soft_wrap=True)
    output.mkdir(parents=True, exist_ok=True)
    files = _files(folder, "digest of every file")
    with tempfile.TemporaryDirectory(prefix="parity-certify-") as scratch:
        report = Path(scratch) / "report.json"
        line = ["pytest", "-p", "parity.plugin", "-p", "no:cacheprovider", f"--model={folder}"]
        for option in OPTIONS[1:]:
            given = None if option.name in NOT_HERE else getattr(asked, option.dest)
            if given is not None:
                line.append(f"--{option.name}" if option.flag else f"--{option.name}={given}")
        # Nothing from outside may leave checks out: neither PYTEST_ADDOPTS nor the addopts of an ini file nearby.
        environ = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
        run = [sys.executable, "-m", *line, "-o", "addopts=", f"--parity-report={report}"]
        status = subprocess.run(run, env=environ, check=False).returncode
        if not report.is_file() or status:
            raise CheckpointError(f"{folder} gets no certificate: the run ended with status {status} (see above)")
        record = json.loads(report.read_text(encoding="utf-8"))
        self_test = _self_test(asked.self_test, Path(scratch) / "self-test.json")
    if certificate.differences({"files": files}, _files(folder, "unchanged by the run?")):
        raise CheckpointError(f"{folder} changed while it was checked: run again")
    record["command"] = shlex.join(["parity", "certify", *sys.argv[2:]])
    card = certificate.card_of(folder, files, record, self_test)
    for path in certificate.write(card, output):
        console.print(f"written: {path}")
    return 0


def _self_test(given: str, scratch: Path) -> dict[str, Any] | None:
    """The result of the self-test: read, made, or none.

    Raises:
        CheckpointError: It failed, or the file is not such a result.
    """
    if given == "off":
        return None
    path = Path(given) if given else scratch
    if not given:
        done = subprocess.run([sys.executable, "-m", "parity", "self-test", "--json", str(path)], check=False)
        if done.returncode:
            raise CheckpointError("no certificate: the harness does not pass its own self-test here (see above)")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"--self-test {path}: expected what `parity self-test --json` writes: {error}") from error
    if not isinstance(found, dict) or not str(found.get("schema", "")).startswith("llama-parity/self-test/"):
        raise CheckpointError(f"--self-test {path}: expected what `parity self-test --json` writes")
    if not found["summary"]["passed"]:
        raise CheckpointError(f"no certificate: the self-test in {path} did not pass")
    if found["versions"].get("llama-parity") != _version("llama-parity"):
        raise CheckpointError(
            f"--self-test {path}: of llama-parity {found['versions'].get('llama-parity')}, here is "
            f"{_version('llama-parity')}: run it again"
        )
    return found


def _files(folder: Path, what: str) -> list[dict[str, Any]]:
    total = sum(path.stat().st_size for path in certificate.listed(folder))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        return certificate.files_of(folder, lambda count: progress.advance(task, count))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
