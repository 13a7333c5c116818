"""Layouts: the line that spells one, its keys, shapes and places."""

from __future__ import annotations

import pytest
from hypothesis import given
from random_tables import Model, models, topologies

from converters.errors import LayoutError
from converters.layout import Layout
from converters.topology import Coord, Mesh, Topology

EXAMPLES = (
    "model.layers.{layer}.self_attn.q_proj.weight: (group rep q dim) hidden",
    "decoder.layers.{layer/pp}.self_attention.linear_qkv.weight: (group [(rep q) k v] dim)/tp hidden",
    "decoder.layers.{layer/pp}.mlp.linear_fc1.weight: ([gate up] ffn/tp) hidden",
    "embedding.word_embeddings.weight @first: [vocab (zero pad)]/tp hidden",
    "output_layer.weight @last-not-first: [vocab (zero pad)]/tp hidden",
    "m.{p v i}.{[x y]}.weight @last: a (b c)",
    "scale:",
)


@pytest.mark.parametrize("text", EXAMPLES)
def test_a_layout_prints_as_it_is_written(text: str) -> None:
    assert str(Layout.parse(text)) == text
    assert Layout.parse(f"  {text}  ") == Layout.parse(text)


@given(topologies().flatmap(lambda mesh: models((mesh,))))
def test_parsing_what_is_printed_gives_the_same_layout(model: Model) -> None:
    layouts = [layout for rule in model.table.rules for column in rule.columns.values() for layout in column]
    assert [Layout.parse(str(layout)) for layout in layouts] == layouts


def test_keys_count_composite_fields_and_sums_in_order() -> None:
    layout = Layout.parse("m.{p v i}.{[x (y e)]}.w: a")
    sizes = {"p": 2, "v": 1, "i": 3, "x": 1, "y": 1, "e": 2, "a": 4}
    assert layout.keys(sizes) == [f"m.{layer}.{part}.w" for layer in range(6) for part in range(3)]
    assert layout.names == [frozenset("pvixa"), frozenset("pviyea")]
    assert layout.shape(sizes) == (4,)
    assert [cell.name for cell in layout.cells(sizes)] == layout.names


def test_a_stage_decides_where_a_tensor_lives() -> None:
    topology = Topology(pp=2)
    held = {
        stage: [
            bool(Layout.parse(f"w {stage}: a").keys({"a": 1}, mesh))
            for mesh in (None, Mesh(topology, Coord()), Mesh(topology, Coord(pp=1)))
        ]
        for stage in ("", "@first", "@last", "@last-not-first")
    }
    assert held == {
        "": [True, True, True],
        "@first": [True, True, False],
        "@last": [True, False, True],
        "@last-not-first": [False, False, True],
    }
    nowhere = Layout.parse("w @first: a")
    assert nowhere.cells({"a": 1}, Mesh(topology, Coord(pp=1))) == []


def test_cuts_and_replicas() -> None:
    column = Layout.parse("l.{layer/pp}.w: a/tp b")
    assert column.cuts == {"pp", "tp"}
    assert Layout.parse("w @last: a").cuts == {"pp"}
    expert = Layout.parse("e.{expert/ep}.w: a/etp")
    topology = Topology(tp=2, cp=2, ep=2, etp=1)
    replicas = {
        layout: [layout.replica(Mesh(topology, coord)) for coord in topology.coords()] for layout in (column, expert)
    }
    assert replicas[column] == [False, False, True, True]
    assert replicas[expert] == [False, False, True, True]
    assert not column.replica(None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no dims", "a layout reads 'key: dims' or 'key @stage: dims', found 'no dims'"),
        ("two words: a", "a layout reads 'key: dims' or 'key @stage: dims', found 'two words: a'"),
        ("w @middle: a", "unknown stage '@middle' in 'w @middle: a', expected one of @first, @last, @last-not-first"),
        ("w.{}: a", "empty braces in key 'w.{}'"),
        ("w.{layer}: layer a", "key and dims of 'w.{layer}: layer a' together: axis 'layer' occurs twice"),
        ("w.{layer/tp}: a/tp", "key and dims of 'w.{layer/tp}: a/tp' together: mesh dim 'tp' occurs twice"),
        ("w: [(x n/tp) (y m)]", "are cut over different mesh dims (none and tp): all of a tensor's elements"),
        ("w.{(layer}: a", "'(' is never closed in a layout:\n  (layer\n  ^"),
        ("w: (a", "'(' is never closed in a layout:\n   (a\n   ^"),
    ],
)
def test_a_layout_that_does_not_read_says_why(text: str, message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        Layout.parse(text)
    assert message in str(caught.value)
