"""The config ledger of the Llama family: every field accounted for, both ways, and nothing else accepted."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from converters.errors import ConfigError
from converters.fields import Ledger
from converters.models import family_of
from converters.sources import PACKAGED, read_config
from parity.tiny import odd_config

FIELDS = family_of({"model_type": "llama"}).fields
BARE = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
FACTORS = {"factor": 13.0, "low_freq_factor": 1.375, "high_freq_factor": 5.5, "original_max_position_embeddings": 113}
MEGATRON_FACTORS = {
    "rope_scaling": True,
    "rope_scaling_factor": 13.0,
    "rope_low_freq_factor": 1.375,
    "rope_high_freq_factor": 5.5,
    "rope_original_max_position_embeddings": 113,
    "seq_len_interpolation_factor": None,
}


def there(**fields: Any) -> Ledger:
    return FIELDS.to_megatron(BARE | fields)


def refusal(**fields: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        there(**fields)
    return str(raised.value)


def test_every_field_of_transformers_own_config_has_a_row() -> None:
    config = LlamaConfig(architectures=["LlamaForCausalLM"]).to_dict()
    accounted = {name for entry in FIELDS.to_megatron(config).entries for name in entry.hf}
    paths = {path: known.name for known in FIELDS.fields for path in known.paths}
    rope = config.pop("rope_parameters")
    for path in [*config, *(f"rope_parameters.{name}" for name in rope)]:
        assert paths.get(path, path) in accounted, path


def test_an_absent_field_means_what_transformers_takes_it_for() -> None:
    """The defaults are transformers' own, in the very release that is installed."""
    ledger, own = there(), LlamaConfig().to_dict()
    assert ledger.defaulted == ledger.hf
    own |= {"dtype": own["dtype"] or "float32"} | own.pop("rope_parameters")
    assert {name: own[name] for name in ledger.hf if name in own} == {
        name: value for name, value in ledger.hf.items() if name in own
    }
    assert {name: value for name, value in ledger.hf.items() if name not in own} == {
        "rope_factor": None,
        "rope_low_freq_factor": None,
        "rope_high_freq_factor": None,
        "rope_original_length": None,
    }


@pytest.mark.parametrize("name", sorted(PACKAGED))
def test_packaged_configs_there_and_back(name: str) -> None:
    ledger = FIELDS.to_megatron(read_config(name))
    assert FIELDS.to_hf(ledger.megatron, {}).hf == {k: v for k, v in ledger.hf.items() if v is not None}


def test_each_kind_of_row_both_ways() -> None:
    config = odd_config() | {"bos_token_id": 3}
    ledger = FIELDS.to_megatron(config)
    kinds = {name: entry.kind for entry in ledger.entries for name in (*entry.hf, *entry.megatron)}
    assert kinds["hidden_size"] == "same"
    assert kinds["intermediate_size"] == kinds["ffn_hidden_size"] == kinds["rope_factor"] == "renamed"
    assert kinds["hidden_act"] == kinds["gated_linear_unit"] == kinds["rope_type"] == "derived"
    assert kinds["normalization"] == kinds["rotary_percent"] == "fixed"
    assert kinds["bos_token_id"] == kinds["use_cache"] == "dropped"
    assert "bos_token_id" not in ledger.megatron
    megatron = {
        "num_layers": 6,
        "hidden_size": 210,
        "num_query_groups": 5,
        "kv_channels": 24,
        "layernorm_epsilon": 7e-5,
        "init_method_std": 0.019,
        "rotary_base": 23456.0,
        "activation_func": "silu",
        "gated_linear_unit": True,
        "params_dtype": "float32",
        "share_embeddings_and_output_weights": False,
        **MEGATRON_FACTORS,
    }
    assert {name: ledger.megatron[name] for name in megatron} == megatron
    back = FIELDS.to_hf(ledger.megatron, {})
    assert back.hf == ledger.hf
    assert {entry.kind for entry in back.entries} == {"same", "renamed", "derived", "fixed"}


