"""The matrix: ids, what is left out of it, and that Megatron-Core refuses the same layouts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest

from converters.errors import ConfigError
from converters.topology import Topology
from parity.backends import refusals
from parity.case import Case, matrix, slugs
from parity.options import resolve

LLAMA = {
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_size": 96,
    "intermediate_size": 144,
    "num_hidden_layers": 6,
}


def cases(config: Mapping[str, Any] = LLAMA, **command_line: str) -> tuple[list[str], dict[str, str]]:
    """Ids of the cases, and what was left out of them."""

    def config_of(model: str, *, revision: str | None, size: str, layers: int | None) -> Mapping[str, Any]:
        return {**config, "num_hidden_layers": layers or config["num_hidden_layers"]}

    found, left_out = matrix(resolve({"model": "meta-llama/Llama-3.2-1B", **command_line}), config_of)
    assert len(dict(left_out)) == len(left_out), "every combination has its own id"
    return [case.id for case in found], dict(left_out)


def test_ids_show_what_is_not_default() -> None:
    assert cases() == (["llama-3.2-1b-tp1-pp1-fp32-megatron"], {})
    assert cases(size="tiny", tp="2")[0] == ["llama-3.2-1b-tiny-tp2-pp1-fp32-megatron"]
    assert cases(tp="2", pp="3", vpp="2", cp="2", sp="on", precision="bf16")[0] == [
        "llama-3.2-1b-tp2-pp3-vpp2-cp2-sp-bf16-megatron"
    ]
    assert cases(weights="seeded", layers="4")[0] == ["llama-3.2-1b-seeded-4layers-tp1-pp1-fp32-megatron"]


def test_matrix_is_the_product_in_order() -> None:
    found, left_out = cases(tp="1,2", pp="1,2", precision="fp32,bf16")
    layouts = itertools.product(("tp1", "tp2"), ("pp1", "pp2"), ("fp32", "bf16"))
    assert found == [f"llama-3.2-1b-{tp}-{pp}-{precision}-megatron" for tp, pp, precision in layouts]
    assert not left_out


def test_slugs_are_short_and_distinct() -> None:
    def of(*models: str, **command_line: str) -> list[str]:
        return list(slugs(resolve({"model": ",".join(models), **command_line})).values())

    assert of("meta-llama/Llama-3.2-1B", "/data/My Model_v2/") == ["llama-3.2-1b", "my-model-v2"]
    assert of("/runs/step100/hf", "/runs/step200/hf", "c") == ["runs-step100-hf", "runs-step200-hf", "c"]
    assert of("a/Llama", "b/llama", size="tiny") == ["a-llama-tiny", "b-llama-tiny"]


@pytest.mark.parametrize(
    ("command_line", "name", "reason"),
    [
        ({"tp": "5"}, "tp5-pp1", "a feed-forward width of 144 does not divide over tp=5"),
        ({"pp": "4", "layers": "5"}, "pp4", "5 layers do not fit pp=4"),
        ({"sp": "on"}, "tp1-pp1-sp", "sequence parallelism needs tp of at least 2"),
        ({"vpp": "2", "cp": "2"}, "tp1-pp1-vpp2-cp2", "vpp=2 needs pp of at least 2"),
        ({"tp": "5", "pp": "4", "layers": "5"}, "tp5-pp4", "144 does not divide over tp=5"),
    ],
)
def test_impossible_is_left_out_with_its_reason(command_line: dict[str, str], name: str, reason: str) -> None:
    found, left_out = cases(**command_line)
    assert not found
    [(left, why)] = left_out.items()
    assert name in left
    assert reason in why


def test_only_the_impossible_is_left_out() -> None:
    found, left_out = cases(tp="1,2", sp="off,on", pp="1,2", vpp="1,2", layers="8")
    assert len(found) + len(left_out) == 16
    one_way = ("tp1-pp1-sp", "tp1-pp1-vpp2", "tp1-pp1-vpp2-sp", "tp1-pp2-sp", "tp1-pp2-vpp2-sp")
    meshes = [*one_way, "tp2-pp1-vpp2", "tp2-pp1-vpp2-sp"]
    assert sorted(left_out) == sorted(f"llama-3.2-1b-8layers-{mesh}-fp32-megatron" for mesh in meshes)


def test_counted_layers_are_told() -> None:
    def config_of(*_: object, **__: object) -> Mapping[str, Any]:
        return LLAMA

    [case], _ = matrix(resolve({"model": "m", "pp": "4"}), config_of)
    assert case.topology == Topology(pp=4, count_embedding=True, count_loss=True)
    assert case.id == "m-tp1-pp4-count-embedding-count-loss-fp32-megatron"
    assert case.note == "layers do not divide evenly, so the embedding and the loss count as a layer each"
    assert Case(model="m", slug="m", topology=Topology(pp=2)).note == ""


@pytest.mark.parametrize("missing", ["num_attention_heads", "hidden_size", "intermediate_size", "num_hidden_layers"])
def test_missing_field_is_an_error(missing: str) -> None:
    config = {name: value for name, value in LLAMA.items() if name != missing}
    with pytest.raises(ConfigError, match=missing):
        matrix(resolve({"model": "m"}), lambda *_, **__: config)


def test_experts_need_sequence_parallelism_under_tp() -> None:
    mixtral = {**LLAMA, "num_local_experts": 8}
    assert "add --sp on" in refusals(mixtral, Topology(tp=2))[0]
    assert not refusals(mixtral, Topology(tp=2, sp=True))
    assert not refusals(mixtral, Topology())


def test_layers_that_differ_are_looked_at_one_by_one() -> None:
    attention = {"n_heads_in_group": 4, "replace_with_linear": False}
    blocks = [
        {"attention": attention, "ffn": {"ffn_mult": 2.0, "replace_with_linear": False}},
        {"attention": {"n_heads_in_group": None, "replace_with_linear": True}, "ffn": {"ffn_mult": None}},
        {"attention": {**attention, "n_heads_in_group": 8}, "ffn": {"ffn_mult": 0.1}},
    ]
    config = {"num_attention_heads": 24, "hidden_size": 98, "head_dim": 16, "block_configs": blocks}
    assert not refusals(config, Topology())
    assert refusals(config, Topology(tp=4)) == [
        "24 heads in 3 key-value groups do not divide over tp=4",
        "24 heads in 6 key-value groups do not divide over tp=4",
        "the 98 rows of a linear replacement do not divide over tp=4",
    ]
    assert "a feed-forward width of 256 does not divide over tp=3" in refusals(config, Topology(tp=3))


def test_part_of_a_group_a_rank_needs_rows_that_divide() -> None:
    narrow = {**LLAMA, "head_dim": 1}
    assert not refusals(narrow, Topology(tp=2))
    reason = "the 12 rows of the fused query-key-value matrix do not divide over tp=8"
    assert refusals(narrow, Topology(tp=8)) == [reason]


def test_heads_divide_after_groups_of_zeros() -> None:
    [case], left_out = matrix(resolve({"model": "m", "tp": "3"}), lambda *_, **__: LLAMA)
    assert (case.ghost_groups, left_out) == (1, [])
    assert case.note == "heads do not divide over tp, so a key-value group of zeros is added (exact)"


def test_megatron_asks_for_the_same_groups() -> None:
    """Against the real `TransformerConfig`: it takes the number of groups that the case has, and refuses fewer."""
    transformer_config = pytest.importorskip("megatron.core.transformer.transformer_config", reason="Megatron-Core")

    def build(per_group: int, groups: int, tp: int) -> None:
        transformer_config.TransformerConfig(
            num_layers=2,
            hidden_size=96,
            num_attention_heads=per_group * groups,
            num_query_groups=groups,
            kv_channels=24,
            tensor_model_parallel_size=tp,
        )

    for per_group, groups, tp in itertools.product((1, 2, 3, 4), (1, 2, 3, 4, 6), (1, 2, 3, 4, 6, 8)):
        heads = {"num_attention_heads": per_group * groups, "num_key_value_heads": groups}
        config = {**LLAMA, **heads, "head_dim": 24, "intermediate_size": 24}
        [case], _ = matrix(resolve({"model": "m", "tp": str(tp)}), lambda *_, config=config, **__: config)
        build(per_group, groups + case.ghost_groups, tp)
        for fewer in range(groups, groups + case.ghost_groups):
            with pytest.raises(ValueError, match="tensor_model_parallel_size"):
                build(per_group, fewer, tp)
