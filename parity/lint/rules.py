"""A lint rule: a function of a folder that yields remarks, registered with an id that one can grep and ignore."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from parity.lint.folder import Folder

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
SHOWN = 4
"""Names of a list that a remark spells out; its `items` has them all."""


@dataclass(frozen=True, kw_only=True)
class Remark:
    """One thing that a rule has to say of a folder.

    Attributes:
        severity: `error`: wrong for somebody who loads it. `warning`: probably. `note`: worth knowing.
        where: File, field or tensor.
        expected: What would have been right.
        found: What is there.
        advice: What to do.
        items: Everything that it is about, where `found` names only the first few.
        rule: The rule's id; set by the run.
    """

    severity: Severity
    where: str
    expected: str
    found: str
    advice: str
    items: tuple[str, ...] = field(default=())
    rule: str = ""

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {
            "rule": self.rule,
            "severity": self.severity,
            "where": self.where,
            "expected": self.expected,
            "found": self.found,
            "advice": self.advice,
            "items": list(self.items),
        }


Check = Callable[[Folder], Iterator[Remark]]


@dataclass(frozen=True)
class Rule:
    """A registered rule.

    Attributes:
        id: Short, lower case, with hyphens.
        about: What it looks at, in one line.
        check: The function.
    """

    id: str
    about: str
    check: Check


RULES: dict[str, Rule] = {}
"""Every rule by id, in the order in which they run; filled by the modules that hold them."""


def rule(name: str, about: str) -> Callable[[Check], Check]:
    """Register a function as the rule `name`."""

    def register(check: Check) -> Check:
        assert name not in RULES, f"two rules are called {name}"
        RULES[name] = Rule(name, about, check)
        return check

    return register


def some(names: Collection[str], limit: int = SHOWN) -> str:
    """The first names of a list, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - limit:,} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
