"""What a pickle says that is no plain value: names, and objects by their names; and the names that a reader knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Symbol:
    """A name in the bytes: what it stands for is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Named:
    """An object: its class, or what was called, by name; what with; and what it was given afterwards.

    Attributes:
        symbol: The name.
        arguments: What the class or the function was called with.
        state: Fields, as a dict where the class has no way of its own.
        new: Whether it was made by `__new__` alone, without a call.
    """

    symbol: Symbol
    arguments: tuple[Any, ...] = ()
    state: Any = None
    new: bool = False

    @property
    def fields(self) -> dict[str, Any]:
        """Its state, empty where that is no dict."""
        return self.state if type(self.state) is dict else {}


Call = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Names:
    """The names that a pickle may use, as `module.name`.

    Attributes:
        calls: What this program makes of an object of that name. The functions are given what the bytes say: they check
            it, do no more than a fixed amount of work for each byte, and raise `CheckpointError`, or ValueError or
            TypeError for what does not fit.
        objects: Names whose objects become `Named`; `module.*` stands for every name of a module and of those in it.
    """

    calls: Mapping[str, Call] = field(default_factory=dict)
    objects: frozenset[str] = frozenset()

    def __or__(self, other: Names) -> Names:
        return Names(calls={**self.calls, **other.calls}, objects=self.objects | other.objects)

    def known(self, symbol: Symbol) -> bool:
        """Whether the name may be used."""
        if str(symbol) in self.calls or str(symbol) in self.objects:
            return True
        parts = symbol.module.split(".")
        return any(".".join(parts[: i + 1]) + ".*" in self.objects for i in range(min(len(parts), 8)))


def shown(text: object) -> str:
    """A text out of untrusted bytes, on one line and not without end."""
    plain = str(text)[:200].encode("unicode_escape", "replace").decode()
    return plain if len(plain) <= 120 else plain[:117] + "..."
