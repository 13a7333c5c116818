"""Settings of Megatron checkpoints: to arguments and `run_config.yaml`, back, and to a Hugging Face config."""

from __future__ import annotations

import dataclasses
import json
from fnmatch import fnmatchcase
from typing import Any

import pytest

from converters.errors import ConfigError
from converters.files import megatron_state, settings
from converters.files.settings_table import EXECUTION, REQUIRED, ROWS, SWITCHES
from converters.models import FAMILIES
from converters.rows import Dropped
from parity.tiny import odd_config

LLAMA = FAMILIES[0]
ODD = odd_config()
LINEAR = {"rope_theta": 7000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.5}}
PLAIN = {"rope_theta": 3000.0, "rope_scaling": None}
MODELS: dict[str, dict[str, Any]] = {
    "odd": ODD,
    "tied": ODD | {"tie_word_embeddings": True},
    "attention": ODD | {"mlp_bias": False},
    "mlp": ODD | {"attention_bias": False},
    "bare": ODD | {"mlp_bias": False, "attention_bias": False, "torch_dtype": "bfloat16"} | PLAIN,
    "linear": ODD | {"hidden_act": "gelu", "torch_dtype": "float16"} | LINEAR,
}


def fields_of(config: dict[str, Any]) -> dict[str, Any]:
    return dict(LLAMA.fields.to_megatron(config).megatron)