@pytest.mark.parametrize("scaled", [True, False], ids=["llama3", "default"])
def test_both_spellings_of_rope_give_one_ledger(scaled: bool) -> None:
    kind = "llama3" if scaled else "default"
    factors = FACTORS if scaled else {}
    modern = there(rope_parameters={"rope_type": kind, "rope_theta": 4321.0, **factors})
    for spelled in (
        {"rope_theta": 4321.0, "rope_scaling": {"rope_type": kind, **factors} if scaled else None},
        {"rope_theta": 4321.0, "rope_scaling": {"type": kind, **factors}},
        {"rope_parameters": {"type": kind, "rope_theta": 4321.0, **factors}, "rope_theta": 4321.0},
        {"rope_scaling": {"rope_type": kind, "rope_theta": 4321.0, **factors}, "rope_parameters": None},
    ):
        ledger = there(**spelled)
        assert (ledger.megatron, ledger.hf) == (modern.megatron, modern.hf)
    assert modern.megatron["rotary_base"] == 4321.0


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"rope_theta": 2.0, "rope_parameters": {"rope_theta": 3.0}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "llama3", "type": "linear", **FACTORS}}, "rope_type"),
        ({"rope_scaling": FACTORS, "rope_parameters": FACTORS | {"factor": 2.0}}, "rope_factor"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "dtype"),
    ],
)
def test_a_field_spelled_twice_and_differently(fields: dict[str, Any], name: str) -> None:
    message = refusal(**fields)
    assert f"{name} is spelled twice and differently: " in message


def test_llama3_with_any_factors() -> None:
    ledger = there(rope_parameters={"rope_type": "llama3", **FACTORS})
    assert {name: ledger.megatron[name] for name in MEGATRON_FACTORS} == MEGATRON_FACTORS
    assert FIELDS.to_hf(ledger.megatron, {}).hf == ledger.hf


def test_linear() -> None:
    ledger = there(rope_scaling={"type": "linear", "factor": 2.7})
    assert ledger.megatron["seq_len_interpolation_factor"] == 2.7
    assert ledger.megatron["rope_scaling"] is False
    back = FIELDS.to_hf(ledger.megatron, {}).hf
    assert (back["rope_type"], back["rope_factor"]) == ("linear", 2.7)
    assert "original_max_position_embeddings" not in back


# What transformers' own validation asks for, by type: extra fields must not hide the type from the message.
EXTRAS: dict[str, dict[str, Any]] = {
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.7},
    "longrope": {"short_factor": [1.0, 1.1], "long_factor": [2.0, 2.1], "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("kind", sorted({*ROPE_INIT_FUNCTIONS, "mrope"} - {"default", "linear", "llama3"}))
def test_other_rope_types_are_refused_by_name(kind: str) -> None:
    extra = EXTRAS.get(kind, {})
    for spelled in ({"rope_parameters": {"rope_type": kind, **extra}}, {"rope_scaling": {"type": kind, **extra}}):
        assert f"rope_type='{kind}' is not supported" in refusal(**spelled)


def test_rope_fields_that_the_type_does_not_have() -> None:
    assert "rope_factor=2.0: no row of the ledger uses it" in refusal(rope_parameters={"factor": 2.0})
    assert "rope_low_freq_factor=1.0" in refusal(
        rope_parameters={"rope_type": "linear", "factor": 2.0, "low_freq_factor": 1.0}
    )


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_rope_fields_that_the_type_needs(kind: str) -> None:
    assert f"rope_type='{kind}' needs rope_factor" in refusal(rope_parameters={"rope_type": kind})


def test_unknown_fields_are_all_listed() -> None:
    message = refusal(head_dims=64, qk_norm=True, rope_parameters={"mscale": 1.0})
    assert "fields that no row of the ledger names (3):" in message
    assert "head_dims (did you mean 'head_dim'?)" in message
    for name in ("qk_norm", "rope_parameters.mscale"):
        assert f"\n  {name}" in message


def test_several_problems_are_told_together() -> None:
    message = refusal(hidden_act="relu", quantization_config={"bits": 4}, rope_scaling={"type": "dynamic"})
    assert "hidden_act='relu' has no counterpart" in message
    assert "quantization_config={'bits': 4}, where only None is supported: quantised weights" in message
    assert "rope_type='dynamic'" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sliding_window", 4096),
        ("pretraining_tp", 2),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("is_encoder_decoder", True),
        ("hidden_act", "gelu_new"),
        ("dtype", "float8_e4m3fn"),
        ("quantization_config", {"quant_method": "fp8"}),
    ],
)
def test_values_without_a_counterpart(field: str, value: Any) -> None:
    assert f"{field}={value!r}" in refusal(**{field: value})


