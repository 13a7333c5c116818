"""A ledger's Megatron fields to a provider and back: plain data there, torch objects here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from converters.errors import ConfigError
from converters.megatron.provider import GPTModelProvider

ACTIVATIONS = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}


def provider_for(fields: Mapping[str, Any]) -> GPTModelProvider:
    """The provider with the fields of a ledger (`Ledger.megatron`), not yet finalised."""
    values = dict(fields)
    values["activation_func"] = ACTIVATIONS[values["activation_func"]]
    values["params_dtype"] = getattr(torch, values["params_dtype"])
    # `finalize` sets the flags from the dtype, so that a user who changes the dtype need not know of them.
    del values["bf16"], values["fp16"]
    values["seq_length"] = values["max_position_embeddings"]
    return GPTModelProvider(**values)


def fields_of(provider: GPTModelProvider) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every field of a provider as plain data, and what each would be in one that says nothing but its sizes.

    Megatron-Core fills fields in when a config is finalised, so the defaults are those of a finalised config too.

    Raises:
        ConfigError: An activation that has no name here.
    """
    sizes = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "num_query_groups", "ffn_hidden_size")
    # (`num_query_groups` with its ghosts, as in the provider: both sides lose them below.)
    mesh = [f.name for f in dataclasses.fields(provider) if "parallel" in f.name or "_pipeline_" in f.name]
    named = (*sizes, "kv_channels", "ghost_query_groups", *mesh)
    plain = GPTModelProvider(**{name: getattr(provider, name) for name in named})
    plain.params_dtype, plain.bf16, plain.fp16 = provider.params_dtype, provider.bf16, provider.fp16
    plain.finalize()
    return _plain(provider), _plain(plain)


def _plain(provider: GPTModelProvider) -> dict[str, Any]:
    values = {field.name: getattr(provider, field.name) for field in dataclasses.fields(provider)}
    # The ghosts are no part of the model.
    per_group = provider.num_attention_heads // provider.num_query_groups
    values["num_query_groups"] -= provider.ghost_query_groups
    values["num_attention_heads"] -= provider.ghost_query_groups * per_group
    name = next((name for name, function in ACTIVATIONS.items() if function is values["activation_func"]), None)
    if name is None:
        if provider.gated_linear_unit:
            raise ConfigError(
                f"activation_func={values['activation_func']!r} has no name in a Hugging Face config; "
                f"those that have: {', '.join(ACTIVATIONS)}"
            )
        name = repr(values["activation_func"])
    values["activation_func"] = name
    values["params_dtype"] = str(values["params_dtype"]).removeprefix("torch.")
    return values
