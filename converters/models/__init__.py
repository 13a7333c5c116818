"""The model families: for each one table of weights and one table of config fields."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from converters.dialect import Dialect
from converters.errors import ConfigError, near
from converters.fields import FieldTable
from converters.models import llama, llama_fields
from converters.plan import Plan, Side
from converters.table import Table


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: its weights and its config, both as tables, and the columns whose config is a dialect."""

    name: str
    architecture: str
    table: Table
    fields: FieldTable
    dialects: tuple[Dialect, ...] = ()

    def dialect_of(self, config: Mapping[str, Any]) -> Dialect | None:
        """The dialect that a `config.json` is in, or `None` where it is Hugging Face's own."""
        return next((dialect for dialect in self.dialects if dialect.speaks(config)), None)

    def dialect(self, column: str) -> Dialect | None:
        """The dialect of a column's `config.json`, or `None` where it is Hugging Face's own."""
        return next((dialect for dialect in self.dialects if dialect.column == column), None)

    def hf_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The Hugging Face config of a model, from a `config.json` in any column.

        Raises:
            ConfigError: A field of the dialect that has a value which it cannot have.
        """
        dialect = self.dialect_of(config)
        return dict(config) if dialect is None else dialect.hf_config(config)

    def stored(self, column: str, keys: Collection[str], *, tied: bool) -> frozenset[str]:
        """Features of what a checkpoint stores beyond the model: a copy of a tied head, rotary buffers.

        Args:
            column: The checkpoint's.
            keys: Of its tensors.
            tied: Whether the model has no head of its own.
        """
        found = {"stored_lm_head"} if tied and "lm_head.weight" in keys else set()
        if column == "te":
            return frozenset(found | ({"stored_te_inv_freq"} if "model.rotary_emb.inv_freq" in keys else set()))
        rotary = any(key.endswith("rotary_emb.inv_freq") for key in keys)
        return frozenset(found | ({"stored_inv_freq"} if rotary else set()))

    def plan(
        self,
        source: str,
        target: str,
        config: Mapping[str, Any],
        *,
        padded_vocab_size: int | None = None,
        padded_query_groups: int | None = None,
        unpadded: Side | None = None,
        features: frozenset[str] = frozenset(),
    ) -> Plan:
        """The plan between two columns for the model that `config` (a `config.json`) describes.

        Args:
            source: A column of the table.
            target: A column of the table.
            config: The config, of any column.
            padded_vocab_size: Rows of the embedding of Megatron or TE over all ranks; by default no padding.
            padded_query_groups: Their key-value groups, with groups of zeros; by default none.
            unpadded: The side that has none of this padding: a folder, of a model that is padded in memory.
            features: Features beyond those that the config switches on (what a checkpoint stores besides).

        Raises:
            ConfigError: The config does not translate.
            LayoutError: Its sizes contradict each other.
        """
        hf, _ = self.fields.read(self.hf_config(config))
        quantities = self.fields.quantities(hf) | {
            "padded_vocab_size": padded_vocab_size or hf["vocab_size"],
            "padded_query_groups": padded_query_groups or hf["num_key_value_heads"],
        }
        sizes = self.table.solve({name: quantities[name] for name in self.table.sizes})
        on = {name for name in self.table.features if hf.get(name) is True}
        plan = self.table.plan(source, target, sizes=sizes, features=features | on)
        if unpadded is None:
            return plan
        plain = {"padded_vocab_size": hf["vocab_size"], "padded_query_groups": hf["num_key_value_heads"]}
        bare = self.table.solve({name: {**quantities, **plain}[name] for name in self.table.sizes})
        padding = {axis: size for axis, size in bare.items() if size != sizes[axis]}
        source_padding, target_padding = (padding, {}) if unpadded == "source" else ({}, padding)
        return replace(plan, source_padding=source_padding, target_padding=target_padding)


FAMILIES = (
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        table=llama.TABLE,
        fields=llama_fields.FIELDS,
        dialects=(llama_fields.TE,),
    ),
)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a `config.json` names.

    Raises:
        ConfigError: It names none that is known.
    """
    name = config.get("model_type")
    for family in FAMILIES:
        if family.name == name or family.dialect_of(config) is not None:
            return family
    known = [family.name for family in FAMILIES]
    raise ConfigError(f"model_type={name!r} is not supported{near(str(name), known)}; supported: {', '.join(known)}")


def column_of(config: Mapping[str, Any]) -> str:
    """The column that a folder with this `config.json` is in: `hf`, or that of a dialect.

    Raises:
        ConfigError: It names no family that is known.
    """
    dialect = family_of(config).dialect_of(config)
    return "hf" if dialect is None else dialect.column


def require_hf(config: Mapping[str, Any]) -> None:
    """Refuse the `config.json` of another column where only Hugging Face's will do; one of no family passes.

    Raises:
        ConfigError: It is in another column.
    """
    dialect = next((found for family in FAMILIES if (found := family.dialect_of(config))), None)
    if dialect is not None:
        raise ConfigError(
            f"the checkpoint is in the {dialect.column!r} column (model_type={config.get('model_type')!r}), expected "
            "Hugging Face's; convert it first: python -m converters convert --to hf SOURCE TARGET"
        )
