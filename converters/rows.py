"""The rows of a config ledger: what may become of a field, each kind in both directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from converters.errors import ConfigError

Config = Mapping[str, Any]
Kind = Literal["same", "renamed", "derived", "fixed", "dropped"]
ABSENT: Any = object()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the ledger: these fields of one side became those of the other."""

    kind: Kind
    hf: Config = field(default_factory=dict)
    megatron: Config = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Pair:
    """The same value on both sides."""

    hf: str
    megatron: str

    def forward(self, hf: Config) -> Iterator[Entry]:
        kind: Kind = "same" if self.hf == self.megatron else "renamed"
        yield Entry(kind=kind, hf={self.hf: hf[self.hf]}, megatron={self.megatron: hf[self.hf]})

    def backward(self, megatron: Config) -> Iterator[Entry]:
        kind: Kind = "same" if self.hf == self.megatron else "renamed"
        yield Entry(kind=kind, hf={self.hf: megatron[self.megatron]}, megatron={self.megatron: megatron[self.megatron]})

    def names(self) -> set[str]:
        return {self.megatron}


@dataclass(frozen=True)
class Derived:
    """Values that determine each other one to one, listed in full."""

    hf: tuple[str, ...]
    megatron: tuple[str, ...]
    values: tuple[tuple[tuple[Any, ...], tuple[Any, ...]], ...]

    def forward(self, hf: Config) -> Iterator[Entry]:
        found = tuple(hf[name] for name in self.hf)
        yield self._entry(found, 0, self.hf, self.megatron)

    def backward(self, megatron: Config) -> Iterator[Entry]:
        found = tuple(megatron[name] for name in self.megatron)
        yield self._entry(found, 1, self.megatron, self.hf)

    def _entry(self, found: tuple[Any, ...], side: int, names: tuple[str, ...], others: tuple[str, ...]) -> Entry:
        for pair in self.values:
            if pair[side] == found:
                left, right = pair
                return Entry(
                    kind="derived",
                    hf=dict(zip(self.hf, left, strict=True)),
                    megatron=dict(zip(self.megatron, right, strict=True)),
                )
        known = "; ".join(_named(names, pair[side]) for pair in self.values)
        raise ConfigError(f"{_named(names, found)} has no counterpart in {', '.join(others)}; those that have: {known}")

    def names(self) -> set[str]:
        return set(self.megatron)


@dataclass(frozen=True)
class Fixed:
    """A Megatron field that this family determines."""

    megatron: str
    value: Any
    why: str

    def forward(self, hf: Config) -> Iterator[Entry]:
        yield Entry(kind="fixed", megatron={self.megatron: self.value}, note=self.why)

    def backward(self, megatron: Config) -> Iterator[Entry]:
        if megatron[self.megatron] != self.value:
            raise ConfigError(
                f"{self.megatron}={megatron[self.megatron]!r}, expected {self.value!r}: {self.why}; "
                "the Hugging Face model cannot say anything else"
            )
        yield Entry(kind="fixed", megatron={self.megatron: self.value}, note=self.why)

    def names(self) -> set[str]:
        return {self.megatron}


@dataclass(frozen=True)
class Switch:
    """A field whose value decides which rows apply. Backwards, the one case whose `when` matches."""

    hf: str
    cases: Mapping[Any, Case]

    def refusal(self, value: Any) -> str:
        """What is to be said of a value that has no case."""
        return (
            f"{self.hf}={value!r} is not supported; supported: {', '.join(map(repr, self.cases))}. "
            "Ignoring it would give a model that computes something else"
        )

    def forward(self, hf: Config) -> Iterator[Entry]:
        value = hf[self.hf]
        if value not in list(self.cases):  # a value from a file may be a list, which no mapping can look up
            raise ConfigError(self.refusal(value))
        case = self.cases[value]
        lacking = [row.hf for row in case.rows if isinstance(row, Pair) and hf[row.hf] is None]
        if lacking:
            raise ConfigError(f"{self.hf}={value!r} needs {', '.join(lacking)}, which the config does not give")
        yield Entry(kind="derived", hf={self.hf: value}, megatron=dict(case.when))
        for row in case.rows:
            yield from row.forward(hf)

    def backward(self, megatron: Config) -> Iterator[Entry]:
        for value, case in self.cases.items():
            if all(_matches(megatron[name], wanted) for name, wanted in case.when.items()):
                held = {name: megatron[name] for name in case.when}
                yield Entry(kind="derived", hf={self.hf: value}, megatron=held)
                for row in case.rows:
                    yield from row.backward(megatron)
                return
        found = {name: megatron[name] for case in self.cases.values() for name in case.when}
        raise ConfigError(f"{_named(tuple(found), tuple(found.values()))} corresponds to no value of {self.hf}")

    def names(self) -> set[str]:
        cases = self.cases.values()
        return {n for case in cases for n in case.when} | {
            n for case in cases for row in case.rows for n in row.names()
        }


@dataclass(frozen=True)
class Case:
    """One value of a `Switch`: the Megatron fields that tell it apart, and the rows that then apply.

    A `when` value of `ABSENT` means: anything but `None`, and some row sets it.
    """

    when: Mapping[str, Any]
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Dropped:
    """Fields of one side without a counterpart, for a reason; with `only`, just where they have one of those values."""

    side: Literal["hf", "megatron"]
    patterns: tuple[str, ...]
    reason: str
    only: tuple[Any, ...] | None = None

    def forward(self, hf: Config) -> Iterator[Entry]:
        return iter(())

    def backward(self, megatron: Config) -> Iterator[Entry]:
        return iter(())

    def names(self) -> set[str]:
        return set()

    def covers(self, name: str) -> bool:
        """Whether one of the patterns matches."""
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def entry(self, name: str, value: Any) -> Entry:
        """The line for one such field.

        Raises:
            ConfigError: The value is not one that may be dropped.
        """
        if self.only is not None and value not in self.only:
            allowed = " or ".join(map(repr, self.only))
            raise ConfigError(f"{name}={value!r}, where only {allowed} is supported: {self.reason}")
        sides = {"hf": {"hf": {name: value}}, "megatron": {"megatron": {name: value}}}[self.side]
        return Entry(kind="dropped", note=self.reason, **sides)


Row = Pair | Derived | Fixed | Switch | Dropped


def _matches(value: Any, wanted: Any) -> bool:
    return value is not None if wanted is ABSENT else bool(value == wanted)


def _named(names: tuple[str, ...], values: tuple[Any, ...]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in zip(names, values, strict=True))
