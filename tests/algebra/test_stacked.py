"""Stacked columns: derived from the column of single layers, never written down a second time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from index_arrays import coded, run, same
from random_tables import COLUMNS, Model, models

from converters.errors import TableError
from converters.layout import Layout
from converters.models import family_of
from converters.models.llama import TABLE
from converters.plan import Plan
from converters.sources import read_config
from converters.table import Table, rule
from converters.topology import Topology

CONFIG = read_config("meta-llama/Llama-3.2-1B")
EVERY = ("hf", "megatron", "megatron_local", "megatron_dist", "te")


def plan(source: str, target: str, *features: str, **changes: Any) -> Plan:
    config = {**CONFIG, "num_hidden_layers": 4, **changes}
    return family_of(config).plan(source, target, config, padded_vocab_size=128512, features=frozenset(features))


@pytest.mark.parametrize(
    ("text", "stacked"),
    [
        ("a.{layer/pp}.b: hidden ffn/tp", "a.b: layer/pp hidden ffn/tp"),
        ("a.{layer}.b.{expert/ep}.c @first: x", "a.b.c @first: layer expert/ep x"),
        ("a.{(stage layer)}.b: [x y]", "a.b: (stage layer) [x y]"),
        ("a.b: x", "a.b: x"),
        ("{layer}.b: x", "b: layer x"),
    ],
)
def test_numbers_of_keys_become_leading_dims(text: str, stacked: str) -> None:
    assert str(Layout.parse(text).stacked()) == stacked


def test_names_and_shapes_are_those_of_a_distributed_checkpoint() -> None:
    """Of Llama-3.2-1B with four layers and no padding, written down by hand."""
    config = {**CONFIG, "num_hidden_layers": 4}
    layers = {
        "self_attention.linear_qkv.weight": (4, 3072, 2048),
        "self_attention.linear_qkv.layer_norm_weight": (4, 2048),
        "self_attention.linear_proj.weight": (4, 2048, 2048),
        "mlp.linear_fc1.weight": (4, 16384, 2048),
        "mlp.linear_fc1.layer_norm_weight": (4, 2048),
        "mlp.linear_fc2.weight": (4, 2048, 8192),
    }
    assert family_of(config).plan("hf", "megatron_dist", config).target_tensors == {
        "embedding.word_embeddings.weight": (128256, 2048),
        "decoder.final_layernorm.weight": (2048,),
        **{f"decoder.layers.{name}": shape for name, shape in layers.items()},
    }


@pytest.mark.parametrize("source", EVERY)
@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize(
    ("features", "changes"),
    [
        ((), {}),
        (("stored_lm_head", "stored_inv_freq"), {}),
        (("layernorm_zero_centered_gamma",), {"tie_word_embeddings": False, "attention_bias": True}),
    ],
    ids=["tied", "stored", "shifted"],
)
def test_plans_between_any_two_columns_are_proved(
    source: str, target: str, features: tuple[str, ...], changes: dict[str, Any]
) -> None:
    made = plan(source, target, *features, **changes)
    proof = made.prove()
    assert proof.holds, proof.faults
    if source == target:
        assert all(copy.shift == 0 for copy in made.copies)
        kept = made.source_tensors.keys() - made.drops.keys()
        assert {key: made.source_tensors[key] for key in kept} == made.target_tensors
        moves = [copy for copy in made.copies if copy.kind == "move"]
        assert all(copy.source == copy.target for copy in moves)


def test_a_stacked_tensor_is_its_layers_one_after_the_other() -> None:
    small = {"hidden_size": 8, "intermediate_size": 6, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {**small, "head_dim": 2, "vocab_size": 10}
    config = {**CONFIG, "num_hidden_layers": 3, **sizes}
    single = family_of(config).plan("hf", "megatron", config)
    whole = family_of(config).plan("hf", "megatron_dist", config)
    tensors = coded(single.source_tensors)
    apart, stacked = run(single, tensors), run(whole, tensors)
    for key, array in stacked.items():
        for layer in range(3) if key.startswith("decoder.layers.") else ():
            name = key.replace("decoder.layers.", f"decoder.layers.{layer}.")
            assert (array[layer] == apart[name]).all()
    assert {key.replace(".0.", ".") for key in apart if ".1." not in key and ".2." not in key} == stacked.keys()


@pytest.mark.parametrize("topology", [Topology(tp=2), Topology(pp=2), Topology(tp=2, pp=2, vpp=2)], ids=str)
def test_ranks_fill_and_read_a_distributed_checkpoint(topology: Topology) -> None:
    assert plan("megatron", "megatron_dist").prove(source=topology).holds
    assert plan("megatron_dist", "megatron").prove(target=topology).holds


@given(models())
def test_any_column_can_be_stacked(model: Model) -> None:
    columns = {**dict.fromkeys(COLUMNS), "s": "a"}
    table = replace(model.table, columns=columns, stacked=frozenset({"s"}))
    there, back = (table.plan(*pair, sizes=model.sizes, features=frozenset()) for pair in (("b", "s"), ("s", "b")))
    assert there.prove().holds
    assert back.prove().holds
    plain = {name: 0 if name.startswith("p") else size for name, size in model.sizes.items()}
    there, back = (table.plan(*pair, sizes=plain, features=frozenset()) for pair in (("b", "s"), ("s", "b")))
    tensors = coded(there.source_tensors)
    assert same(run(back, run(there, tensors)), tensors)


def test_a_stacked_column_is_that_of_another() -> None:
    with pytest.raises(TableError, match="'megatron_dist' is stacked and falls back to no column"):
        replace(TABLE, columns={**TABLE.columns, "megatron_dist": None})


def test_a_rule_may_name_a_stacked_column_itself() -> None:
    table = Table(
        family="experts",
        columns={"one": None, "dist": "one"},
        sizes={"layers": "layer", "experts": "expert", "hidden": "hidden"},
        branches=(),
        stacked=frozenset({"dist"}),
        rules=(
            rule("norm", one="layers.{layer}.norm: hidden"),
            rule(
                "expert",
                one="layers.{layer}.experts.{expert}.weight: hidden",
                dist="layers.experts.experts.weight: layer expert hidden",
            ),
            rule("bias", one="layers.{layer}.bias: hidden", dist="biases.{layer}: hidden"),
        ),
    )
    made = table.plan("one", "dist", sizes={"layer": 2, "expert": 3, "hidden": 5}, features=frozenset())
    assert made.target_tensors == {
        "layers.norm": (2, 5),
        "layers.experts.experts.weight": (2, 3, 5),
        "biases.0": (5,),
        "biases.1": (5,),
    }
    assert made.prove().holds
