"""The config ledger: every field of one config accounted for in the other, never a default in silence.

A family states its Hugging Face fields once (`Field`: how they are spelled, what an absent one means) and one row for
what becomes of each (`converters.rows`). Both directions follow from the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from reprlib import repr as brief
from typing import Any

from converters.errors import ConfigError, listing, near
from converters.rows import ABSENT, Config, Dropped, Entry, Row, Switch

MOST = 2**31 - 1
"""Of anything that a config counts."""


@dataclass(frozen=True)
class Ratio:
    """A default: one field divided by another, or by a number."""

    numerator: str
    denominator: str | int

    def __str__(self) -> str:
        return f"{self.numerator} / {self.denominator}"


@dataclass(frozen=True)
class Of:
    """A default: the value of another field."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Field:
    """A field of `config.json`.

    Attributes:
        name: Its name in the rows.
        spellings: The paths (dots enter nested objects) at which it may stand; every one that does must agree.
        default: What transformers takes when it is absent or null; `ABSENT` makes it required.
    """

    name: str
    spellings: tuple[str, ...] = ()
    default: Any = ABSENT

    @property
    def paths(self) -> tuple[str, ...]:
        """Every path at which it may stand."""
        return self.spellings or (self.name,)


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The account of one config.

    Attributes:
        entries: What became of each field.
        hf: The Hugging Face fields by their names in the table, absent ones at their defaults.
        megatron: The Megatron fields.
        defaulted: Fields that `config.json` leaves out, with the value that transformers takes for them.
    """

    entries: tuple[Entry, ...]
    hf: Config
    megatron: Config
    defaulted: Config = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FieldTable:
    """The ledger's rows for one family.

    Attributes:
        family: The value of `model_type`.
        fields: Every Hugging Face field that a row uses.
        rows: What becomes of each field.
        inferred: Quantities that follow from the fields and stand in neither config (the padding aside).
    """

    family: str
    fields: tuple[Field, ...]
    rows: tuple[Row, ...]
    inferred: Mapping[str, Ratio] = field(default_factory=dict)

    def read(self, config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fields of `config.json` by name, and those among them that it leaves to their defaults.

        Raises:
            ConfigError: Fields that are missing, unknown, or spelled twice with different values; all of them.
        """
        found: dict[str, Any] = {}
        defaulted: dict[str, Any] = {}
        problems: list[str] = []
        leaves = dict(_leaves(config, self._containers()))
        for known in self.fields:
            spelled = {path: leaves[path] for path in known.paths if leaves.get(path) is not None}
            if len({repr(value) for value in spelled.values()}) > 1:
                problems.append(f"{known.name} is spelled twice and differently: {spelled}")
            if spelled:
                found[known.name] = next(iter(spelled.values()))
                if wanted := _misfit(found[known.name], known.default):
                    problems.append(f"{known.name}={brief(found[known.name])}, expected {wanted}")
            elif known.default is ABSENT:
                problems.append(f"{known.name} is missing (expected at {' or '.join(known.paths)})")
            else:
                defaulted[known.name] = known.default
        for name, default in defaulted.items():
            try:
                defaulted[name] = found[name] = _default(default, {**defaulted, **found})
            except (ConfigError, LookupError, TypeError, ZeroDivisionError) as error:
                problems.append(f"{name}: {error}")
        consumed = {path for known in self.fields for path in known.paths}
        dropped = [row for row in self.rows if isinstance(row, Dropped) and row.side == "hf"]
        unknown = [path for path in leaves if path not in consumed and not any(row.covers(path) for row in dropped)]
        if unknown:
            hints = [path + near(path, consumed) for path in unknown]
            problems.append(listing("fields that no row of the ledger names", hints))
            # They may be those of a value that has no case (a rope type): then that is what has to be said.
            switches = [row for row in self.rows if isinstance(row, Switch)]
            problems += [
                row.refusal(found[row.hf])
                for row in switches
                if row.hf in found and found[row.hf] not in list(row.cases)
            ]
        if problems:
            raise ConfigError("\n".join([f"config of a {self.family} model:", *problems]))
        return found, defaulted

    def check(self, config: Config) -> tuple[dict[str, Any], tuple[Entry, ...]]:
        """The fields of a `config.json` whose model stays one of Hugging Face, and the lines of those that no row uses.

        Raises:
            ConfigError: A field without a row, or with a value that no column can have; all of them.
        """
        hf, _ = self.read(config)
        _, problems = self._run(lambda row: row.forward(hf) if isinstance(row, Switch) else ())
        entries, more = self._dropped(config)
        self._ledger([], problems + more)
        return hf, tuple(entries)

    def to_megatron(self, config: Config) -> Ledger:
        """The Megatron fields for a `config.json`.

        Raises:
            ConfigError: A field without a row, or a value without a counterpart; all of them.
        """
        hf, defaulted = self.read(config)
        entries, problems = self._run(lambda row: row.forward(hf))
        problems += self._unused(hf, entries)
        dropped, more = self._dropped(config)
        return self._ledger(entries + dropped, problems + more, hf=hf, defaulted=defaulted)

    def to_hf(self, megatron: Config, defaults: Config) -> Ledger:
        """The Hugging Face fields for a Megatron config.

        Args:
            megatron: Every field of the provider, by name.
            defaults: The defaults of its class: a field at its default needs no row, any other does.

        Raises:
            ConfigError: A field away from its default that no row names, or a value without a counterpart; all of them.
        """
        entries, problems = self._run(lambda row: row.backward(megatron))
        named = {name for row in self.rows for name in row.names()}
        dropped = [row for row in self.rows if isinstance(row, Dropped) and row.side == "megatron"]
        for name, value in megatron.items():
            row = next((row for row in dropped if row.covers(name)), None)
            if row is not None and name not in named:
                entries.append(row.entry(name, value))
            elif name not in named and value != defaults.get(name, ABSENT):
                problems.append(f"{name}={value!r} (default {defaults.get(name)!r}): no row of the ledger names it")
        return self._ledger(entries, problems, megatron=megatron)

    def quantities(self, hf: Config) -> dict[str, int]:
        """The integers of a config that size its axes, those that follow from others included."""
        numbers = {name: value for name, value in hf.items() if isinstance(value, int) and not isinstance(value, bool)}
        return numbers | {name: _default(ratio, hf) for name, ratio in self.inferred.items()}

    def _containers(self) -> set[str]:
        return {path.rpartition(".")[0] for known in self.fields for path in known.paths if "." in path}

    def _run(self, step: Any) -> tuple[list[Entry], list[str]]:
        entries: list[Entry] = []
        problems: list[str] = []
        for row in self.rows:
            try:
                entries += step(row)
            except ConfigError as error:
                problems.append(str(error))
        return entries, problems

    def _dropped(self, config: Config) -> tuple[list[Entry], list[str]]:
        """The lines for the fields of a `config.json` that have no counterpart, and those that may not be let go."""
        entries: list[Entry] = []
        problems: list[str] = []
        leaves = dict(_leaves(config, self._containers()))
        for row in self.rows:
            if isinstance(row, Dropped) and row.side == "hf":
                for name in filter(row.covers, leaves):
                    try:
                        entries.append(row.entry(name, leaves[name]))
                    except ConfigError as error:
                        problems.append(str(error))
        return entries, problems

    def _unused(self, hf: Config, entries: list[Entry]) -> list[str]:
        """Fields that are present but that no row used (a rope field that its rope type does not have)."""
        used = {name for entry in entries for name in entry.hf}
        return [
            f"{name}={value!r}: no row of the ledger uses it in this model"
            for name, value in hf.items()
            if name not in used and value is not None
        ]

    def _ledger(self, entries: list[Entry], problems: list[str], **given: Config) -> Ledger:
        if problems:
            raise ConfigError("\n".join([f"config of a {self.family} model:", *problems]))
        sides: dict[str, dict[str, Any]] = {"hf": {}, "megatron": {}}
        for entry in entries:
            if entry.kind != "dropped":
                sides["hf"] |= entry.hf
                sides["megatron"] |= entry.megatron
        return Ledger(entries=tuple(entries), **{**sides, **given})


def _misfit(value: Any, default: Any) -> str:
    """What a value should be and is not, by its default; a whole number is a float as well, a bool is no number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match default:
        case bool():
            return "" if isinstance(value, bool) else "a bool"
        case int() | Ratio() | Of():
            return "" if number and isinstance(value, int) and 0 < value <= MOST else f"an int from 1 to {MOST}"
        case float():
            return "" if number and abs(value) < float("inf") else "a finite float"
        case str():
            return "" if isinstance(value, str) else "a text"
    return "a single value" if isinstance(value, list | dict) else ""


def _default(default: Any, known: Config) -> Any:
    if isinstance(default, Of):
        return known[default.name]
    if isinstance(default, Ratio):
        whole = known[default.numerator]
        parts = known[default.denominator] if isinstance(default.denominator, str) else default.denominator
        if whole % parts:
            raise ConfigError(f"its default is {default}, and {whole} is no multiple of {parts}")
        return whole // parts
    return default


def _leaves(config: Config, containers: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a config by path; only objects that hold known fields are entered."""
    for name, value in config.items():
        path = prefix + name
        if path in containers and isinstance(value, Mapping):
            yield from _leaves(value, containers, path + ".")
        elif not (path in containers and value is None):
            yield path, value
