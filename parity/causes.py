"""The causes that a failure can have: what diagnosis names, and what an injected fault is known to be."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

KINDS = (
    "keys exchanged",
    "layers moved",
    "duplicated",
    "untied",
    "rows permuted",
    "columns permuted",
    "transposed",
    "zeros",
    "initial values",
    "ones",
    "offset",
    "rounded",
    "truncated",
    "rows shifted",
    "rows exchanged",
    "padding",
    "not numbers",
    "missing tensors",
    "extra tensors",
    "shape",
    "dtype",
    "config",
    "files",
    "unreadable",
    "computation",
    "quantisation",
    "reference",
    "ranks",
    "unexplained",
)

_PREFIX = re.compile(r"^(model\.)?(layers\.\d+\.)?(self_attn\.|mlp\.)?")
_ROPE = re.compile(r"^rope_(parameters|scaling)\.")


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One reason why something differs; every field is JSON-able.

    Args:
        kind: One of `KINDS`.
        what: Short names of tensors (`short`), config fields (`field_name`), files, or sub-modules; sorted where their
            order says nothing.
        where: Layers, rows, ranks.
        detail: How.
    """

    kind: str
    what: tuple[str, ...] = ()
    where: str = ""
    detail: str = ""

    def __post_init__(self) -> None:
        assert self.kind in KINDS, f"no cause is called {self.kind!r}"

    def __str__(self) -> str:
        names = " and ".join([", ".join(self.what[:-1]), self.what[-1]] if len(self.what) > 1 else self.what)
        said = {
            "keys exchanged": f"{names} are exchanged",
            "layers moved": f"layers moved{f': {names}' * bool(names)}",
            "duplicated": f"{self.what[0] if self.what else ''} holds a second copy of {' '.join(self.what[1:])}",
            "zeros": f"{names}: zeros",
            "initial values": f"{names}: left at initial values",
            "config": f"config: {names}",
        }.get(self.kind, f"{names}: {self.kind}" if names else self.kind)
        return said + f", in {self.where}" * bool(self.where) + f": {self.detail}" * bool(self.detail)

    def names(self, other: Cause) -> bool:
        """Whether this cause names the same fault as `other`: kind and subjects; a fault without subjects takes any."""
        mine, its = ({short(field_name(name)) for name in cause.what} for cause in (self, other))
        return self.kind == other.kind and (not its or mine == its)

    def as_json(self) -> dict[str, Any]:
        """The fields; `from_json` is the way back."""
        return {**asdict(self), "what": list(self.what)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Cause:
        """What `as_json` gave."""
        return cls(**{**value, "what": tuple(value["what"])})


def short(key: str) -> str:
    """A tensor's name in a cause: `model.layers.3.self_attn.k_proj.weight` is `k_proj`, its bias `k_proj.bias`."""
    return _PREFIX.sub("", key).removesuffix(".weight")


def shorts(keys: Iterable[str]) -> tuple[str, ...]:
    """The names of several tensors, each once, sorted; a weight's name stands for its bias as well."""
    names = {short(key) for key in keys}
    return tuple(sorted(name for name in names if name.removesuffix(".bias") == name or name[:-5] not in names))


def field_name(path: str) -> str:
    """A config field in a cause: `rope_parameters.factor` and `rope_scaling.factor` are `rope_scaling.factor`."""
    name = _ROPE.sub("rope_scaling.", path)
    return {"rope_scaling.rope_theta": "rope_theta", "rope_scaling.type": "rope_scaling.rope_type"}.get(
        name, "dtype" if name == "torch_dtype" else name
    )
