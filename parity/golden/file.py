"""Golden values: what transformers said of a model once, kept as text beside the project and held against every run.

A golden is one file a model, `golden/<slug>/golden.json`: a header that says where its values come from, the probe that
was asked, and named quantities in full. Its first line is a digest of the rest, so that a number changed by hand is
noticed. A run that disagrees never touches it: it leaves `golden.json.pending` beside it for a person to look at.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.errors import ConversionError
from parity.ci import refusal
from parity.probes import Probe

FORMAT = 1
NAME = "golden.json"
PENDING = "golden.json.pending"
_DTYPES = {"float32": np.float32, "float64": np.float64}

Values = npt.NDArray[np.floating[Any]]


class GoldenError(ConversionError):
    """A golden file that is missing or not what its digest says, or a change to one that is refused."""


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """Something measured of a model, with what its tolerance is derived from.

    Args:
        values: float32 or float64, finite, of any shape.
        axes: The name of each axis.
        floor: The noise floor where `values` were measured, relative to `scale`: the largest difference between
            evaluations that are equal in exact arithmetic.
        alike: How many leading axes index things of different size, each compared relative to its own: a layer, a
            parameter.
        names: Of the places on the first axis, where they have names.
    """

    values: Values
    axes: tuple[str, ...]
    floor: float = 0.0
    alike: int = 0
    names: tuple[str, ...] = ()

    @property
    def scale(self) -> Values:
        """The largest magnitude among values that are alike, in a shape that broadcasts; 1 where all of them are 0."""
        return scale_of(self.values, self.alike)

    @property
    def digest(self) -> str:
        """sha256 of the values as little-endian bytes."""
        return digest_of_array(self.values)


def scale_of(values: Values, alike: int) -> Values:
    """The largest magnitude over all axes but the first `alike`, in a shape that broadcasts; 1 instead of 0."""
    largest: Values = np.abs(values).max(axis=tuple(range(alike, values.ndim)), keepdims=True)
    return np.where(largest > 0, largest, np.ones_like(largest))


def digest_of_array(values: npt.NDArray[Any]) -> str:
    """sha256 of an array as little-endian bytes, in order."""
    return hashlib.sha256(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Golden:
    """One model's golden values.

    Args:
        header: Where they come from: `model`, `weights`, digests, versions, device, date, the command that makes them.
        probe: What was asked; kept whole, so that a golden outlives changes to how probes are made.
        places: `[b s k]`, the vocabulary rows of the largest logits of each token.
        quantities: By name.
    """

    header: Mapping[str, Any]
    probe: Probe
    places: npt.NDArray[np.int64]
    quantities: Mapping[str, Quantity] = field(default_factory=dict)

    @property
    def versions(self) -> str:
        """What computed the values, on one line."""
        return spelled(self.header["versions"])

    @property
    def command(self) -> str:
        """What makes these values anew."""
        return str(self.header["regenerate"])


def spelled(versions: Mapping[str, str]) -> str:
    """Versions on one line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def digest_of_probe(probe: Probe) -> str:
    """sha256 of its tokens and labels."""
    return digest_of_array(np.stack([probe.tokens, probe.labels]))


def to_text(golden: Golden) -> str:
    """The file: its digest, the header, the probe, and one line for each innermost row of each quantity."""
    body = "".join(_lines(golden))
    return f'{{"digest": "{_sha(body)}",\n{body}'


def from_text(text: str, where: str) -> Golden:
    """Read what `to_text` wrote, to the bit.

    Args:
        text: A whole file.
        where: Its name, for messages.

    Raises:
        GoldenError: It was changed since it was written, or has another format.
    """
    try:
        found = json.loads(text)
        command = found["header"]["regenerate"]
        if found["header"]["format"] != FORMAT:
            raise GoldenError(
                f"{where}: expected format {FORMAT}, found {found['header']['format']}; make it anew with\n  {command}"
            )
    except (ValueError, KeyError, TypeError) as error:
        raise GoldenError(f"{where} is not a golden file, or only a part of one: {error!r}. Make it anew") from error
    body = text.partition("\n")[2]
    if found["digest"] != _sha(body):
        raise GoldenError(
            f"{where} was edited by hand: its digest says {found['digest'][:12]}, its content is {_sha(body)[:12]}; "
            f"take it back from version control, or make it anew with\n  {command}"
        )
    asked = found["probe"]
    quantities = {
        name: Quantity(
            values=np.array(said["values"], dtype=_DTYPES[said["dtype"]]).reshape(said["shape"]),
            axes=tuple(said["axes"]),
            floor=said["floor"],
            alike=said["alike"],
            names=tuple(said["names"]),
        )
        for name, said in found["quantities"].items()
    }
    for name, quantity in quantities.items():
        if quantity.digest != found["quantities"][name]["digest"]:
            raise GoldenError(f"{where}: the values of {name!r} are not those of their digest; make it anew: {command}")
    tokens, labels = (np.array(asked[name], dtype=np.int64) for name in ("tokens", "labels"))
    return Golden(
        header=found["header"],
        probe=Probe(name=asked["name"], tokens=tokens, labels=labels),
        places=np.array(found["places"], dtype=np.int64),
        quantities=quantities,
    )


