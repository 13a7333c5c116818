"""Every rule on one folder."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from converters.errors import SourceError, listing, near
from parity.lint.folder import Folder, Unavailable
from parity.lint.rules import RULES, SEVERITIES, Remark, Rule

HOLDERS = ("configs", "weights", "values", "tokens", "templates", "hygiene", "loading")
"""Modules of rules, which register themselves: in this order they run."""
SCHEMA = "llama-parity/lint/1"


def rules() -> Mapping[str, Rule]:
    """Every rule by its id."""
    for name in HOLDERS:
        importlib.import_module(f"parity.lint.{name}")
    return RULES


@dataclass(frozen=True, kw_only=True)
class Linted:
    """What the rules say of a folder.

    Attributes:
        folder: The folder.
        remarks: The worst first.
        clean: Rules that ran and have nothing to say.
        skipped: Rules that could not look, with the reason.
        ignored: Rules that were not asked.
    """

    folder: Path
    remarks: tuple[Remark, ...]
    clean: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def count(self, severity: str) -> int:
        """How many remarks are of this severity."""
        return sum(remark.severity == severity for remark in self.remarks)

    def passed(self, *, strict: bool = False) -> bool:
        """Whether there is no error, and under `strict` no warning."""
        return not self.count("error") and not (strict and self.count("warning"))

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {
            "schema": SCHEMA,
            "folder": str(self.folder),
            "summary": {severity: self.count(severity) for severity in SEVERITIES},
            "remarks": [remark.as_json() for remark in self.remarks],
            "clean": list(self.clean),
            "skipped": dict(self.skipped),
            "ignored": list(self.ignored),
        }


def lint(path: Path, *, ignore: Collection[str] = (), weights: bool = True, loading: bool = True) -> Linted:
    """What every rule says of the checkpoint in a folder.

    Args:
        path: The folder.
        ignore: Ids of rules not to ask.
        weights: Read the values of the tensors too, besides their headers.
        loading: Ask transformers too, in a process of its own.

    Raises:
        SourceError: No such folder, or no such rule.
    """
    if not path.is_dir():
        raise SourceError(f"{path}: expected a checkpoint folder, found {'a file' if path.exists() else 'nothing'}")
    asked = rules()
    unknown = [name + near(name, asked) for name in ignore if name not in asked]
    if unknown:
        raise SourceError(listing("rules that there are not (`parity lint --rules` lists them)", unknown))
    folder = Folder(path, weights=weights, loading=loading)
    remarks: list[Remark] = []
    clean, skipped = [], {}
    for name, rule in asked.items():
        if name in ignore:
            continue
        try:
            found = [replace(remark, rule=name) for remark in rule.check(folder)]
        except Unavailable as error:
            skipped[name] = str(error)
            continue
        remarks += found
        if not found:
            clean.append(name)
    remarks.sort(key=lambda remark: SEVERITIES.index(remark.severity))
    return Linted(
        folder=path, remarks=tuple(remarks), clean=tuple(clean), skipped=skipped, ignored=tuple(sorted({*ignore}))
    )
