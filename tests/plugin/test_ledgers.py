"""The account of names: what nothing maps, on either side, fails the check that prints it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from converters.models import family_of
from converters.sources import read_config
from parity.findings import Account, Measurement
from parity.seeded import key_table
from parity.statement.ledgers import Row, config_rows, findings, tensor_rows
from parity.tiny import odd_config, shrink

CONFIG: dict[str, Any] = shrink(read_config("Llama-3.2-1B"))
FAMILY = family_of(CONFIG)
PLAN = FAMILY.plan("hf", "megatron_local", CONFIG, padded_vocab_size=CONFIG["vocab_size"] + 3)
STORED = set(key_table(CONFIG))
HELD = set(PLAN.target_tensors)
TOLD = FAMILY.fields.to_megatron(CONFIG).megatron


def lost(rows: list[Row]) -> list[tuple[str, str]]:
    """Side and name of what the account fails for, which must be what it shows as unaccounted."""
    measurement, account = findings("names", rows)
    assert isinstance(measurement, Measurement)
    assert isinstance(account, Account)
    found = [(row["side"], row["name"]) for row in account.rows if row["class"] == "unaccounted"]
    assert (measurement.measured, measurement.passed) == (len(found), not found)
    assert all(f"{side}: {name}: " in measurement.detail for side, name in found)
    return found


def test_every_tensor_of_a_model_is_accounted_for() -> None:
    rows = list(tensor_rows([PLAN], STORED, HELD))
    assert lost(rows) == []
    assert Counter((row["side"], row["class"]) for row in rows) == {("hf", "exact"): 11, ("megatron", "exact"): 8}
    assert all("N" in row["name"] for row in rows if "layers" in row["name"]), "layers are taken together"
    (padded,) = (row for row in rows if row["name"].endswith("word_embeddings.weight"))
    assert "zeros" in padded["reason"]


@pytest.mark.parametrize(
    ("stored", "held", "name"),
    [
        (STORED | {"model.layers.3.self_attn.q_norm.weight"}, HELD, ("hf", "model.layers.N.self_attn.q_norm.weight")),
        (STORED, HELD | {"decoder.layers.0.mlp.router.weight"}, ("megatron", "decoder.layers.N.mlp.router.weight")),
        (STORED, HELD - {"decoder.final_layernorm.weight"}, ("megatron", "decoder.final_layernorm.weight")),
    ],
    ids=["stored, not mapped", "held, not mapped", "mapped, not held"],
)
def test_a_tensor_that_nobody_maps_fails(stored: set[str], held: set[str], name: tuple[str, str]) -> None:
    assert lost(list(tensor_rows([PLAN], stored, held))) == [name]


def test_what_is_dropped_says_why_and_what_is_made_up_is_constant() -> None:
    config = {**odd_config(), "attention_bias": True, "mlp_bias": False}
    plan = family_of(config).plan(
        "hf", "megatron_local", config, padded_vocab_size=config["vocab_size"], features=frozenset({"stored_inv_freq"})
    )
    stored = {*key_table(config), *(name for name in plan.drops)}
    rows = {row["name"]: row for row in tensor_rows([plan], stored, plan.target_tensors)}
    dropped = [row for row in rows.values() if row["class"] == "dropped"]
    assert dropped
    assert all(row["reason"] and "inv_freq" in row["name"] for row in dropped)
    assert rows["decoder.layers.N.mlp.linear_fc1.bias"]["class"] == "constant"
    assert rows["decoder.layers.N.self_attention.linear_qkv.bias"]["class"] == "exact"


def account(config: Mapping[str, Any], *set_: str) -> list[Row]:
    return list(config_rows(FAMILY.fields, config, [*TOLD, *set_]))


def test_every_field_of_a_config_is_accounted_for() -> None:
    rows = {(row["side"], row["name"]): row["class"] for row in account(CONFIG)}
    assert lost(account(CONFIG)) == []
    assert rows["hf", "rms_norm_eps"] == rows["hf", "rope_scaling.factor"] == "exact"
    assert rows["hf", "hidden_act"] == "derived"
    assert rows["hf", "architectures"] == "dropped"
    assert rows["megatron", "rotary_interleaved"] == "constant"


def test_a_field_that_megatron_has_set_and_no_row_names_fails() -> None:
    assert lost(account(CONFIG, "a_new_field")) == [("megatron", "a_new_field")]


def test_a_field_that_the_ledger_does_not_use_fails() -> None:
    """The ledger of another table may read a config and pass a field over: the account sees it all the same."""

    class Forgetful:
        fields, rows = FAMILY.fields.fields, FAMILY.fields.rows

        def to_megatron(self, config: Mapping[str, Any]) -> Any:
            return FAMILY.fields.to_megatron({name: config[name] for name in config if name != "qk_norm"})

    rows = list(config_rows(Forgetful(), {**CONFIG, "qk_norm": True}, TOLD))  # type: ignore[arg-type]
    assert lost(rows) == [("hf", "qk_norm")]


def test_an_account_of_nothing_does_not_pass() -> None:
    measurement, _ = findings("names", [])
    assert isinstance(measurement, Measurement)
    assert not measurement.passed
