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
from converters.values import Constant, Shift

SHIFTED = Table(
    family="shifted",
    columns={"a": None, "b": None, "c": None},
    sizes={"n": "n"},
    branches=(),
    rules=(rule("w", value=Shift("b", 1.0), a="x: n", b="y: n", c="z: n"),),
)


@pytest.mark.parametrize("pair", ["ac", "ca", "aa", "bb"])
@pytest.mark.xfail(strict=True, reason="a shift is applied between two columns that store the same values")
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


@pytest.mark.xfail(strict=True, reason="the second copy of a tied head is read by no copy within one format")
def test_a_tied_model_moves_between_equal_meshes_as_it_is() -> None:
    mesh = Topology(pp=2)
    plan("megatron", "megatron", ("tie_word_embeddings",)).prove(source=mesh, target=mesh).check()


@pytest.mark.xfail(strict=True, raises=ValueError, reason="a tensor without dims has no boxes")
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


@pytest.mark.xfail(strict=True, raises=ValueError, reason="refused only when the plan is compiled, without a message")
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


@pytest.mark.xfail(strict=True, raises=ZeroDivisionError, reason="a quantity of zero divides the others")
def test_a_quantity_of_zero_is_refused_by_name() -> None:
    with pytest.raises(LayoutError, match="num_attention_heads=8"):
        plan("hf", "megatron", num_key_value_heads=0, padded_query_groups=0)


@pytest.mark.xfail(strict=True, reason="a stride of zero is taken for a run")
def test_an_element_written_twice_by_one_box_is_an_overlap() -> None:
    assert faults([strided(0, (0,), (2,))], 1)


@pytest.mark.xfail(strict=True, reason="sizes of the end stages are not checked")
def test_a_stage_of_fewer_than_one_layer_is_refused() -> None:
    with pytest.raises(TopologyError, match="first_stage_layers"):
        Topology(pp=2, first_stage_layers=-1)


@pytest.mark.xfail(strict=True, reason="replicas are told by layout, not by cell")
def test_a_sum_may_hold_a_part_that_every_rank_has() -> None:
    table = Table(
        family="shared",
        columns={"a": None, "b": None},
        sizes={"n": "n", "m": "m"},
        branches=("x", "y"),
        rules=(rule("w", a=("p: (x n)", "q: (y m)"), b="pq: [(x n/tp) (y m)]"),),
    )
    sizes = {"n": 4, "m": 3, "x": 1, "y": 1}
    table.plan("a", "b", sizes=sizes, features=frozenset()).prove(target=Topology(tp=2)).check()


@pytest.mark.xfail(strict=True, raises=KeyError, reason="a fallback is looked up only when it is needed")
def test_a_fallback_that_is_no_column_is_refused() -> None:
    with pytest.raises(TableError, match="'te'"):
        Table(family="t", columns={"a": "te"}, sizes={}, branches=(), rules=()).resolve("a")
