"""Plans between layouts of one model that no table pairs directly: two of a kind with other padding, or cut by rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from converters.errors import PlanError
from converters.layout import Layout
from converters.plan import Plan
from converters.table import Rule
from converters.values import Drop


def between(first: Plan, second: Plan) -> Plan:
    """The plan from the target of one plan to the target of another, both from the same column of one model.

        between(bridge.plan(training_provider), bridge.plan(serving_provider))

    Each side keeps the padding that its plan was made with.

    Raises:
        PlanError: Plans of two models, from two columns, or of values that are stored in two ways.
    """
    if first.table is not second.table:
        raise PlanError(f"plans of two families: {first.table.family} and {second.table.family}")
    padding = padding_axes(first)
    features = first.features | second.features
    problems = [f"from {first.source!r} and from {second.source!r}"] if first.source != second.source else []
    problems += [
        f"{axis}={size} and {axis}={second.sizes[axis]}"
        for axis, size in first.sizes.items()
        if axis not in padding and second.sizes[axis] != size
    ]
    for plan in (first, second):
        lacking = features - plan.features
        both = replace(plan, features=features)
        if lacking and (both.target_tensors, both.copies) != (plan.target_tensors, plan.copies):
            problems.append(f"with and (in {plan.target!r}) without {', '.join(sorted(lacking))}")
    if problems:
        raise PlanError(f"expected plans of one model, found them {'; '.join(problems)}")
    read, written = (
        {axis: plan.sizes[axis] for axis in padding} | dict(plan.target_padding) for plan in (first, second)
    )
    return replace(
        first,
        source=first.target,
        target=second.target,
        features=features,
        source_padding=read,
        target_padding=written,
    )


def by_rows(plan: Plan) -> Plan:
    """The plan with every tensor of its target cut along its first dim into equal parts over tp.

    For a target that is whole everywhere, as Hugging Face's is: a mesh of tp=4 then holds a quarter of each tensor a
    rank.

    Raises:
        PlanError: The target is cut already.
    """
    table, rows = plan.table, f"{plan.target}_rows"
    cut = [str(lay) for row in plan.rules for lay in table.layouts(row, plan.target) if lay.cuts]
    if cut:
        raise PlanError(f"{plan.target!r} is cut already, as in {cut[0]!r}")

    def with_rows(row: Rule) -> Rule:
        found = table.layouts(row, plan.target)
        if not found or isinstance(row.value, Drop):
            return row
        columns: Mapping[str, tuple[Layout, ...]] = {**row.columns, rows: tuple(_cut(layout) for layout in found)}
        return replace(row, columns=columns)

    made = replace(table, columns={**table.columns, rows: plan.target}, rules=tuple(map(with_rows, table.rules)))
    return replace(plan, table=made, target=rows)


def _cut(layout: Layout) -> Layout:
    first, *others = layout.dims
    return replace(layout, dims=(replace(first, cut="tp"), *others))


def padding_axes(plan: Plan) -> frozenset[str]:
    """The axes that occur in constants alone: rows that pad a vocabulary, groups of zeros."""
    constants = set(plan.table.constants)
    names = [name for row in plan.rules for layouts in row.columns.values() for lay in layouts for name in lay.names]
    moved = {axis for name in names if not name & constants for axis in name}
    filled = {axis for name in names if name & constants for axis in name}
    return frozenset(filled - moved - constants)
