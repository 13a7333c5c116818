"""Config fields through a real, finalised Megatron-Core config and back, and what a bridge says about models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import provided
import pytest

from converters.bridge import AutoBridge
from converters.sources import PACKAGED, read_config
from converters.topology import Topology
from parity.ranks import Zygote
from parity.tiny import odd_config

Alone = Callable[..., Any]


@pytest.fixture
def alone(zygote: Zygote) -> Alone:
    """Calls a function in one rank without a process group and without a GPU."""

    def run(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        env = {"CUDA_VISIBLE_DEVICES": ""}
        return zygote.run(function, *arguments, backend=None, timeout=60, env=env, **named)[0]

    return run


@pytest.mark.parametrize("name", sorted(PACKAGED))
def test_packaged_configs_there_and_back(name: str, alone: Alone) -> None:
    before, after = alone(provided.told_back, read_config(name), Topology())
    assert after == before


@pytest.mark.parametrize(
    "topology",
    [
        Topology(tp=3, sp=True),  # a ghost group, which is no part of the model
        Topology(pp=2, first_stage_layers=1),
        Topology(pp=4, count_embedding=True, count_loss=True),
        Topology(pp=2, vpp=2, count_embedding=True, count_loss=True),
    ],
    ids=str,
)
def test_a_layout_is_no_part_of_the_model(topology: Topology, alone: Alone) -> None:
    before, after = alone(provided.told_back, odd_config(), topology, make_vocab_size_divisible_by=64)
    assert after == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qk_layernorm": True}, "qk_layernorm=True (default False): no row of the ledger names it"),
        ({"window_size": (4, 0)}, "window_size=(4, 0) (default None): no row of the ledger names it"),
        ({"softmax_scale": 0.3}, "softmax_scale=0.3 (default "),
        ({"normalization": "LayerNorm"}, "normalization='LayerNorm', expected 'RMSNorm'"),
        ({"hidden_dropout": 0.1}, "hidden_dropout=0.1, expected 0.0"),
        ({"add_qkv_bias": False}, "add_qkv_bias=False"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm=True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_a_llama_cannot_say_is_refused(fields: dict[str, Any], message: str, alone: Alone) -> None:
    assert message in alone(provided.refused, odd_config(), **fields)


def test_how_a_model_is_trained_is_not_refused(alone: Alone) -> None:
    fields = {"recompute_granularity": "full", "bias_dropout_fusion": True, "seq_length": 7, "deterministic_mode": True}
    assert alone(provided.refused, odd_config(), **fields) == "no error"


def test_only_what_changed_is_rewritten(checkpoints: dict[str, Path], alone: Alone) -> None:
    source = checkpoints["odd"] / "config.json"
    assert alone(provided.config_bytes, checkpoints["odd"]) == source.read_bytes()
    changed = json.loads(alone(provided.config_bytes, checkpoints["odd"], rotary_base=54321.0))
    assert changed == json.loads(source.read_text()) | {"rope_theta": 54321.0}
    factor = json.loads(alone(provided.config_bytes, checkpoints["odd"], rope_scaling_factor=9.0))
    assert factor["rope_scaling"] == odd_config()["rope_scaling"] | {"factor": 9.0}
    assert "rope_parameters" not in factor


def test_a_scaling_that_is_switched_off_leaves_no_factors_behind(checkpoints: dict[str, Path], alone: Alone) -> None:
    """What is written must be a config that can be read, and say the same."""
    from converters.models import family_of

    changed = json.loads(alone(provided.config_bytes, checkpoints["odd"], rope_scaling=False))
    ledger = family_of(changed).fields.to_megatron(changed)
    assert ledger.hf["rope_type"] == "default"
    assert ledger.megatron["rope_scaling"] is False


def test_a_config_object_of_transformers(alone: Alone) -> None:
    assert alone(provided.from_transformers_config) == {
        "rotary_base": 4321.0,
        "rope_scaling": True,
        "rope_scaling_factor": 3.0,
        "rope_low_freq_factor": 1.5,
        "num_query_groups": 2,
    }


def test_what_a_bridge_can_handle(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    assert AutoBridge.list_supported_models() == ["LlamaForCausalLM"]
    assert AutoBridge.supports({"architectures": ["LlamaForCausalLM"]})
    assert not AutoBridge.supports({"architectures": ["MistralForCausalLM"]})
    assert not AutoBridge.supports({})
    assert AutoBridge.can_handle(checkpoints["odd"])
    assert not AutoBridge.can_handle(tmp_path / "nothing")
    for change in ({"model_type": "mistral"}, {"rope_scaling": {"type": "yarn"}}, {"sliding_window": 5}):
        (tmp_path / "config.json").write_text(json.dumps(odd_config() | change))
        assert not AutoBridge.can_handle(tmp_path)
