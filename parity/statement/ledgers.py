"""What became of every tensor name and every config field, on both sides; anything that nothing accounts for fails."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from parity.findings import Account, Finding, Measurement

if TYPE_CHECKING:
    from converters.dialect import Dialect
    from converters.fields import FieldTable
    from converters.plan import Plan

Row = dict[str, str]
UNACCOUNTED = "unaccounted"
_CLASSES = {"same": "exact", "renamed": "exact", "derived": "derived", "fixed": "constant", "dropped": "dropped"}


def tensor_rows(
    plans: Sequence[Plan], stored: Iterable[str], held: Iterable[str], side: str = "megatron"
) -> Iterator[Row]:
    """The account of tensor names, layers taken together.

    Args:
        plans: Hugging Face to every model chunk of the backend.
        stored: Keys of the checkpoint.
        held: Names of parameters, over all ranks.
        side: The backend's name.
    """
    there: dict[str, set[str]] = {}
    made: dict[str, set[str]] = {}
    for copy in (copy for plan in plans for copy in plan.copies):
        kind = "shift" if copy.shift else copy.kind
        there.setdefault(_pattern(copy.source.key), set()).add(kind)
        made.setdefault(_pattern(copy.target.key), set()).add(kind)
    for fill in (fill for plan in plans for fill in plan.fills):
        made.setdefault(_pattern(fill.region.key), set()).add("fill")
    drops = {_pattern(key): reason for key, reason in plans[0].drops.items()}
    for name in sorted({_pattern(key) for key in stored} | set(there)):
        if name in drops:
            yield _row(name, "hf", "dropped", drops[name])
        else:
            yield _classed(name, "hf", there.get(name, set()))
    held = {_pattern(name) for name in held}
    for name in sorted(held):
        yield _classed(name, side, made.get(name, set()))
    for name in sorted(set(made) - held):
        yield _row(name, side, UNACCOUNTED, "no rank holds it")


def config_rows(fields: FieldTable, config: Mapping[str, Any], set_: Iterable[str]) -> Iterator[Row]:
    """The account of config fields.

    Args:
        fields: The ledger's table.
        config: `config.json`.
        set_: Megatron-Core's fields that are not at their default.

    Raises:
        ConfigError: The ledger refuses the config.
    """
    from converters.rows import Dropped

    ledger = fields.to_megatron(config)
    there = {name: entry for entry in ledger.entries for name in entry.hf}
    made = {name: entry for entry in ledger.entries for name in entry.megatron}
    spelled = {path: known.name for known in fields.fields for path in known.paths}
    parents = {path.rpartition(".")[0] for path in spelled if "." in path}
    for path in sorted(_leaves(config, parents)):
        entry = there.get(spelled.get(path, path))
        if entry is None:
            yield _row(path, "hf", UNACCOUNTED, "no row of the ledger uses it")
            continue
        became = ", ".join(entry.megatron)
        reason = entry.note or (f"became {became}" if became else "")
        yield _row(path, "hf", _CLASSES[entry.kind], reason)
    dropped = [row for row in fields.rows if isinstance(row, Dropped) and row.side == "megatron"]
    for name in sorted(set(set_) | set(made)):
        entry, row = made.get(name), next((row for row in dropped if row.covers(name)), None)
        if entry is not None:
            of = ", ".join(entry.hf)
            yield _row(name, "megatron", _CLASSES[entry.kind], entry.note or f"from {of}" * bool(of))
        elif row is not None:
            yield _row(name, "megatron", "dropped", row.reason)
        else:
            yield _row(name, "megatron", UNACCOUNTED, "set, and no row of the ledger names it")


def dialect_rows(fields: FieldTable, dialect: Dialect, config: Mapping[str, Any], set_: Iterable[str]) -> Iterator[Row]:
    """The account of config fields where the backend's config is Hugging Face's, under another class name.

    Args:
        fields: The ledger's table, which knows every field of the family.
        dialect: What the other class adds.
        config: `config.json`.
        set_: Fields of the model's config that are not at their default.

    Raises:
        ConfigError: The ledger refuses the config.
    """
    side, ledger = dialect.column, fields.to_megatron(config)
    known = {name for entry in ledger.entries for name in entry.hf}
    spelled = {path: one.name for one in fields.fields for path in one.paths}
    parents = {path.rpartition(".")[0] for path in spelled if "." in path}
    leaves = set(_leaves(config, parents))
    renamed = {"model_type": dialect.model_type, "architectures": f"{dialect.prefix}..."}
    for path in sorted(leaves):
        if spelled.get(path, path) not in known:
            yield _row(path, "hf", UNACCOUNTED, "no row of the ledger uses it")
        elif path in renamed:
            yield _row(path, "hf", "derived", f"became {renamed[path]}")
        else:
            yield _row(path, "hf", "exact", "")
    options = {option.name: option for option in dialect.options}
    for name in sorted({*set_, *options}):
        if name in options:
            yield _row(name, side, "constant", options[name].why)
        elif name in _OF_A_CLASS:
            yield _row(name, side, "derived", _OF_A_CLASS[name])
        elif name in {one.name for one in fields.fields} | parents | leaves:
            yield _row(name, side, "exact", "")
        else:
            yield _row(name, side, UNACCOUNTED, "set, and neither Hugging Face nor the dialect knows it")


_OF_A_CLASS = {
    "model_type": "of the class",
    "architectures": "the names of the classes",
    "dtype": "the precision that was asked for",
    "transformers_version": "of the library that made the object",
    "_name_or_path": "where the object was read from",
}
"""Fields that transformers sets on the object itself."""


def findings(title: str, rows: Sequence[Row]) -> Iterator[Finding]:
    """The account, and whether it is complete."""
    counts = Counter((row["side"], row["class"]) for row in rows)
    detail = "; ".join(f"{side}: {count} {name}" for (side, name), count in sorted(counts.items()))
    lost = [f"{row['side']}: {row['name']}: {row['reason']}" for row in rows if row["class"] == UNACCOUNTED]
    yield Measurement.proved(f"coverage, {title}", count=len(rows), unit="names", unproved=lost, detail=detail)
    yield Account(title=title, rows=rows)


def set_fields(config: Any) -> dict[str, str]:
    """The fields of a Megatron-Core config that were set, in ranks: name to text.

    Megatron-Core fills fields in from others, so the defaults are those of a config of the same sizes, dtype and mesh.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = {"num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "kv_channels"}
    told = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(TransformerConfig)
        if field.name in sizes or "parallel" in field.name or "_pipeline_" in field.name or "dtype" in field.name
    }
    plain = TransformerConfig(**told)
    out = {}
    for field in dataclasses.fields(config):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        default, value = getattr(plain, field.name, default), getattr(config, field.name)
        if value is not default and value != default:
            out[field.name] = repr(value)
    return out


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", name)


def _classed(name: str, side: str, kinds: set[str]) -> Row:
    filled = "with zeros for what Hugging Face does not have" * ("fill" in kinds)
    if "shift" in kinds:
        return _row(name, side, "derived", "shifted by a constant")
    if "move" in kinds:
        return _row(name, side, "exact", filled)
    if kinds & {"tie", "verify"}:
        return _row(name, side, "exact", "a copy of the tied embedding")
    if "fill" in kinds:
        return _row(name, side, "constant", "zeros: Hugging Face has no such tensor")
    return _row(name, side, UNACCOUNTED, "the plan does not know it")


def _row(name: str, side: str, class_: str, reason: str) -> Row:
    return {"name": name, "side": side, "class": class_, "reason": reason}


def _leaves(config: Mapping[str, Any], parents: set[str], prefix: str = "") -> Iterator[str]:
    for name, value in config.items():
        path = prefix + name
        if path in parents and isinstance(value, Mapping):
            yield from _leaves(value, parents, path + ".")
        elif not (path in parents and value is None):
            yield path