@pytest.mark.parametrize(
    ("attention", "mlp", "zero"),
    [(False, False, "none"), (True, True, "none"), (True, False, "mlp"), (False, True, "attention")],
)
def test_biases(attention: bool, mlp: bool, zero: str) -> None:
    ledger = there(attention_bias=attention, mlp_bias=mlp)
    assert ledger.megatron["add_bias_linear"] is (attention or mlp)
    assert ledger.megatron["zero_biases"] == zero
    back = FIELDS.to_hf(ledger.megatron, {}).hf
    assert (back["attention_bias"], back["mlp_bias"]) == (attention, mlp)


def test_sizes_that_follow_from_others() -> None:
    ledger = there(hidden_size=96, num_attention_heads=6)
    assert (ledger.hf["num_key_value_heads"], ledger.hf["head_dim"]) == (6, 16)
    assert (ledger.megatron["num_query_groups"], ledger.megatron["kv_channels"]) == (6, 16)
    explicit = there(hidden_size=96, num_attention_heads=6, num_key_value_heads=3, head_dim=20)
    assert (explicit.megatron["num_query_groups"], explicit.megatron["kv_channels"]) == (3, 20)
    assert "head_dim: its default is hidden_size / num_attention_heads" in refusal(
        hidden_size=96, num_attention_heads=7
    )


def test_megatron_fields_away_from_their_defaults_need_a_row() -> None:
    megatron = dict(there().megatron)
    defaults = {"qk_layernorm": False, "window_size": None, "bias_dropout_fusion": True}
    held = megatron | {"qk_layernorm": True, "window_size": (4, 0), "bias_dropout_fusion": False}
    with pytest.raises(ConfigError) as raised:
        FIELDS.to_hf(held, defaults)
    message = str(raised.value)
    assert "qk_layernorm=True (default False): no row of the ledger names it" in message
    assert "window_size=(4, 0) (default None)" in message
    assert "bias_dropout_fusion" not in message  # how it is computed, not what
    assert FIELDS.to_hf(megatron | defaults, defaults).hf["hidden_size"] == 4096


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("normalization", "LayerNorm"),
        ("rotary_percent", 0.5),
        ("hidden_dropout", 0.1),
        ("activation_func", "relu"),
        ("gated_linear_unit", False),
        ("zero_biases", "mlp"),
        ("bf16", True),
    ],
)
def test_megatron_values_that_a_llama_cannot_say(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value!r}"):
        FIELDS.to_hf(there().megatron | {name: value}, {})


def test_other_families_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model_type='lama' is not supported.*did you mean 'llama'"):
        family_of({"model_type": "lama"})


@pytest.mark.parametrize("value", [0, -1, 2.0, 2**31])
@pytest.mark.parametrize("name", ["num_hidden_layers", "num_key_value_heads", "head_dim"])
def test_a_count_that_counts_nothing(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value}, expected an int from 1 to 2147483647"):
        FIELDS.read(odd_config() | {name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1e-5", True])
def test_a_number_that_is_none(value: object) -> None:
    with pytest.raises(ConfigError, match=f"rms_norm_eps={value!r}, expected a finite float"):
        FIELDS.read(odd_config() | {"rms_norm_eps": value})
