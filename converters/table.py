"""A model family as one table: each rule states where the same elements lie in each format.

A rule is one row, a format one column. Two columns convert into each other exactly when, row by row, they have the same
cells; that is checked when the table is built, before there is a size or a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from converters import axes
from converters.axes import Axis, Product, Sum
from converters.errors import LayoutError, TableError, listing
from converters.layout import Layout
from converters.plan import Plan
from converters.values import Constant, Drop, Tie, Value


@dataclass(frozen=True)
class Rule:
    """One row: the layouts of the same elements, column by column.

    Attributes:
        name: What the row is about; shown in plans and messages.
        columns: For each format, the layouts that together hold the elements.
        when: Features that must hold (`tied`) or must not (`!tied`) for the row to apply.
        value: What happens to the values besides moving; `None` keeps every bit.
    """

    name: str
    columns: Mapping[str, tuple[Layout, ...]]
    when: tuple[str, ...] = ()
    value: Value | None = None


def rule(name: str, *, when: str = "", value: Value | None = None, **columns: str | tuple[str, ...]) -> Rule:
    """The row `name` from layouts as text.

    Args:
        name: What the row is about.
        when: Features separated by spaces, `!` before one that must not hold.
        value: A value map, where values do not stay as they are.
        **columns: For each format a layout, or a tuple of layouts.

    Raises:
        LayoutError: A layout that does not parse; the message names the rule and the column.
    """
    parsed: dict[str, tuple[Layout, ...]] = {}
    for column, texts in columns.items():
        try:
            parsed[column] = tuple(Layout.parse(text) for text in ([texts] if isinstance(texts, str) else texts))
        except LayoutError as error:
            raise LayoutError(f"rule {name!r}, column {column!r}: {error}") from None
    return Rule(name, parsed, tuple(when.split()), value)


@dataclass(frozen=True)
class Table:
    """The rules of a model family.

    Attributes:
        family: Name of the family, as in `model_type`.
        columns: Every format; the value is the format whose layouts it shares where a rule does not name it, or `None`.
        sizes: Quantities of a config, each as an expression over axes: `num_attention_heads` is `(group rep)`.
        branches: Axes of size one that only name a branch.
        constants: Branches whose cells hold a constant and exist in one format only.
        features: Every feature that a rule may ask for.
        stacked: Columns whose tensors, where a rule does not name them, are those of the column that they fall back to
            with the numbers of a key as leading dims.
        rules: The rows.

    Raises:
        TableError: An unknown column, axis or feature, or columns of a rule with different cells.
    """

    family: str
    columns: Mapping[str, str | None]
    sizes: Mapping[str, str]
    branches: tuple[str, ...]
    rules: tuple[Rule, ...]
    constants: Mapping[str, Constant] = field(default_factory=dict)
    features: frozenset[str] = frozenset()
    stacked: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        declared = {name for text in self.sizes.values() for cell in axes.cells(self._expr(text)) for name in cell}
        known = declared | set(self.branches) | set(self.constants)
        problems = [
            f"column {column!r} falls back to {nearest!r}, which is no column"
            for column, nearest in self.columns.items()
            if nearest is not None and nearest not in self.columns
        ]
        problems += [
            f"column {column!r} is stacked and falls back to no column"
            for column in sorted(self.stacked)
            if self.columns.get(column) is None
        ]
        for row in self.rules:
            features = {name.removeprefix("!") for name in row.when}
            used = {name for layouts in row.columns.values() for lay in layouts for cell in lay.names for name in cell}
            tied_to = {row.value.column} if row.value else set()
            for what, names, allowed in (
                ("column", set(row.columns) | tied_to, set(self.columns)),
                ("feature", features, self.features),
                ("axis", used, known),
            ):
                problems += [f"rule {row.name!r}: unknown {what} {name!r}" for name in sorted(names - allowed)]
            problems += self._unpaired(row)
        if problems:
            raise TableError("\n".join([f"table {self.family!r} does not hold together:", *problems]))

    def _unpaired(self, row: Rule) -> list[str]:
        if isinstance(row.value, Drop):
            others = sorted(set(row.columns) - {row.value.column})
            return [f"rule {row.name!r} drops {row.value.column!r} but has column {name!r}" for name in others]
        cells: dict[str, frozenset[frozenset[str]]] = {}
        problems = []
        for column, layouts in row.columns.items():
            found = [cell for lay in layouts for cell in lay.names if not cell & set(self.constants)]
            cells[column] = frozenset(found)
            marked = {cell for lay in layouts for cell in lay.names if len(cell & set(self.constants)) > 1}
            problems += [
                f"rule {row.name!r}, column {column!r}: cell {cell} holds more than one constant"
                for cell in sorted(map(_show, marked))
            ]
            twice = sorted({_show(cell) for cell in found if found.count(cell) > 1})
            problems += [f"rule {row.name!r}, column {column!r}: cell {cell} occurs twice" for cell in twice]
        first, *rest = cells or {"": frozenset()}
        for other in rest:
            if cells[first] != cells[other]:
                left, right = cells[first] - cells[other], cells[other] - cells[first]
                odd = sorted(set().union(*left) ^ set().union(*right))
                problems.append(
                    f"rule {row.name!r}: columns {first!r} and {other!r} do not have the same cells\n"
                    + listing(f"  only in {first!r}", map(_show, left))
                    + "\n"
                    + listing(f"  only in {other!r}", map(_show, right))
                    + "\n  hint: "
                    + (f"only one side has {', '.join(odd)}; " if odd else "")
                    + "every branch needs the same axes on both sides, and a constant one an axis of `constants`"
                )
        return problems

    @staticmethod
    def _expr(text: str) -> Product | Sum | Axis:
        parsed = axes.parse(text)
        return parsed[0] if len(parsed) == 1 else Product(parsed)

    def resolve(self, column: str) -> list[str]:
        """`column` and the columns that it falls back to, nearest first.

        Raises:
            TableError: The table has no such column.
        """
        if column not in self.columns:
            raise TableError(f"table {self.family!r} has no column {column!r}, only {', '.join(sorted(self.columns))}")
        chain, nearest = [column], self.columns[column]
        while nearest is not None:
            chain.append(nearest)
            nearest = self.columns[nearest]
        return chain

    def layouts(self, row: Rule, column: str) -> tuple[Layout, ...]:
        """The layouts of `row` in `column`, or in the nearest column that it falls back to; none where it has none."""
        for name in self.resolve(column):
            if name in row.columns:
                found = row.columns[name]
                derived = name != column and column in self.stacked
                return tuple(layout.stacked() for layout in found) if derived else found
        return ()

    def first_copy(self, tie: Rule) -> Rule:
        """The rule that places the elements of which `tie` states a second copy: away from it, they lie alike.

        Raises:
            TableError: There is none.
        """
        assert isinstance(tie.value, Tie)
        for row in self.rules:
            away = [column for column in tie.columns if column != tie.value.column]
            if row.value is None and away and all(row.columns.get(c) == tie.columns[c] for c in away):
                return row
        raise TableError(f"rule {tie.name!r} ties elements that no other rule of {self.family!r} places")

    def solve(self, quantities: Mapping[str, int]) -> dict[str, int]:
        """The size of every axis, from the quantities of a config.

        Raises:
            LayoutError: A quantity is missing or is no multiple of its other factors.
        """
        missing = sorted(set(self.sizes) - set(quantities))
        if missing:
            raise LayoutError(listing(f"sizes of a {self.family} model that the config does not give", missing))
        sizes = dict.fromkeys((*self.branches, *self.constants), 1)
        pending = {name: self._expr(text) for name, text in self.sizes.items()}
        while pending:
            progress = False
            for name, expr in list(pending.items()):
                parts = (expr,) if isinstance(expr, Axis) else expr.parts
                unknown = [part for part in parts if not isinstance(part, Axis) or part.name not in sizes]
                if len(unknown) > 1 or (unknown and not isinstance(unknown[0], Axis)):
                    continue
                known = [sizes[part.name] for part in parts if isinstance(part, Axis) and part.name in sizes]
                found = _solve_one(name, quantities[name], expr, known, bool(unknown))
                if unknown:
                    assert isinstance(unknown[0], Axis)
                    sizes[unknown[0].name] = found
                del pending[name]
                progress = True
            if not progress:
                raise LayoutError(
                    f"the sizes {', '.join(sorted(pending))} do not determine the axes of {self.family!r}"
                )
        return sizes

    def active(self, features: frozenset[str]) -> tuple[Rule, ...]:
        """The rules that apply to a model with `features`."""
        return tuple(
            row
            for row in self.rules
            if all((name.removeprefix("!") in features) != (name[0] == "!") for name in row.when)
        )

    def plan(self, source: str, target: str, *, sizes: Mapping[str, int], features: frozenset[str]) -> Plan:
        """The plan that turns column `source` into column `target` for one model.

        Args:
            source: A column.
            target: A column.
            sizes: Size of every axis, as `solve` gives them.
            features: The features of the model.

        Raises:
            TableError: An unknown column or feature.
        """
        self.resolve(source), self.resolve(target)
        unknown = sorted(features - self.features)
        if unknown:
            raise TableError(f"table {self.family!r} knows no feature {', '.join(unknown)}")
        return Plan(table=self, source=source, target=target, sizes=dict(sizes), features=features)


def _solve_one(name: str, quantity: int, expr: Product | Sum | Axis, known: list[int], unknown: bool) -> int:
    total = 1
    if isinstance(expr, Sum):
        total = sum(known)
        rest, fits = quantity - total, quantity >= total
    else:
        for factor in known:
            total *= factor
        fits = total > 0 and quantity % total == 0
        rest = quantity // total if fits else 0
    if not fits or (not unknown and quantity != total):
        raise LayoutError(f"{name}={quantity} does not fit '{expr}', whose other parts make {total}")
    return rest


def _show(cell: frozenset[str]) -> str:
    return "{" + " ".join(sorted(cell)) + "}"
