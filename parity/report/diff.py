"""What changed between two runs: verdicts, margins, checks that came and went, and versions."""

from __future__ import annotations

import io
import itertools
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from parity.report.rows import Row, plural, rows_of

SHRINKAGE = 2.0
"""A margin that shrank by more than this factor is told."""
KINDS = ("worse", "better", "changed", "shrank", "gone", "new", "versions")


@dataclass(frozen=True, kw_only=True)
class Change:
    """One difference.

    Args:
        kind: `worse` (passed, and does not any more), `gone` (passed, and is not there any more), `better`, `changed`
            (between other verdicts), `shrank` (both pass, with less room), `new`, or `versions`.
        case: The id of the case; empty for `versions`.
        check: The check; the name of what differs for `versions`.
        before: Verdict or margin or version of the earlier run, empty for what was not there.
        after: Of the later run.
        why: What the later run says about it.
    """

    kind: str
    case: str
    check: str
    before: str
    after: str
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What changed between two runs, in the order of `KINDS`."""

    changes: tuple[Change, ...]
    before: str
    after: str
    checks: int

    @property
    def worse(self) -> bool:
        """Whether something that passed fails, is skipped, or is gone."""
        return any(change.kind in ("worse", "gone") for change in self.changes)

    def as_json(self) -> dict[str, Any]:
        """The fields, and the verdict, as JSON-able values."""
        return {"worse": self.worse, **asdict(self)}


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> Difference:
    """What changed from the run record `before` to `after`."""
    old, new = _keyed(before), _keyed(after)
    left_out = {one["id"]: one["reason"] for one in after["left_out"]}
    changes = [change for key in {**old, **new} if (change := _change(old.get(key), new.get(key), left_out))]
    changes += _versions(before, after)
    return Difference(
        changes=tuple(sorted(changes, key=lambda change: KINDS.index(change.kind))),
        before=before["summary"]["line"],
        after=after["summary"]["line"],
        checks=len(old.keys() & new.keys()),
    )


def _keyed(record: Mapping[str, Any]) -> dict[tuple[str, str, int], Row]:
    """Rows by case, check, and their number among those of the same name."""
    seen: Counter[tuple[str, str]] = Counter()
    keyed = {}
    for row in rows_of(record):
        seen[row.case, row.check] += 1
        keyed[row.case, row.check, seen[row.case, row.check]] = row
    return keyed


def _change(old: Row | None, new: Row | None, left_out: Mapping[str, str]) -> Change | None:
    one = new or old
    assert one is not None
    place = {"case": one.case, "check": one.check}
    if old is None:
        return Change(kind="new", **place, before="", after=one.verdict, why=one.sentence if one.failed else "")
    if new is None:
        kind = "gone" if old.verdict == "pass" else "changed"
        reason = left_out.get(f"{one.case}, {one.check.partition(',')[0]}") or left_out.get(one.case, "it did not run")
        return Change(kind=kind, **place, before=old.verdict, after="", why=reason)
    if old.verdict != new.verdict:
        kind = "worse" if old.verdict == "pass" else "better" if new.verdict == "pass" else "changed"
        return Change(kind=kind, **place, before=old.verdict, after=new.verdict, why=new.sentence)
    if new.verdict == "pass" and _shrank(old, new):
        return Change(kind="shrank", **place, before=old.margin, after=new.margin, why=new.sentence)
    return None


def _shrank(old: Row, new: Row) -> bool:
    """Whether there is less room than before: by more than a factor, or some where nothing at all had been found."""
    if new.ratio is None:
        return False
    if old.ratio is None:
        return old.margin == "exact"
    return old.ratio / new.ratio > SHRINKAGE


def _versions(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    for name in ("versions", "machine"):
        old, new = before[name], after[name]
        for key in sorted({**old, **new}):
            if old.get(key) != new.get(key):
                values = {"before": str(old.get(key, "")), "after": str(new.get(key, ""))}
                yield Change(kind="versions", case="", check=key, **values)
    configs = [{one["name"]: one["config"] for one in record.get("models", ())} for record in (before, after)]
    for model in sorted(configs[0].keys() & configs[1].keys()):
        old, new = (config[model] or "unknown" for config in configs)
        if old != new:
            yield Change(kind="versions", case="", check=f"config of {model}", before=old[:12], after=new[:12])


HEADINGS = {
    "worse": "passed before, and does not any more",
    "gone": "passed before, and is not there any more",
    "better": "passes now",
    "changed": "another verdict, or gone without having passed",
    "shrank": f"margin shrank by more than {SHRINKAGE:g}x",
    "new": "new",
    "versions": "versions and machine",
}
STYLES = {"worse": "bold red", "gone": "bold red", "better": "green", "shrank": "yellow"}


def as_text(found: Difference, *, colour: bool | None = None, width: int | None = None) -> str:
    """The difference as tables; in colour on a terminal unless told otherwise."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    columns = min(width or shutil.get_terminal_size((100, 24)).columns, 140)
    shown = Console().is_terminal if colour is None else colour
    console = Console(file=io.StringIO(), width=columns, force_terminal=shown, no_color=not shown)
    console.print(Text(f"before  {found.before}\nafter   {found.after}"))
    for kind in dict.fromkeys(change.kind for change in found.changes):
        changes = [change for change in found.changes if change.kind == kind]
        style = STYLES.get(kind, "")
        console.print(Text(f"\n{HEADINGS[kind]} ({len(changes)})", style=style or "bold"))
        for case in dict.fromkeys(change.case for change in changes):
            table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
            for _ in range(3):
                table.add_column(overflow="fold")
            for change, count in _folded([change for change in changes if change.case == case]):
                step = f"{change.before or '-'} -> {change.after or '-'}"
                name = change.check if count == 1 else f"{count} checks"
                why = change.why.removeprefix(f"{change.check}: ")
                table.add_row(Text(name), Text(step, style=style), Text(why))
            if case:
                console.print(Text(f"  {case}"))
            console.print(Padding(table, (0, 0, 0, 4 if case else 2)), highlight=False)
    same = "worse: something that passed does not any more" if found.worse else "nothing that passed is lost"
    console.print(Text(f"\n{plural(found.checks, 'check')} in both runs; {same}", style="bold"))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _folded(changes: list[Change]) -> Iterator[tuple[Change, int]]:
    """Changes, and how many of one case say the same but for the check: a case that is gone is one line."""
    for _, alike in itertools.groupby(changes, key=lambda change: (change.before, change.after, change.why)):
        same = list(alike)
        if len(same) > 3:
            yield same[0], len(same)
        else:
            yield from ((change, 1) for change in same)
