"""What goes wrong in a conversion: every message says what was expected, what was found, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConversionError(Exception):
    """The root of every error that this package raises on purpose."""


class LayoutError(ConversionError):
    """A layout expression that does not parse, or that a size or a mesh does not fit."""


class TableError(ConversionError):
    """Two columns of a table that do not describe the same elements."""


class TopologyError(ConversionError):
    """A parallel layout that the model, or Megatron-Core, cannot have."""


class PlanError(ConversionError):
    """A plan that does not move every element exactly once."""


class ConfigError(ConversionError):
    """A config field that has no counterpart, or whose value has none."""


class CheckpointError(ConversionError):
    """Files or tensors that are not what the config or the index promises."""


class SourceError(ConversionError):
    """A model name that leads to no checkpoint."""


class CacheError(ConversionError):
    """A key-value cache that does not fit what is to be stored in it, or that is used out of order."""


def near(name: str, known: Iterable[str], limit: int = 3) -> str:
    """The names in `known` closest to `name`, as ` (did you mean ...?)`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=limit, cutoff=0.6)
    return f" (did you mean {' or '.join(repr(c) for c in close)}?)" if close else ""


def listing(title: str, names: Iterable[str], limit: int = 20) -> str:
    """`title`, then the sorted names one a line, the rest of a long list as a count."""
    ordered = sorted(names)
    lines = [f"  {name}" for name in ordered[:limit]]
    if len(ordered) > limit:
        lines.append(f"  ... and {len(ordered) - limit} more")
    return "\n".join([f"{title} ({len(ordered)}):", *lines])