def read(path: Path) -> Golden:
    """The golden in `path`.

    Raises:
        GoldenError: There is none, or it is not what was written.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise GoldenError(f"there is no {path}: make it with --regen-golden") from error
    except (OSError, UnicodeDecodeError) as error:
        raise GoldenError(f"{path} cannot be read: {error}") from error
    return from_text(text, str(path))


def write(folder: Path, golden: Golden) -> Path:
    """Put `golden` in place of what `folder` holds; what was pending is thereby decided.

    Raises:
        GoldenError: Under CI, where nobody looks at the difference.
    """
    refuse_under_ci("writing a golden")
    path = _put(folder / NAME, to_text(golden))
    (folder / PENDING).unlink(missing_ok=True)
    return path


def leave_pending(folder: Path, golden: Golden) -> Path:
    """Put what a run found beside the golden that it disagrees with, for a person to look at."""
    return _put(folder / PENDING, to_text(golden))


def accept(folder: Path) -> Golden:
    """Make what is pending in `folder` its golden.

    Raises:
        GoldenError: Under CI; nothing is pending; or it was edited.
    """
    refuse_under_ci("accepting a golden")
    if not (folder / PENDING).is_file():
        raise GoldenError(f"nothing is pending in {folder}: a run that disagrees with its golden leaves {PENDING}")
    golden = read(folder / PENDING)
    (folder / PENDING).replace(folder / NAME)
    return golden


def strays(folder: Path) -> list[str]:
    """Files in a model's folder that are no golden: nothing compares them."""
    return sorted(path.name for path in folder.iterdir() if path.name != NAME)


def refuse_under_ci(what: str) -> None:
    """Raise `GoldenError` under CI."""
    if reason := refusal(what):
        raise GoldenError(reason)


def _put(path: Path, text: str) -> Path:
    """Write aside and rename: a file is there whole or not at all, and of several writers one wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        Path(aside).chmod(0o644)
        Path(aside).replace(path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    return path


def _lines(golden: Golden) -> Iterator[str]:
    header = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in golden.header.items())
    yield f'"header": {{\n{header}\n}},\n"probe": {{\n  "name": {json.dumps(golden.probe.name)},\n'
    yield f'  "tokens": {_rows(golden.probe.tokens)},\n  "labels": {_rows(golden.probe.labels)}\n}},\n'
    yield f'"places": {_rows(golden.places)},\n"quantities": {{\n'
    yield ",\n".join(_quantity(name, quantity) for name, quantity in golden.quantities.items())
    yield "\n}}\n"


def _quantity(name: str, quantity: Quantity) -> str:
    values = quantity.values
    assert values.dtype.name in _DTYPES, f"{name} is {values.dtype}"
    assert values.ndim == len(quantity.axes), f"{name} is {values.shape}, its axes {quantity.axes}"
    if not np.isfinite(values).all():
        raise GoldenError(f"{name} holds values that are no numbers: nothing could be compared with them")
    wide = values.astype(np.float64)
    statistics = {"min": wide.min(), "max": wide.max(), "mean": wide.mean(), "rms": np.sqrt((wide**2).mean())}
    said = {
        "axes": quantity.axes,
        "shape": values.shape,
        "dtype": values.dtype.name,
        "digest": quantity.digest,
        "statistics": {key: float(value) for key, value in statistics.items()},
        "floor": quantity.floor,
        "alike": quantity.alike,
        "names": quantity.names,
    }
    heading = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in said.items())
    return f'  {json.dumps(name)}: {{\n{heading},\n    "values": {_rows(values)}\n  }}'


def _rows(values: npt.NDArray[Any]) -> str:
    """An array as nested JSON lists, with one line for each innermost list.

    `str` of a numpy float is the shortest decimal that reads back as this very float of its own width.
    """
    if values.ndim > 1:
        return "[\n" + ",\n".join(_rows(row) for row in values) + "]"
    return "[" + ", ".join(map(str, values)) + "]"


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
