"""In which other order a tensor's rows or columns may have been read or written, in terms of their axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Order = npt.NDArray[np.int64]
"""For each place the place whose content is found there."""
Axes = Sequence[tuple[str, int]]

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Tensors whose rows are one matrix in Megatron-Core."""


def reading(name: str, along: str, order: Order, config: Mapping[str, Any], tp: int) -> str:
    """How the rows or columns of one tensor came into `order`: the plainest explanation, as text.

    Args:
        name: Short name of the tensor.
        along: `rows` or `columns`.
        order: -1 where the source is unknown.
        config: The HF config.
        tp: Tensor-parallel ranks.
    """
    if shards := shards_of(order, tp):
        return f"tp shards in another order: {shards}"
    for axes in _axes(name.removesuffix(".bias"), along, len(order), config, tp):
        if found := _among(axes, order):
            return found
    return _blocks(order)


def joint_reading(names: Sequence[str], order: Order, config: Mapping[str, Any], tp: int) -> str:
    """How the rows of fused tensors, one behind the other, came into `order`; empty where nothing explains it."""
    if len(names) == 2:
        rows = len(order) // 2
        for axes in ([("branch", 2), ("ffn", rows)], [("branch", 2), ("tp", tp), ("ffn", rows // tp)]):
            if math.prod(size for _, size in axes) == len(order) and (found := _among(axes, order)):
                return found
        return ""
    groups, rep, dim = _heads(config)
    layouts = _qkv(groups, rep, dim, tp)
    if len(order) != groups * (rep + 2) * dim:
        return ""
    (stated, right), *others = layouts.items()
    for other, wrong in others:
        for verb, place, content in (("written", right, wrong), ("read", wrong, right)):
            candidate = np.empty_like(order)
            candidate[place] = content
            if _fits(candidate, order):
                return f"{stated} {verb} as {other}"
    return ""


def shards_of(order: Order, tp: int) -> list[int]:
    """Which tensor-parallel shard each shard holds, where whole ones moved; the last may be padded."""
    share = -(-len(order) // tp)
    places = np.arange(len(order))
    out = []
    for rank in range(tp):
        mine = (places // share == rank) & (order >= 0)
        sources = np.unique(order[mine] // share)
        if len(sources) != 1 or (order[mine] % share != places[mine] % share).any():
            return []
        out.append(int(sources[0]))
    return out if out != list(range(tp)) else []


def shift_of(order: Order) -> int | None:
    """By how many places everything moved, where it did."""
    known = np.flatnonzero((order >= 0) & (order != np.arange(len(order))))
    steps = np.unique((known - order[known]) % len(order)) if len(known) > 2 else np.array([])
    step = int(steps[0]) if len(steps) == 1 else 0
    return None if not step else step if 2 * step <= len(order) else step - len(order)


def exchanged(order: Order) -> tuple[int, int] | None:
    """The two places whose contents are exchanged, where that is all."""
    moved = np.flatnonzero(order != np.arange(len(order)))
    if len(moved) != 2 or list(order[moved]) != list(moved[::-1]):
        return None
    return int(moved[0]), int(moved[1])


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Key-value groups, query heads of each, head_dim."""
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    return groups, heads // groups, config.get("head_dim") or config["hidden_size"] // heads


def _axes(name: str, along: str, count: int, config: Mapping[str, Any], tp: int) -> Iterator[Axes]:
    """The ways to see `count` rows or columns as axes, the coarsest first."""
    groups, rep, dim = _heads(config)
    if count % tp == 0:
        yield [("tp", tp), ("rest", count // tp)]
    if (name == "q_proj" and along == "rows") or (name == "o_proj" and along == "columns"):
        yield [("group", groups), ("rep", rep), ("dim", dim)]
        yield [("head", groups * rep), ("half", 2), ("pair", dim // 2)]
        yield [("group", groups), ("rep", rep), ("half", 2), ("pair", dim // 2)]
    if name in ("k_proj", "v_proj") and along == "rows":
        yield [("group", groups), ("dim", dim)]
        yield [("head", groups), ("half", 2), ("pair", dim // 2)]
    if name in ("q_proj", "k_proj") and along == "rows":
        for heads in {groups, groups * rep, count // dim}:
            yield [(f"{heads} heads", heads), ("half", 2), ("pair", count // heads // 2)]


def _among(axes: Axes, order: Order) -> str:
    """Which order of `axes` explains `order`."""
    axes = [(name, size) for name, size in axes if size > 1]
    if len(axes) < 2 or math.prod(size for _, size in axes) != len(order):
        return ""
    sizes = [size for _, size in axes]
    plain = np.arange(len(order))
    for others in itertools.permutations(range(len(axes))):
        if others == tuple(range(len(axes))):
            continue
        read = plain.reshape([sizes[i] for i in others]).transpose(np.argsort(others)).ravel()
        written = plain.reshape(sizes).transpose(others).ravel()
        for verb, candidate in (("read", read), ("written", written)):
            if _fits(candidate, order):
                names = " ".join(name for name, _ in axes)
                return f"({names}) {verb} as ({' '.join(axes[i][0] for i in others)}){_rope(axes, others)}"
    return ""


def _rope(axes: Axes, others: Sequence[int]) -> str:
    names, swapped = [name for name, _ in axes], [axes[i][0] for i in others]
    if names[-2:] == ["half", "pair"] and swapped == [*names[:-2], "pair", "half"]:
        return ": RoPE halves <-> interleaved"
    return ""


def _fits(candidate: Order, order: Order) -> bool:
    known = order >= 0
    return bool(known.any() and (candidate[known] == order[known]).all())


def _blocks(order: Order) -> str:
    """`order` as whole blocks that moved, of the largest size that shows them."""
    count = len(order)
    moved = int((order != np.arange(count)).sum())
    if (order < 0).any():
        return f"{moved:,} in another order"
    for size in (count // n for n in range(2, min(count, 129)) if count % n == 0 and count // n > 1):
        if found := _block_order(order, size):
            return f"blocks of {size} in another order: {found}"
    twice = " some of them twice" if len(np.unique(order)) < count else ""
    return f"{moved:,} in another order{twice and ',' + twice}"


def _block_order(order: Order, size: int) -> list[int] | None:
    blocks = order.reshape(-1, size)
    if (blocks[:, 0] % size).any() or (blocks != blocks[:, :1] + np.arange(size)).any():
        return None
    return [int(n) for n in blocks[:, 0] // size]


def _qkv(groups: int, rep: int, dim: int, tp: int) -> dict[str, Order]:
    """Orders of the rows of the fused matrix, as places in q, then k, then v; the first is Megatron-Core's."""
    q = np.arange(groups * rep * dim).reshape(groups, rep * dim)
    k = q.size + np.arange(groups * dim).reshape(groups, dim)
    v = k + k.size
    out = {"(group [(rep q) k v] dim)": np.concatenate([q, k, v], axis=1).ravel()}
    out["[(group rep q) (group k) (group v)] dim"] = np.concatenate([q.ravel(), k.ravel(), v.ravel()])
    if groups % tp == 0 and tp > 1:
        parts = [np.split(part, tp) for part in (q, k, v)]
        out["(tp [q k v])"] = np.concatenate([part[rank].ravel() for rank in range(tp) for part in parts])
    for order in itertools.permutations("qkv"):
        if order != ("q", "k", "v"):
            branches = {"q": q, "k": k, "v": v}
            text = " ".join("(rep q)" if name == "q" else name for name in order)
            out[f"(group [{text}] dim)"] = np.concatenate([branches[name] for name in order], axis=1).ravel()
    return out
