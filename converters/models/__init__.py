"""The model families: for each one table of weights and one table of config fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converters.errors import ConfigError, near
from converters.fields import FieldTable
from converters.models import llama, llama_fields
from converters.plan import Plan
from converters.table import Table


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: its weights and its config, both as tables."""

    name: str
    architecture: str
    table: Table
    fields: FieldTable

    def plan(
        self,
        source: str,
        target: str,
        config: Mapping[str, Any],
        *,
        padded_vocab_size: int | None = None,
        padded_query_groups: int | None = None,
        features: frozenset[str] = frozenset(),
    ) -> Plan:
        """The plan between two columns for the model that `config` (a `config.json`) describes.

        Args:
            source: A column of the table.
            target: A column of the table.
            config: The Hugging Face config.
            padded_vocab_size: Rows of Megatron's embedding over all ranks; by default no padding.
            padded_query_groups: Megatron's key-value groups, with groups of zeros; by default none.
            features: Features beyond those that the config switches on (what a checkpoint stores besides).

        Raises:
            ConfigError: The config does not translate.
            LayoutError: Its sizes contradict each other.
        """
        hf, _ = self.fields.read(config)
        quantities = self.fields.quantities(hf) | {
            "padded_vocab_size": padded_vocab_size or hf["vocab_size"],
            "padded_query_groups": padded_query_groups or hf["num_key_value_heads"],
        }
        known = {name: quantities[name] for name in self.table.sizes}
        on = {name for name in self.table.features if hf.get(name) is True}
        return self.table.plan(source, target, sizes=self.table.solve(known), features=features | on)


FAMILIES = (Family(name="llama", architecture="LlamaForCausalLM", table=llama.TABLE, fields=llama_fields.FIELDS),)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a `config.json` names.

    Raises:
        ConfigError: It names none that is known.
    """
    name = config.get("model_type")
    for family in FAMILIES:
        if family.name == name:
            return family
    known = [family.name for family in FAMILIES]
    raise ConfigError(f"model_type={name!r} is not supported{near(str(name), known)}; supported: {', '.join(known)}")
