"""What a rank does with providers and their fields. No process group is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.topology import Topology


def provider_of(config: dict[str, Any], topology: Topology, **fields: Any) -> tuple[Any, Any]:
    """Bridge and finalised provider of a config."""
    from converters.bridge import AutoBridge

    bridge = AutoBridge.from_hf_config(config)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.topology = topology
    for name, value in fields.items():
        setattr(provider, name, value)
    provider.pad_query_groups()
    provider.finalize()
    return bridge, provider


def told_back(config: dict[str, Any], topology: Topology, **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The Hugging Face fields that went into a provider, and those that come out of it."""
    from converters.megatron.translate import fields_of

    bridge, provider = provider_of(config, topology, **fields)
    found = bridge.family.fields.to_hf(*fields_of(provider)).hf
    return {name: value for name, value in bridge.ledger.hf.items() if value is not None}, dict(found)


def refused(config: dict[str, Any], **fields: Any) -> str:
    """What is said of a provider that was changed after it was finalised."""
    from converters.errors import ConfigError
    from converters.megatron.translate import fields_of

    bridge, provider = provider_of(config, Topology())
    for name, value in fields.items():
        setattr(provider, name, value)
    try:
        bridge.family.fields.to_hf(*fields_of(provider))
    except ConfigError as error:
        return str(error)
    return "no error"


def config_bytes(folder: Path, **fields: Any) -> bytes:
    """The config.json of an export."""
    from converters.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider(load_weights=False)
    for name, value in fields.items():
        setattr(provider, name, value)
    provider.finalize()
    return bridge.hf_config(provider)


def from_transformers_config() -> dict[str, Any]:
    """The provider of a `LlamaConfig` object, in a few fields."""
    from transformers import LlamaConfig

    from converters.bridge import AutoBridge

    rope = {"rope_type": "llama3", "rope_theta": 4321.0, "factor": 3.0, "low_freq_factor": 1.5}
    rope |= {"high_freq_factor": 5.0, "original_max_position_embeddings": 24}
    made = LlamaConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, rope_parameters=rope)
    assert not AutoBridge.supports(made)  # it names no architecture, and is a Llama's by its class
    provider = AutoBridge.from_hf_config(made).to_megatron_provider(load_weights=False)
    names = ("rotary_base", "rope_scaling", "rope_scaling_factor", "rope_low_freq_factor", "num_query_groups")
    return {name: getattr(provider, name) for name in names}
