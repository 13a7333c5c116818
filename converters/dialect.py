"""A dialect: the config of a Hugging Face model under another class name, with a few fields of its own.

The config stays `config.json` of the same family; what makes the dialect is its `model_type`, the names of its classes,
and fields that say how the model runs. Translation edits the text where it must and nowhere else, so that the way there
and back returns the very bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from converters.errors import ConfigError, listing, near

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Option:
    """A field that only the dialect has: how the model runs, and no part of what a conversion has to keep.

    Attributes:
        name: Its name in `config.json`.
        default: What an absent one means.
        values: What it may be.
        by_layer: It may also be a list of such values, one a layer.
        why: Why the Hugging Face config has no counterpart.
    """

    name: str
    default: Any
    values: tuple[Any, ...]
    by_layer: bool = False
    why: str

    def fault(self, value: Any, layers: int | None) -> str | None:
        """What is wrong with a value, for a model of so many layers (`None`: not known)."""
        allowed = ", ".join(map(repr, self.values))
        if self.by_layer and isinstance(value, list):
            if layers is not None and len(value) != layers:
                return f"{self.name} has {len(value)} entries, expected one for each of {layers} layers"
            wrong = [entry for entry in value if not self._holds(entry)]
            return f"{self.name} has {wrong[0]!r} in it, expected each of {allowed}" if wrong else None
        if self.by_layer and value is not None:
            return f"{self.name}={value!r}, expected a list with one of {allowed} a layer, or null"
        return None if self._holds(value) else f"{self.name}={value!r}, expected one of {allowed}"

    def _holds(self, value: Any) -> bool:
        return any(type(value) is type(known) and value == known for known in self.values)


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """What tells the configs of a column from those of Hugging Face's own classes.

    Attributes:
        column: The column of the weights' table.
        model_type: Of its configs; `known_as` on the Hugging Face side. Other writers may leave that one in place, and
            are told by their classes or by an option.
        known_as: The `model_type` of the family.
        prefix: Before the name of each class: `NV` makes `NVLlamaForCausalLM` of `LlamaForCausalLM`.
        options: The fields of its own.
        only: Values that the model can have, by Hugging Face field, where it cannot have all.
    """

    column: str
    model_type: str
    known_as: str
    prefix: str
    options: tuple[Option, ...]
    only: Mapping[str, tuple[Any, ...]]

    def speaks(self, config: Config) -> bool:
        """Whether a config is of this dialect."""
        if config.get("model_type") == self.model_type:
            return True
        named = config.get("architectures")
        classes = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
        own = any(name.lower().startswith(self.model_type) for name in classes)
        return config.get("model_type") == self.known_as and (own or any(o.name in config for o in self.options))

    def read(self, config: Config) -> dict[str, Any]:
        """The options of a config, absent ones at their defaults.

        Raises:
            ConfigError: A value that an option cannot have; all of them.
        """
        found = {option.name: config.get(option.name, option.default) for option in self.options}
        layers = config.get("num_hidden_layers")
        faults = [fault for option in self.options if (fault := option.fault(found[option.name], layers))]
        if faults:
            raise ConfigError(listing(f"config of a {self.model_type} model", faults))
        return found

    def hf_config(self, config: Config) -> dict[str, Any]:
        """The Hugging Face config of the same model.

        Raises:
            ConfigError: As `read`.
        """
        self.read(config)
        return dict(json.loads(self.to_hf(json.dumps(config))))

    def to_hf(self, text: str) -> str:
        """The text of the Hugging Face `config.json`, from that of the dialect."""
        own = {option.name for option in self.options}
        cuts = []
        for member in _members(text):
            if member.name in own or (member.name == "auto_map" and self._names_only_own(json.loads(member.of(text)))):
                cuts.append((member.start, member.end, ""))
            elif member.name == "model_type":
                cuts.append((member.value, member.end, json.dumps(self.known_as)))
            elif member.name == "architectures":
                cuts.append((member.value, member.end, re.sub(f'"{self.prefix}(?=[A-Z])', '"', member.of(text))))
        return _edited(text, cuts)

    def from_hf(self, text: str, **options: Any) -> str:
        """The text of the dialect's `config.json`, from that of Hugging Face; the options are written out in full.

        Raises:
            ConfigError: An unknown option, a value that it cannot have, or a model that the dialect cannot be.
        """
        known = [option.name for option in self.options]
        unknown = [name + near(name, known) for name in options if name not in known]
        if unknown:
            raise ConfigError(listing(f"no options of a {self.model_type} model", unknown))
        config = json.loads(text)
        found = self.read({**config, **options})
        edits = []
        members = list(_members(text))
        for member in members:
            if member.name == "model_type":
                edits.append((member.value, member.end, json.dumps(self.model_type)))
            elif member.name == "architectures":
                edits.append((member.value, member.end, re.sub(r'"(?=[A-Z])', f'"{self.prefix}', member.of(text))))
        last = members[-1]
        gap = re.match(r"\s*", text[last.start :].lstrip(","))
        assert gap is not None
        added = "".join(f",{gap[0]}{json.dumps(name)}: {json.dumps(value)}" for name, value in found.items())
        return _edited(text, [*edits, (last.end, last.end, added)])

    def check(self, hf: Config) -> None:
        """Refuse a model that the dialect's classes cannot be.

        Args:
            hf: Its Hugging Face fields by the names of the family's table.

        Raises:
            ConfigError: A value that they cannot have; all of them.
        """
        faults = [
            f"{name}={hf[name]!r}, where only {' or '.join(map(repr, allowed))} is supported"
            for name, allowed in self.only.items()
            if hf.get(name) not in allowed
        ]
        if faults:
            raise ConfigError(listing(f"a {self.model_type} model cannot have", faults))

    def _names_only_own(self, classes: Any) -> bool:
        names = list(classes.values()) if isinstance(classes, dict) else [None]
        own = re.compile(rf"(.*\.)?{self.prefix}[A-Z]\w*")
        return all(isinstance(name, str) and own.fullmatch(name) is not None for name in names)


@dataclass(frozen=True)
class _Member:
    """One member of a JSON object: from the comma (or brace) before it, its value, and the end of that."""

    name: str
    start: int
    value: int
    end: int

    def of(self, text: str) -> str:
        return text[self.value : self.end]


def _members(text: str) -> Iterator[_Member]:
    """The members of the object that `text` is, which has been read as JSON before."""
    decoder = json.JSONDecoder()
    at = text.index("{") + 1
    first = True
    while True:
        start = at
        at = _after(text, at)
        if text[at] == "}":
            return
        if not first:
            at = _after(text, at + 1)  # the comma
        name, at = decoder.raw_decode(text, at)
        at = _after(text, _after(text, at) + 1)  # the colon
        value = at
        _, at = decoder.raw_decode(text, at)
        # What is before the first member stays where it is, or a cut would leave a comma behind the brace.
        yield _Member(name, start, value, at)
        first = False


def _after(text: str, at: int) -> int:
    """The first position from `at` that is no white space."""
    while text[at].isspace():
        at += 1
    return at


def _edited(text: str, edits: list[tuple[int, int, str]]) -> str:
    """`text` with each part `[start, end)` replaced."""
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    # The first member was cut: so must be the comma of the one that is first now.
    return re.sub(r"^(\s*\{)\s*,", r"\1", text)
