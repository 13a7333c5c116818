"""A checkpoint folder in the column that it is in: its config, its tensors, and its plan to every other column."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, ConfigError
from converters.execute import Only, Store, TensorInfo
from converters.models import Family, column_of, family_of
from converters.plan import Plan
from converters.rows import Entry
from converters.sources import Source, resolve
from converters.stores.safetensors import SafetensorsFolder

EXTRA_STATE = "_extra_state"


class Checkpoint:
    """A folder of safetensors weights.

    Args:
        source: Where it was found.
        column: The column that it must be in; by default the one that its config names.

    Raises:
        ConfigError: Another column than `column`, or a config that no column knows.
        CheckpointError: Files that cannot be trusted.
    """

    def __init__(self, source: Source, *, column: str | None = None) -> None:
        if source.folder is None:
            raise CheckpointError(f"{source.name}: only a config is known, there are no weights to convert")
        self.source, self.folder = source, source.folder
        self.family: Family = family_of(source.config)
        self.column = column_of(source.config)
        if column not in (None, self.column):
            raise ConfigError(f"{source.name} is in the {self.column!r} column, expected {column!r}")
        self.config: dict[str, Any] = self.family.hf_config(source.config)
        hf, dropped = self.family.fields.check(self.config)
        self.hf: Mapping[str, Any] = hf
        self.dropped: tuple[Entry, ...] = dropped
        self.files = SafetensorsFolder(self.folder)

    @classmethod
    def open(cls, path: str | Path, *, column: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
        """The checkpoint in a folder, or of a hub id.

        Raises:
            SourceError: No such model, or no safetensors weights.
            ConfigError: As the class.
            CheckpointError: As the class.
        """
        return cls(resolve(str(path), trust_remote_code=trust_remote_code), column=column)

    @cached_property
    def weights(self) -> Store:
        """The tensors, without the states of quantisation that Transformer Engine keeps beside weights."""
        return Only(self.files, [key for key in self.files.tensors() if key not in set(self.extra_states)])

    @cached_property
    def extra_states(self) -> tuple[str, ...]:
        """Names of the states of quantisation: amax histories and scales of a run, no weights."""
        if self.column != "te":
            return ()
        return tuple(key for key in self.files.tensors() if key.rpartition(".")[2].startswith(EXTRA_STATE))

    @cached_property
    def stored(self) -> frozenset[str]:
        """Features of what it stores beyond the model."""
        return self.family.stored(self.column, self.tensors.keys(), tied=bool(self.hf["tie_word_embeddings"]))

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every weight."""
        return self.weights.tensors()

    def config_text(self, column: str, options: Mapping[str, Any] | None = None) -> str:
        """The text of the same model's config.json in another column, or in this one with other options.

        Args:
            column: `hf`, or that of a dialect.
            options: Fields of the dialect.

        Raises:
            ConfigError: A model that the column cannot have, or an option that it does not know.
        """
        text = (self.folder / "config.json").read_text()
        here, there = self.family.dialect(self.column), self.family.dialect(column)
        if here is not None:
            options = {**(here.read(self.source.config) if there is here else {}), **(options or {})}
            text = here.to_hf(text)
        if there is not None:
            there.check(self.hf)
            return there.from_hf(text, **(options or {}))
        if options:
            raise ConfigError(f"a Hugging Face config has no options, found {', '.join(options)}")
        return text

    def plan(self, column: str, **sizes: Any) -> Plan:
        """The whole plan to another column.

        Args:
            column: Any of the table.
            **sizes: As in `Family.plan`; features are added to those of what is stored.
        """
        features = self.stored | sizes.pop("features", frozenset())
        return self.family.plan(self.column, column, self.config, features=features, **sizes)
