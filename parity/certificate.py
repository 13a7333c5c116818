"""A verification card: what was checked of a checkpoint, how, with what room, and the digest of every file.

The card is plain JSON with a digest of its own, and can be held against the folder later without running anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError

SCHEMA = "llama-parity/certificate/1"
NAME = "parity-certificate"
"""Of the files, before `.json` and `.md`."""
CHUNK = 1 << 22
NEEDED = ("plan", "config", "import", "export", "round trip", "logits and loss", "training", "decoding", "activations")
"""Tests of the suite without which there is no card."""
_FIELDS = frozenset(
    {"schema", "model", "made", "layouts", "checks", "coverage", "self_test", "files", "versions", "machine"}
    | {"weights", "command", "digest"}
)

Card = dict[str, Any]
Told = Callable[[int], object]


def files_of(folder: Path, told: Told = lambda _: None) -> list[dict[str, Any]]:
    """Name, bytes and SHA-256 of every file of a checkpoint, in the order of their names.

    Left out: hidden files, and the card itself.

    Args:
        folder: The checkpoint.
        told: Called with the number of bytes read, as they are read.
    """
    found = []
    for path in listed(folder):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                told(len(chunk))
        name = path.relative_to(folder).as_posix()
        found.append({"name": name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()})
    return found


def listed(folder: Path) -> list[Path]:
    """The files that a card covers."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [
        path
        for path in paths
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.relative_to(folder).as_posix() not in (f"{NAME}.json", f"{NAME}.md")
    ]


def card_of(
    folder: Path, files: list[dict[str, Any]], report: Mapping[str, Any], self_test: Mapping[str, Any] | None
) -> Card:
    """The card.

    Args:
        folder: The checkpoint.
        files: As `files_of` found them before the run.
        report: The run record of the suite on it (see `parity/report/schema.json`).
        self_test: What `parity self-test --json` wrote, or `None` where it was not run.

    Raises:
        CheckpointError: Something did not pass, or nothing was checked.
    """
    checks = [
        {"case": case["id"], **{name: m[name] for name in ("check", "measured", "bound", "margin", "unit", "passed")}}
        for case in report["cases"]
        for m in case["measurements"]
    ]
    failed = sorted({f"{one['case']}, {one['check']}" for one in checks if not one["passed"]})
    failed += [
        f"{case['id']}, {test['name']}"
        for case in report["cases"]
        for test in case["tests"]
        if test["verdict"] in ("FAIL", "error") and f"{case['id']}, {test['name']}" not in failed
    ]
    ran = [{test["name"] for test in case["tests"]} for case in report["cases"]]
    for case, tests in zip(report["cases"], ran, strict=True):
        failed += [f"{case['id']}, {name}: was not run" for name in sorted({*NEEDED, *set().union(*ran)} - tests)]
    if report.get("interrupted"):
        failed.append("the run was interrupted")
    if failed or not checks:
        what = "\n  ".join(failed) or "nothing was checked"
        raise CheckpointError(f"{folder} gets no certificate:\n  {what}")
    card: Card = {
        "schema": SCHEMA,
        "model": folder.name,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "weights": [model.get("weights", "") for model in report["models"]],
        "layouts": [case["id"] for case in report["cases"]],
        "checks": checks,
        "skipped": report["skipped"],
        "left_out": report["left_out"],
        "coverage": _coverage(report),
        "self_test": None if self_test is None else _score(self_test),
        "files": files,
        "versions": report["versions"],
        "machine": report["machine"],
        "command": report["command"],
    }
    return {**card, "digest": digest_of(card)}


