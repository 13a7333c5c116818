"""Tables: what is refused before there is a size, and the sizes of axes from the quantities of a config."""

from __future__ import annotations

from typing import Any

import pytest

from converters.errors import LayoutError, TableError
from converters.table import Rule, Table, rule
from converters.values import Constant, Drop, Shift, Tie


def table(*rules: Rule, **fields: Any) -> Table:
    defaults: dict[str, Any] = {
        "family": "toy",
        "columns": {"hf": None, "megatron": None, "local": "megatron"},
        "sizes": {"hidden": "h", "ffn": "f", "heads": "(g r)", "groups": "g", "padded": "[v pad]", "vocab": "v"},
        "branches": ("x", "y"),
        "constants": {"zero": Constant(0.0), "one": Constant(1.0)},
        "features": frozenset({"tied", "bias"}),
    }
    return Table(**{**defaults, **fields, "rules": rules})


GOOD = rule("w", hf=("a: (x h)", "b: (y f)"), megatron="ab: [(x h) (y f)]")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (rule("w", hf="a: h", te="b: h"), "rule 'w': unknown column 'te'"),
        (rule("w", hf="a: h", megatron="b: h", value=Shift("te", 1.0)), "rule 'w': unknown column 'te'"),
        (rule("w", hf="a: hh", megatron="b: hh"), "rule 'w': unknown axis 'hh'"),
        (rule("w", when="!tiedd", hf="a: h", megatron="b: h"), "rule 'w': unknown feature 'tiedd'"),
        (rule("w", hf=("a: h", "b: h"), megatron="c: h"), "rule 'w', column 'hf': cell {h} occurs twice"),
        (
            rule("w", hf="a: v h", megatron="b: [v (zero pad)] [h (one f)]"),
            "rule 'w', column 'megatron': cell {f one pad zero} holds more than one constant",
        ),
        (
            rule("w", value=Drop("hf", "why"), hf="a: h", megatron="b: h"),
            "rule 'w' drops 'hf' but has column 'megatron'",
        ),
    ],
)
def test_a_row_that_does_not_hold_together_is_named(row: Rule, message: str) -> None:
    with pytest.raises(TableError) as caught:
        table(row)
    assert str(caught.value).splitlines() == ["table 'toy' does not hold together:", message]


def test_columns_with_different_cells_list_them_and_hint_at_the_axis() -> None:
    with pytest.raises(TableError) as caught:
        table(rule("w", hf="a: (x h)", megatron="b: [(x h) (y h)]"))
    assert str(caught.value) == (
        "table 'toy' does not hold together:\n"
        "rule 'w': columns 'hf' and 'megatron' do not have the same cells\n"
        "  only in 'hf' (0):\n"
        "  only in 'megatron' (1):\n"
        "  {h y}\n"
        "  hint: only one side has h, y; every branch needs the same axes on both sides, and a constant one an axis of "
        "`constants`"
    )
    with pytest.raises(TableError, match="hint: every branch needs the same axes on both sides"):
        table(rule("w", hf="a: [(x h) (y f)]", megatron="b: [(x f) (y h)]"))


def test_all_problems_of_a_table_are_listed_at_once() -> None:
    with pytest.raises(TableError) as caught:
        table(rule("one", hf="a: hh", megatron="b: h"), rule("two", te="a: h"))
    assert [line for line in str(caught.value).splitlines() if line.startswith("rule")] == [
        "rule 'one': unknown axis 'hh'",
        "rule 'one': columns 'hf' and 'megatron' do not have the same cells",
        "rule 'two': unknown column 'te'",
    ]


def test_constants_need_no_counterpart_and_a_row_may_have_one_column_or_none() -> None:
    table(rule("w", hf="a: v", megatron="b: [v (zero pad)]"), rule("only", megatron="c: (zero h)"), rule("empty"))