def args_of(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return settings.to_args(fields_of(config), iteration=0) | changes


def run_config_of(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    import yaml

    text = megatron_state.run_config(settings.to_run_config(fields_of(config), model_id="me/model"))
    return dict(yaml.safe_load(text)["model"]) | changes


def both(config: dict[str, Any]) -> list[settings.Settings]:
    """The settings by each way."""
    return [
        settings.from_args(args_of(config), "common.pt"),
        settings.from_run_config(run_config_of(config), "run_config.yaml"),
    ]


@pytest.mark.parametrize("name", MODELS)
class TestThereAndBack:
    def test_fields(self, name: str) -> None:
        expected = fields_of(MODELS[name])
        for found in both(MODELS[name]):
            assert {field: found.fields[field] for field in expected} == expected
            assert found.remarks == ()

    def test_the_config(self, name: str) -> None:
        expected, _ = LLAMA.fields.read(MODELS[name])
        for found in both(MODELS[name]):
            family, config = settings.hf_config(found)
            assert family is LLAMA
            assert LLAMA.fields.read(config)[0] == expected
            assert "rope_parameters" not in config
            assert config["torch_dtype"] == expected["dtype"]

    def test_transformers_reads_the_config(self, name: str) -> None:
        transformers = pytest.importorskip("transformers", reason="reads the config")
        _, config = settings.hf_config(both(MODELS[name])[0])
        mine, its = (transformers.LlamaConfig(**json.loads(json.dumps(each))) for each in (config, MODELS[name]))
        for field in ("rope_parameters", "rms_norm_eps", "head_dim", "vocab_size", "dtype", "tie_word_embeddings"):
            assert getattr(mine, field) == getattr(its, field), field


class TestMegatronsOwn:
    """What Megatron-LM and Megatron-Bridge write themselves."""

    def test_every_field_of_megatron_core_is_accounted_for(self) -> None:
        megatron = pytest.importorskip("megatron.core.transformer.transformer_config", reason="has the fields")
        rows = {row.field: row for row in ROWS}
        patterns = [
            pattern
            for row in LLAMA.fields.rows
            if isinstance(row, Dropped) and row.side == "megatron"
            for pattern in row.patterns
        ]
        for field in dataclasses.fields(megatron.TransformerConfig):
            if field.name in SWITCHES:
                assert field.default == SWITCHES[field.name], field.name
            elif field.name in rows and isinstance(rows[field.name].default, (bool, float)):
                assert field.default == rows[field.name].default, field.name
            elif field.name not in rows:
                assert any(fnmatchcase(field.name, p) for p in (*EXECUTION, *patterns)), field.name

    def test_a_config_with_every_field(self) -> None:
        """Megatron-Bridge writes all of them."""
        megatron = pytest.importorskip("megatron.core.transformer.transformer_config", reason="has the fields")
        model = run_config_of(ODD)
        for field in dataclasses.fields(megatron.TransformerConfig):
            plain = isinstance(field.default, (int, float, str, bool, type(None)))
            model.setdefault(field.name, field.default if plain else {"_target_": "a.function", "_call_": False})
        assert settings.from_run_config(model, "run_config.yaml").fields == both(ODD)[1].fields

    def test_a_builder(self) -> None:
        """Megatron-Bridge's newer form: what the transformer is stands in a section of its own."""
        flat = run_config_of(ODD)
        inner = {name: flat.pop(name) for name in ("num_layers", "hidden_size", "layernorm_epsilon", "activation_func")}
        model = {**flat, "_builder_": "megatron.bridge.models.gpt.GPTModelBuilder", "transformer": inner}
        assert settings.from_run_config(model, "run_config.yaml").fields == both(ODD)[1].fields

    def test_an_activation_that_was_left_out(self) -> None:
        """Then only a config tells which."""
        model = run_config_of(ODD)
        del model["activation_func"]
        found = settings.from_run_config(model, "run_config.yaml")
        with pytest.raises(ConfigError, match="activation_func='not recorded'"):
            settings.hf_config(found)
        assert settings.differences(ODD, found, "config.json") == []

    def test_gelu_as_torch_names_it(self) -> None:
        model = run_config_of(MODELS["linear"], activation_func={"_target_": "torch._C._nn.gelu", "_call_": False})
        assert settings.from_run_config(model, "run_config.yaml").fields["activation_func"] == "gelu"

    def test_arguments_of_the_command_line_alone(self) -> None:
        """As Megatron-LM writes them: none of the names that only this project, or Megatron-Core, has."""
        args = args_of(MODELS["bare"])
        for name in ("activation_func", "gated_linear_unit", "zero_biases", "layernorm_epsilon", "ghost_query_groups"):
            del args[name]
        for name in (name for name in list(args) if name.startswith("rope_") and name != "rope_scaling_factor"):
            del args[name]
        found = settings.from_args(args, "common.pt")
        assert found.fields == both(MODELS["bare"])[0].fields

    def test_a_vocabulary_that_is_only_known_padded(self) -> None:
        found = settings.from_args(args_of(ODD, vocab_size=None, padded_vocab_size=1024), "common.pt")
        assert found.fields["vocab_size"] == 1024
        assert "padded" in found.remarks[0]
        assert "--like" in found.remarks[0]

    def test_groups_that_mean_nothing(self) -> None:
        found = settings.from_args(args_of(ODD, group_query_attention=False, num_query_groups=1), "common.pt")
        assert found.fields["num_query_groups"] == ODD["num_attention_heads"]

    def test_norms_that_are_centred_on_zero(self) -> None:
        args = args_of(ODD, apply_layernorm_1p=True)
        del args["layernorm_zero_centered_gamma"]
        assert settings.from_args(args, "common.pt").fields["layernorm_zero_centered_gamma"] is True


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"num_experts": 8}, ("num_moe_experts", "8")),
            ({"qk_layernorm": True}, ("qk_layernorm",)),
            ({"multi_latent_attention": True}, ("multi_latent_attention",)),
            ({"window_size": (128, 0)}, ("window_size",)),
            ({"position_embedding_type": "learned_absolute"}, ("position_embedding_type", "rope")),
            ({"normalization": "LayerNorm"}, ("normalization", "RMSNorm")),
            ({"rotary_percent": 0.5}, ("rotary_percent",)),
            ({"add_position_embedding": False}, ("add_position_embedding",)),
            ({"swiglu": False, "activation_func": "relu"}, ("activation_func", "relu")),
        ],
    )
    def test_another_model(self, changes: dict[str, Any], words: tuple[str, ...]) -> None:
        found = settings.from_args(args_of(ODD, **changes), "common.pt")
        with pytest.raises(ConfigError) as caught:
            settings.hf_config(found)
        assert [word for word in ("common.pt", *words) if word not in str(caught.value)] == []

    @pytest.mark.parametrize(
        ("name", "value"), [("mtp_num_layers", 1), ("linear_attention_freq", 4), ("use_mup", True)]
    )
    def test_a_switch_among_sizes(self, name: str, value: Any) -> None:
        """Fields of like names only size what it turns on."""
        found = settings.from_run_config(run_config_of(ODD, **{name: value}), "run_config.yaml")
        with pytest.raises(ConfigError, match=name):
            settings.hf_config(found)

    def test_a_field_that_nobody_knows(self) -> None:
        found = settings.from_run_config(
            run_config_of(ODD, attention_twist=0.5, quiet=None, off=False), "run_config.yaml"
        )
        with pytest.raises(ConfigError, match=r"attention_twist=0\.5"):
            settings.hf_config(found)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"num_layers": None, "hidden_size": None}, ("num_layers is missing", "hidden_size is missing")),
            ({"norm_epsilon": 0.1}, ("layernorm_epsilon", "twice", "0.1")),
            ({"num_layers": "four"}, ("num_layers='four'",)),
            ({"num_layers": True}, ("num_layers=True",)),
            ({"hidden_size": -4}, ("hidden_size=-4",)),
            ({"rotary_base": "much"}, ("rotary_base='much'",)),
            ({"rope_scaling_factor": None}, ("rope_scaling_factor is missing",)),
            ({"bf16": True, "fp16": True}, ("bf16 and fp16",)),
            ({"normalization": 3}, ("normalization=3",)),
            ({"add_bias_linear": "yes"}, ("add_bias_linear='yes'",)),
        ],
    )
    def test_settings_that_describe_no_model(self, changes: dict[str, Any], words: tuple[str, ...]) -> None:
        with pytest.raises(ConfigError) as caught:
            settings.from_args(args_of(ODD, **changes), "common.pt")
        assert [word for word in ("common.pt", *words) if word not in str(caught.value)] == []