def _coverage(report: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """For each account its number of rows by class, over all cases."""
    out: dict[str, dict[str, int]] = {}
    for case in report["cases"]:
        for account in case.get("accounts", ()):
            counts = out.setdefault(account["title"], {})
            for row in account["rows"]:
                counts[row["class"]] = counts.get(row["class"], 0) + 1
    return out


def _score(self_test: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of a self-test: its plain values, without the matrix."""
    summary = self_test.get("summary", self_test)
    return {name: value for name, value in summary.items() if isinstance(value, int | float | str | bool)}


def digest_of(card: Mapping[str, Any]) -> str:
    """SHA-256 over the card without its digest, as JSON with sorted keys."""
    bare = {name: value for name, value in card.items() if name != "digest"}
    return hashlib.sha256(json.dumps(bare, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write(card: Card, folder: Path) -> list[Path]:
    """Write the card as JSON and as Markdown, each complete or not at all; the JSON, which counts, last."""
    written = []
    for suffix, text in ((".md", markdown(card)), (".json", json.dumps(card, indent=1, ensure_ascii=False) + "\n")):
        target = folder / f"{NAME}{suffix}"
        handle, aside = tempfile.mkstemp(dir=folder, prefix=f".{NAME}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(aside).chmod(0o644)
            Path(aside).replace(target)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
        written.append(target)
    return written


def read(path: Path) -> Card:
    """The card in `path`, its own digest checked.

    Raises:
        CheckpointError: No card, not a card, or one that was edited.
    """
    if not path.is_file():
        raise CheckpointError(f"no certificate at {path}: make one with `parity certify {path.parent}`")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(card, dict) or card.get("schema") != SCHEMA or _FIELDS - card.keys():
        raise CheckpointError(f"{path} is not a certificate of the schema {SCHEMA}")
    if digest_of(card) != card["digest"]:
        raise CheckpointError(
            f"{path} was changed after it was made: its digest is {digest_of(card)[:16]}..., and it says "
            f"{str(card['digest'])[:16]}..."
        )
    return card


def differences(card: Card, files: list[dict[str, Any]]) -> list[str]:
    """Where a folder is not what its card says: files that are gone, new or changed."""
    there = {file["name"]: file for file in files}
    known = {file["name"]: file for file in card["files"]}
    out = [f"{name}: gone" for name in sorted(known.keys() - there.keys())]
    out += [f"{name}: not on the certificate" for name in sorted(there.keys() - known.keys())]
    for name in sorted(known.keys() & there.keys()):
        old, new = known[name], there[name]
        if old["bytes"] != new["bytes"]:
            out.append(f"{name}: {old['bytes']:,} bytes became {new['bytes']:,}")
        elif old["sha256"] != new["sha256"]:
            out.append(f"{name}: other content, sha256 {old['sha256'][:16]}... became {new['sha256'][:16]}...")
    return out


def markdown(card: Card) -> str:
    """The card for people."""
    tightest: dict[str, dict[str, Any]] = {}
    for one in card["checks"]:
        best = tightest.get(one["check"])
        if best is None or _room(one) < _room(best):
            tightest[one["check"]] = one
    lines = [
        f"# Verification card: {card['model']}",
        "",
        f"Made {card['made']} by `{card['command']}`.",
        f"{len(card['checks'])} checks in {len(card['layouts'])} layouts, all passed.",
        "",
        "| check | layouts | tightest: measured | bound | margin |",
        "|---|---|---|---|---|",
    ]
    for check, one in tightest.items():
        count = sum(other["check"] == check for other in card["checks"])
        margin = "exact" if one["measured"] == 0 else f"{one['margin']:.3g}x" if one["margin"] else "-"
        lines.append(f"| {check} | {count} | {one['measured']:.3g} {one['unit']} | {one['bound']:.3g} | {margin} |")
    lines += ["", "Layouts: " + ", ".join(f"`{layout}`" for layout in card["layouts"]), ""]
    for title, counts in card["coverage"].items():
        lines.append(f"{title}: " + ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items())) + "  ")
    if card["self_test"] is None:
        lines += ["", "The harness's own self-test was not run with it."]
    else:
        score = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in card["self_test"].items())
        lines += ["", f"Self-test of the harness: {score}."]
    if card["skipped"]:
        lines += ["", "Skipped:", *(f"- {one['case']}, {one['check']}: {one['reason']}" for one in card["skipped"])]
    lines += ["", "| file | bytes | sha256 |", "|---|---|---|"]
    lines += [f"| {file['name']} | {file['bytes']:,} | `{file['sha256']}` |" for file in card["files"]]
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    lines += ["", f"Versions: {versions}.", "", f"Digest of the card: `{card['digest']}`.", ""]
    return "\n".join(lines)


def _room(one: Mapping[str, Any]) -> float:
    """What is left to the bound, to sort by: exact checks have all of it."""
    return float("inf") if one["margin"] is None else float(one["margin"])