def test_a_layout_that_does_not_parse_names_rule_and_column() -> None:
    with pytest.raises(LayoutError, match=r"rule 'w', column 'megatron': '\(' is never closed"):
        rule("w", hf="a: h", megatron="b: (h")


def test_columns_fall_back_nearest_first() -> None:
    assert table(GOOD).resolve("local") == ["local", "megatron"]
    with pytest.raises(TableError, match="table 'toy' has no column 'te', only hf, local, megatron"):
        table(GOOD).resolve("te")


def test_a_row_applies_where_its_features_hold() -> None:
    rows = [rule("plain"), rule("tied", when="tied"), rule("untied", when="!tied"), rule("both", when="tied !bias")]
    model = table(*rows)
    names = {features: [row.name for row in model.active(frozenset(features.split()))] for features in ("", "tied")}
    assert names == {"": ["plain", "untied"], "tied": ["plain", "tied", "both"]}
    assert [row.name for row in model.active(frozenset({"tied", "bias"}))] == ["plain", "tied"]


def test_a_plan_of_an_unknown_column_or_feature_is_refused() -> None:
    model = table(GOOD)
    with pytest.raises(TableError, match="has no column 'te'"):
        model.plan("hf", "te", sizes={}, features=frozenset())
    with pytest.raises(TableError, match="table 'toy' knows no feature moe, rope"):
        model.plan("hf", "megatron", sizes={}, features=frozenset({"rope", "moe", "tied"}))


QUANTITIES = {"hidden": 8, "ffn": 5, "heads": 6, "groups": 2, "padded": 12, "vocab": 11}


def test_axes_are_solved_from_products_and_sums() -> None:
    assert table(GOOD).solve(QUANTITIES) == {
        **{"x": 1, "y": 1, "zero": 1, "one": 1},
        **{"h": 8, "f": 5, "g": 2, "r": 3, "v": 11, "pad": 1},
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"heads": 7}, "heads=7 does not fit '(g r)', whose other parts make 2"),
        ({"padded": 10}, "padded=10 does not fit '[v pad]', whose other parts make 11"),
    ],
)
def test_quantities_that_contradict_each_other_are_refused(changed: dict[str, int], message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        table(GOOD).solve({**QUANTITIES, **changed})
    assert str(caught.value) == message


def test_a_quantity_given_twice_must_agree() -> None:
    model = table(GOOD, sizes={"hidden": "h", "ffn": "f", "width": "(h f)"})
    assert model.solve({"hidden": 8, "ffn": 5, "width": 40})["h"] == 8
    with pytest.raises(LayoutError, match=r"width=80 does not fit '\(h f\)', whose other parts make 40"):
        model.solve({"hidden": 8, "ffn": 5, "width": 80})


def test_missing_quantities_are_all_listed() -> None:
    with pytest.raises(LayoutError, match="sizes of a toy model that the config does not give") as caught:
        table(GOOD).solve(dict.fromkeys(("hidden", "heads", "groups", "padded"), 2))
    assert str(caught.value).splitlines()[1:] == ["  ffn", "  vocab"]


@pytest.mark.parametrize("undetermined", [{"a": "h", "b": "(f g)"}, {"a": "h", "b": "(f (g h))"}])
def test_quantities_that_leave_an_axis_open_are_named(undetermined: dict[str, str]) -> None:
    model = table(rule("w", hf="a: (x h)", megatron="b: (x h)"), sizes=undetermined)
    with pytest.raises(LayoutError, match="the sizes b do not determine the axes of 'toy'"):
        model.solve({"a": 2, "b": 6})


def test_the_tied_side_of_a_rule_must_be_a_column() -> None:
    with pytest.raises(TableError, match="unknown column 'te'"):
        table(rule("w", value=Tie("te"), hf="a: h", megatron="b: h"))


def test_a_fallback_must_be_a_column() -> None:
    with pytest.raises(TableError, match="column 'hf' falls back to 'te', which is no column"):
        table(columns={"hf": "te"})
