"""A checkpoint folder as the rules see it: every file is read at most once, and what cannot be read says why."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.errors import CheckpointError, ConfigError, ConversionError
from converters.models import Family, column_of, family_of
from converters.plan import Plan

if TYPE_CHECKING:
    from converters.files.safetensors import SafetensorsFiles
    from converters.tensors import TensorInfo
    from parity.lint.scan import Scan

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ROPE_NEW, ROPE_OLD = "rope_parameters", ("rope_scaling", "rope_theta")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
LARGE, LARGEST = 1 << 40, {"num_hidden_layers": 10_000}
"""Sizes beyond which a config is damaged, and planning the model would not end."""
Json = dict[str, Any]


class Unavailable(Exception):
    """What a rule needs cannot be had; another rule says what is wrong, or the reason is in the message."""


class Folder:
    """A folder to lint.

    Args:
        path: An existing folder.
        weights: Whether the values of the tensors may be read, besides their headers.
        loading: Whether transformers may be asked, in a process of its own.
    """

    def __init__(self, path: Path, *, weights: bool = True, loading: bool = True) -> None:
        self.path, self.weights, self.loading = path, weights, loading
        self._parsed: dict[str, Any] = {}

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self.path / name).is_file()

    def text(self, name: str) -> str:
        """The text of a file.

        Raises:
            Unavailable: It is not there, or not text.
        """
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Unavailable(f"{name} cannot be read: {error}") from error

    def parsed(self, name: str) -> Any:
        """What a JSON file holds.

        Raises:
            Unavailable: It is not there, or is no JSON.
        """
        if name not in self._parsed:
            try:
                self._parsed[name] = json.loads(self.text(name))
            except (ValueError, RecursionError) as error:
                self._parsed[name] = Unavailable(f"{name} is no JSON: {error}")
        found = self._parsed[name]
        if isinstance(found, Unavailable):
            raise found
        return found

    def object(self, name: str) -> Json | None:
        """The object in a JSON file, `None` where there is no such file.

        Raises:
            Unavailable: It is no JSON object.
        """
        if not self.has(name):
            return None
        found = self.parsed(name)
        if not isinstance(found, dict):
            raise Unavailable(f"{name} holds no JSON object")
        return found

    @cached_property
    def entries(self) -> tuple[Path, ...]:
        """Everything below the folder, relative to it; links are not followed."""

        def below(at: Path) -> Iterator[Path]:
            for path in sorted(at.iterdir()):
                yield path.relative_to(self.path)
                if path.is_dir() and not path.is_symlink():
                    yield from below(path)

        return tuple(below(self.path))

    @cached_property
    def config(self) -> Json:
        """The object in config.json."""
        found = self.object("config.json")
        if found is None:
            raise Unavailable("there is no config.json")
        return found

    @property
    def quantized(self) -> bool:
        """Whether the weights are quantised, so that what is stored is not what the model has."""
        return self.config.get("quantization_config") is not None

    @cached_property
    def family(self) -> Family:
        """The model family."""
        try:
            return family_of(self.config)
        except ConversionError as error:
            raise Unavailable(str(error)) from error

    @cached_property
    def column(self) -> str:
        """The column that the folder is in."""
        try:
            return column_of(self.config)
        except ConversionError as error:
            raise Unavailable(str(error)) from error

    @cached_property
    def hf(self) -> Json:
        """The fields of the config by name, absent ones at their defaults, in whichever spelling they stand."""
        config = {name: value for name, value in self.config.items() if name != "quantization_config"}
        if isinstance(config.get(ROPE_NEW), dict) and any(config.get(name) is not None for name in ROPE_OLD):
            # Two spellings that disagree are a matter of their own.
            config = {name: value for name, value in config.items() if name not in ROPE_OLD}
        if config.get("dtype") and config.get("torch_dtype"):
            del config["torch_dtype"]
        try:
            return self.family.fields.read(self.family.hf_config(config))[0]
        except ConversionError as error:
            raise Unavailable(f"config.json does not translate (rule config-fields): {error}") from error

    @cached_property
    def files(self) -> SafetensorsFiles:
        """The weights, their index and headers checked.

        Raises:
            CheckpointError: They cannot be trusted.
        """
        from converters.files.safetensors import SafetensorsFiles

        try:
            quantized = self.quantized
        except Unavailable:
            quantized = False
        return SafetensorsFiles(self.path, quantized=quantized)

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every tensor."""
        try:
            return self.files.tensors()
        except CheckpointError as error:
            raise Unavailable("the weight files cannot be trusted (rule weight-files)") from error

    def planned(self, stored: frozenset[str] = frozenset()) -> Plan:
        """The plan from this folder's column, from its config alone.

        Args:
            stored: Features of what is stored beyond the model.

        Raises:
            ConversionError: The config gives no sizes, or some that no model has.
        """
        sizes = self.family.fields.quantities(self.hf)
        large = [f"{name}={size}" for name, size in sizes.items() if size > LARGEST.get(name, LARGE)]
        if large:
            raise ConfigError(f"sizes that no model has: {', '.join(large)}")
        # Without the fields that may be spelled twice: no tensor's shape depends on them.
        doubled = (ROPE_NEW, *ROPE_OLD, "dtype", "torch_dtype")
        config = {name: value for name, value in self.config.items() if name not in doubled}
        return self.family.plan(self.column, "megatron", config, features=stored)

    @cached_property
    def plan(self) -> Plan:
        """The plan from this folder's column, which knows every tensor that its config promises."""
        if self.quantized:
            raise Unavailable("the weights are quantised: what is stored is not what the model has")
        tied = bool(self.hf["tie_word_embeddings"])
        stored = self.family.stored(self.column, self.tensors.keys(), tied=tied)
        try:
            return self.planned(stored)
        except ConversionError as error:
            raise Unavailable(f"the config gives no sizes (rule config-fields): {error}") from error

    @cached_property
    def named(self) -> Mapping[str, str]:
        """The rule of the family's table that each tensor is of, by key: `attention norm`, `embedding`."""
        return {copy.source.key: copy.rule for copy in self.plan.copies if copy.kind == "move"}

    @cached_property
    def scan(self) -> Scan:
        """What the values of the tensors say.

        Raises:
            Unavailable: They may not be read.
        """
        from parity.lint.scan import scan

        if not self.weights:
            raise Unavailable("--no-weights")
        _ = self.tensors
        return scan(self.files, (EMBEDDING, HEAD))

    @cached_property
    def tokens(self) -> dict[str, int]:
        """The id of every token, added ones included.

        Raises:
            Unavailable: There is no tokenizer.json, or none that has a vocabulary.
        """
        tokenizer = self.object("tokenizer.json")
        if tokenizer is None:
            kind = "only others" if any(self.has(name) for name in TOKENIZERS) else "none at all"
            raise Unavailable(f"there is no tokenizer.json ({kind}): no token ids to look at")
        try:
            vocab = tokenizer["model"]["vocab"]
            found = dict(vocab) if isinstance(vocab, dict) else {piece[0]: at for at, piece in enumerate(vocab)}
            found |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
            found |= self.object("added_tokens.json") or {}
            settings = self.object("tokenizer_config.json") or {}
            decoder = settings.get("added_tokens_decoder") or {}
            found |= {token["content"]: int(index) for index, token in decoder.items()}
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise Unavailable(f"tokenizer.json has no vocabulary that can be read: {error!r}") from error
        if not found or not all(isinstance(index, int) for index in found.values()):
            raise Unavailable("tokenizer.json has no vocabulary whose ids are numbers")
        return found
