"""What rows of the fault catalogue are written in: names of tensors, directions, and causes."""

from __future__ import annotations

from parity.causes import Cause
from parity.faults.catalogue import At

Q, K, V, O = (f"self_attn.{name}_proj" for name in "qkvo")  # noqa: E741  # that is its name
GATE, UP, DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
NORM, NORM2, LAST_NORM = "input_layernorm", "post_attention_layernorm", "model.norm"
EMBED, HEAD = "model.embed_tokens", "lm_head"
LINEARS = (Q, K, V, O, GATE, UP, DOWN)
NORMS = (NORM, NORM2, LAST_NORM)
WAYS: tuple[At, ...] = ("import", "export")
IMPORT: tuple[At, ...] = ("import",)
EXPORT: tuple[At, ...] = ("export",)


def exchanged(*names: str) -> tuple[Cause, ...]:
    return (Cause(kind="keys exchanged", what=tuple(sorted(names))),)


def rows(*names: str) -> tuple[Cause, ...]:
    return (Cause(kind="rows permuted", what=tuple(sorted(names))),)


def columns(*names: str) -> tuple[Cause, ...]:
    return (Cause(kind="columns permuted", what=tuple(sorted(names))),)


def of_kind(kind: str, *names: str) -> tuple[Cause, ...]:
    return (Cause(kind=kind, what=tuple(sorted(names))),)


MOVED = (Cause(kind="layers moved"),)
GROUPED, CONTIGUOUS = "(group [(rep q) k v] dim)", "[(group rep q dim) (group k dim) (group v dim)]"
HALVES, PAIRS = "(head half pair)", "(head pair half)"
K_HALVES, K_PAIRS = "(group half pair)", "(group pair half)"