class TestDifferences:
    def test_every_field_that_computes_something_else(self) -> None:
        found = both(ODD)[1]
        config = ODD | {"rms_norm_eps": 0.5, "num_hidden_layers": 99, "tie_word_embeddings": True, "rope_theta": 1.0}
        with pytest.raises(ConfigError) as caught:
            settings.differences(config, found, "config.json")
        told = str(caught.value)
        for name in ("rms_norm_eps", "num_hidden_layers", "rope_theta", "tie_word_embeddings"):
            assert f"{name} (" in told
        for word in ("0.5 in config.json", f"{ODD['rms_norm_eps']} in run_config.yaml", "(4)"):
            assert word in told

    def test_those_of_a_run_are_told(self) -> None:
        config = ODD | {"attention_dropout": 0.25, "max_position_embeddings": 8}
        lines = settings.differences(ODD | {"attention_dropout": 0.25}, both(ODD)[0], "config.json")
        assert lines == ["attention_dropout: 0.25 in config.json, 0.0 in common.pt"]
        assert len(settings.differences(config, both(ODD)[0], "config.json")) == 2

    def test_a_switch_that_a_config_does_not_know(self) -> None:
        found = settings.from_args(args_of(ODD, qk_layernorm=True), "common.pt")
        with pytest.raises(ConfigError, match=r"qk_layernorm: True in common\.pt"):
            settings.differences(ODD, found, "config.json")

    def test_what_settings_do_not_say_is_no_difference(self) -> None:
        args = args_of(ODD)
        for name in ("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_max_position_embeddings"):
            del args[name]
        assert settings.differences(ODD, settings.from_args(args, "common.pt"), "config.json") == []


def test_what_megatron_hard_codes_is_told() -> None:
    told = settings.beyond_megatron(fields_of(ODD))
    assert any(f"rope_low_freq_factor={ODD['rope_scaling']['low_freq_factor']!r}" in line for line in told)
    assert settings.beyond_megatron(fields_of(MODELS["bare"])) == []


def test_rows_are_named_once() -> None:
    for names in (
        [row.field for row in ROWS],
        [n for r in ROWS for n in r.arguments],
        [n for r in ROWS for n in r.members],
    ):
        assert len(names) == len(set(names))
    assert {row.field for row in ROWS if row.default is REQUIRED} >= {"num_layers", "hidden_size", "vocab_size"}
