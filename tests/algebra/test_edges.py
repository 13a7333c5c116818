"""Corners where a wrong answer would be silent."""

from __future__ import annotations

import pytest
from index_arrays import coded, convert, run, same
from test_llama_proofs import plan

from converters.errors import LayoutError, TableError, TopologyError
from converters.layout import Layout
from converters.table import Table, rule
from converters.tiling import faults, strided
from converters.topology import Topology
from converters.values import Constant, Drop, Shift, Tie

SHIFTED = Table(
    family="shifted",
    columns={"a": None, "b": None, "c": None},
    sizes={"n": "n"},
    branches=(),
    rules=(rule("w", value=Shift("b", 1.0), a="x: n", b="y: n", c="z: n"),),
)


@pytest.mark.parametrize("pair", ["ac", "ca", "aa", "bb"])
def test_columns_that_store_the_same_values_are_not_shifted(pair: str) -> None:
    there = SHIFTED.plan(*pair, sizes={"n": 3}, features=frozenset())
    assert [copy.shift for copy in there.copies] == [0.0]


@pytest.mark.parametrize("pair", ["ab", "ba", "bc", "cb"])
def test_columns_that_store_other_values_are_shifted(pair: str) -> None:
    there = SHIFTED.plan(*pair, sizes={"n": 3}, features=frozenset())
    assert [copy.shift for copy in there.copies] == [1.0 if pair[1] == "b" else -1.0]


def test_an_untied_model_moves_between_meshes_as_it_is() -> None:
    here, there = Topology(tp=2, pp=2), Topology(pp=4)
    same_format = plan("megatron", "megatron", ("attention_bias",))
    same_format.prove(source=here, target=there).check()
    start = convert(plan("hf", "megatron", ("attention_bias",)), {None: HF}, target=here)
    moved = convert(same_format, start, source=here, target=there)
    assert same(convert(plan("megatron", "hf", ("attention_bias",)), moved, source=there)[None], HF)


HF = coded(plan("hf", "megatron", ("attention_bias",)).source_tensors)


def test_a_tied_model_moves_between_equal_meshes_as_it_is() -> None:
    mesh = Topology(pp=2)
    plan("megatron", "megatron", ("tie_word_embeddings",)).prove(source=mesh, target=mesh).check()


def test_a_scalar_is_a_tensor_of_one_element() -> None:
    table = Table(
        family="scalar",
        columns={"a": None, "b": None},
        sizes={"layer": "layer"},
        branches=(),
        rules=(rule("scale", a="l.{layer}.scale:", b="scales: layer"),),
    )
    there = table.plan("a", "b", sizes={"layer": 3}, features=frozenset())
    there.prove().check()
    tensors = coded(there.source_tensors)
    assert same(run(there.inverse(), run(there, tensors)), tensors)
    assert Layout.parse("w:").shape({}) == ()


def test_an_element_of_two_constants_is_refused() -> None:
    with pytest.raises(TableError, match="one"):
        Table(
            family="two",
            columns={"a": None, "b": None},
            sizes={name: name for name in "npmq"},
            branches=(),
            constants={"zero": Constant(0.0), "one": Constant(1.0)},
            rules=(rule("w", a="x: n m", b="y: [n (zero p)] [m (one q)]"),),
        ).plan("a", "b", sizes=dict.fromkeys((*"npmq", "zero", "one"), 1), features=frozenset()).prove()


def test_a_quantity_of_zero_is_refused_by_name() -> None:
    with pytest.raises(LayoutError, match="num_attention_heads=8"):
        plan("hf", "megatron", num_key_value_heads=0, padded_query_groups=0)


def test_an_element_written_twice_by_one_box_is_an_overlap() -> None:
    assert faults([strided(0, (0,), (2,))], 1)


def test_a_stage_of_fewer_than_one_layer_is_refused() -> None:
    with pytest.raises(TopologyError, match="first_stage_layers"):
        Topology(pp=2, first_stage_layers=-1)


def test_parts_of_a_tensor_that_are_cut_differently_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"none and tp"):
        Layout.parse("pq: [(x n/tp) (y m)]")


def test_a_tie_to_nothing_is_refused() -> None:
    table = Table(
        family="t",
        columns={"a": None, "b": None},
        sizes={"n": "n"},
        branches=(),
        rules=(rule("tied", value=Tie("b"), a="x: n", b="y: n"),),
    )
    with pytest.raises(TableError, match="'tied' ties elements that no other rule"):
        table.plan("a", "b", sizes={"n": 2}, features=frozenset()).prove()


def test_a_fallback_that_is_no_column_is_refused() -> None:
    with pytest.raises(TableError, match="'te'"):
        Table(family="t", columns={"a": "te"}, sizes={}, branches=(), rules=())


def test_a_tensor_is_cut_in_one_view_of_the_ranks() -> None:
    with pytest.raises(LayoutError, match="cut over ep, tp"):
        Layout.parse("w: e/ep n/tp")


def test_interleaving_needs_a_stage_between_uneven_ends() -> None:
    with pytest.raises(TopologyError, match="a stage between them"):
        Topology(pp=2, vpp=2, first_stage_layers=2, last_stage_layers=4)


def test_rules_of_one_name_are_told_apart() -> None:
    table = Table(
        family="t",
        columns={"a": None, "b": None},
        sizes={"n": "n"},
        branches=(),
        rules=(rule("w", a="x: n", b="y: n"), rule("w", value=Drop("a", "unused"), a="z: n")),
    )
    there = table.plan("a", "b", sizes={"n": 2}, features=frozenset())
    assert list(there.target_tensors) == ["y"]
    assert list(there.inverse().target_tensors) == ["x"]
