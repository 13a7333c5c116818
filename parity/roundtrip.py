"""A release check on files alone: a Hugging Face folder to a Megatron checkpoint and back, every byte held to its own.

That every file comes back says nothing of a mistake that is made and undone. So the plan is proved in each direction by
itself, from metadata; the Megatron folder is held against the source; and the config ledger must be complete.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from converters.artefacts import NOT_TRUE_OF_COPIES, carried
from converters.convert import convert_folder
from converters.errors import CheckpointError, ConfigError, ConversionError, SourceError
from converters.files.safetensors import INDEX, SafetensorsFiles
from converters.files.verify import verify
from converters.models import column_of, family_of
from converters.sources import resolve
from parity import verified
from parity.findings import Measurement
from parity.lint.rules import Remark
from parity.lint.run import lint
from parity.statement.ledgers import UNACCOUNTED, config_rows

SLACK = 64 << 20
"""Bytes that two folders have besides what is copied: metadata, blocks of small files."""
SCHEMA = "llama-parity/roundtrip/1"


@dataclass(frozen=True, kw_only=True)
class RoundTrip:
    """What became of a folder.

    Attributes:
        folder: The folder.
        rows: One for each thing that was checked, in order; those after a conversion that failed are missing.
        left: Files that no conversion takes along, with the reason.
        remarks: What `parity lint` says of the result.
    """

    folder: Path
    rows: tuple[Measurement, ...]
    left: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[Remark, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every row does."""
        return all(row.passed for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {
            "schema": SCHEMA,
            "folder": str(self.folder),
            "passed": self.passed,
            "rows": [row.as_json() for row in self.rows],
            "left": dict(self.left),
            "remarks": [remark.as_json() for remark in self.remarks],
        }


def round_trip(
    folder: Path,
    *,
    scratch: Path | None = None,
    loading: bool = True,
    quiet: bool = True,
    code: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> RoundTrip:
    """Import a folder to Megatron files, export it again, and hold the result against it.

    Args:
        folder: A Hugging Face checkpoint folder.
        scratch: Where the two folders are made, and removed; by default beside `folder`.
        loading: Ask transformers about the result, in a process of its own.
        quiet: No progress bars.
        code: Take Python files along.
        say: Told how much disk it takes, before it begins.

    Raises:
        SourceError: No such folder, or nothing of a checkpoint in it.
        ConfigError: Not a Hugging Face checkpoint.
        CheckpointError: Not enough disk, or none that can be written.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise SourceError(f"{folder}: expected a checkpoint folder, found {'a file' if folder.exists() else 'nothing'}")
    if not (folder / "config.json").is_file():
        raise SourceError(f"{folder}: expected a Hugging Face checkpoint, found no config.json")
    config = resolve(str(folder)).config
    if (column := column_of(config)) != "hf":
        raise ConfigError(f"{folder} is in the {column!r} column, expected 'hf': convert it first")
    at = (scratch or folder.parent).absolute()
    _require_room(folder, at, say)
    rows: list[Measurement] = []
    remarks: tuple[Remark, ...] = ()
    try:
        rows += _from_metadata(folder, config)
        with _temporary(at, folder.name) as made:
            there, back = made / "megatron", made / folder.name
            rows.append(_converted("import", folder, there, "megatron", quiet=quiet, code=code))
            rows.append(_verified(folder, there, quiet=quiet))
            rows.append(_converted("export", there, back, "hf", quiet=quiet, code=code))
            rows += _files(folder, back, code=code)
            began = time.perf_counter()
            remarks = lint(back, loading=loading).remarks
            rows.append(replace(_linted(remarks), seconds=time.perf_counter() - began))
    except _Stopped as stop:
        rows.append(stop.row)
    return RoundTrip(folder=folder, rows=tuple(rows), left=_left(folder, code=code), remarks=remarks)


class _Stopped(Exception):
    """What follows cannot be checked."""

    def __init__(self, row: Measurement) -> None:
        self.row = row


def _require_room(folder: Path, at: Path, say: Callable[[str], None]) -> None:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    need = 2 * size + SLACK
    try:
        at.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(at).free
    except OSError as error:
        raise CheckpointError(f"cannot write in {at}: {error}; choose another place (--scratch DIR)") from error
    say(f"takes {need / 1e9:,.2f} GB in {at} for a while, where {free / 1e9:,.2f} GB are free")
    if need > free:
        raise CheckpointError(
            f"{at} has {free / 1e9:,.2f} GB free, and two copies of {folder.name} take {need / 1e9:,.2f} GB: choose "
            "another place (--scratch DIR)"
        )


@contextmanager
def _temporary(at: Path, name: str) -> Iterator[Path]:
    try:
        made = Path(tempfile.mkdtemp(prefix=f".{name}.roundtrip-", dir=at))
    except OSError as error:
        raise CheckpointError(f"cannot write in {at}: {error}; choose another place (--scratch DIR)") from error
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _from_metadata(folder: Path, config: Mapping[str, Any]) -> Iterator[Measurement]:
    """The plan both ways, and the ledger."""
    began = time.perf_counter()
    family = family_of(config)
    try:
        account = list(config_rows(family.fields, config, ()))
        files = SafetensorsFiles(folder)
        tied = bool(family.fields.read(config)[0]["tie_word_embeddings"])
        plan = family.plan("hf", "megatron_dist", config, features=family.stored("hf", files.tensors(), tied=tied))
    except ConversionError as error:
        raise _Stopped(_failed("config and weights", error)) from error
    lost = [f"{row['side']}: {row['name']}: {row['reason']}" for row in account if row["class"] == UNACCOUNTED]
    mine = [row for row in account if row["side"] == "hf"]
    yield replace(
        Measurement.proved("config ledger", count=len(mine), unit="fields of config.json", unproved=lost),
        seconds=time.perf_counter() - began,
    )
    for name, one in (("plan, import", plan), ("plan, export", plan.inverse())):
        began = time.perf_counter()
        proof = one.prove()
        row = Measurement.proved(name, count=proof.elements, unit="elements", unproved=proof.faults)
        yield replace(row, seconds=time.perf_counter() - began)


def _converted(name: str, source: Path, target: Path, to: str, *, quiet: bool, code: bool) -> Measurement:
    began = time.perf_counter()
    try:
        done = convert_folder(source, target, target_column=to, quiet=quiet, trust_remote_code=code)
    except ConversionError as error:
        raise _Stopped(_failed(name, error)) from error
    detail = "\n".join([*(f"{key}: {count} NaN or Inf, kept" for key, count in done.nonfinite.items()), *done.notices])
    row = Measurement.proved(name, count=done.tensors[1], unit="tensors written", detail=detail)
    return replace(row, seconds=time.perf_counter() - began)


def _verified(folder: Path, there: Path, *, quiet: bool) -> Measurement:
    """Every element of the Megatron files against the source."""
    began = time.perf_counter()
    try:
        found = verify(folder, there, quiet=quiet)
    except ConversionError as error:
        raise _Stopped(_failed("Megatron files", error)) from error
    tensors, config = verified.rows(found)
    if not config.passed:
        raise _Stopped(replace(config, check="Megatron files, config"))
    return replace(tensors, check="Megatron files", seconds=time.perf_counter() - began)


def _failed(name: str, error: ConversionError) -> Measurement:
    return Measurement.proved(name, count=1, unit="conversions", unproved=["it stopped"], detail=str(error))


def _files(folder: Path, back: Path, *, code: bool) -> Iterator[Measurement]:
    made = {path.relative_to(back) for name in ("*.safetensors", INDEX) for path in back.glob(name)}
    weights = {*_weights(folder), *made}
    others = {path for one in (folder, back) for path in carried(one, code=code)} - weights
    for name, paths in (("weight files", weights), ("config", {Path("config.json")}), ("other files", others)):
        began = time.perf_counter()
        differing = [text for path in sorted(paths) if (text := verified.difference(folder, back, path))]
        if paths:
            row = Measurement.equal(name, count=len(paths), unit="files", differing=differing)
            yield replace(row, seconds=time.perf_counter() - began)


def _weights(folder: Path) -> list[Path]:
    """The shards, and the index where there is one."""
    shards = [Path(name) for name in SafetensorsFiles(folder).shards()]
    return [*shards, Path(INDEX)] if (folder / INDEX).is_file() else shards


def _linted(remarks: tuple[Remark, ...]) -> Measurement:
    from parity.lint.run import rules

    errors = [f"{remark.rule}: {remark.where}: {remark.found}" for remark in remarks if remark.severity == "error"]
    return Measurement.proved("lint of the result", count=len(rules()), unit="rules", unproved=errors)


def _left(folder: Path, *, code: bool) -> dict[str, str]:
    """Files that no conversion takes along, with the reason."""
    taken = {Path("config.json"), *carried(folder, code=code)}
    try:
        taken |= set(_weights(folder))
    except ConversionError:  # which the rows say
        return {}
    out = {}
    for found in sorted(path for path in folder.rglob("*") if path.is_file()):
        path = found.relative_to(folder)
        if path in taken:
            continue
        if any(part.startswith(".") for part in path.parts):
            why = "hidden"
        elif path.name in NOT_TRUE_OF_COPIES:
            why = "true of this very folder alone"
        elif path.suffix == ".py":
            why = "code; --trust-remote-code takes it along"
        else:
            why = "weights in another format, or a pickle"
        out[path.as_posix()] = why
    return out
