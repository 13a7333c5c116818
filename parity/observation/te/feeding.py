"""How a probe reaches a model on Transformer Engine's layers: as its users ask it, this rank's part of each call.

Sequences of one length are a batch (bshd). Padding is a mask; under context parallelism, which has no mask, and where
several sequences are in a row, sequences are packed one after another (thd). Rows whose positions jump are asked one by
one: the layers have one table of angles.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from converters.topology import Topology
from converters.zigzag import zigzag_positions
from parity.backends import TOKENS, below_bf16
from parity.converter import Settings
from parity.observation.feeding import positions_of
from parity.probes import Probe

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the model.

    Attributes:
        tokens: `[b s]` of all ranks; `[1 t]` where packed.
        at: `[b s]`: the place of each token in the probe, counted over its rows; -1 for what was added.
        layout: `bshd` or `thd`.
        here: `[s / cp]` or `[t / cp]`: the tokens of a sequence that this rank has.
        order: Of all ranks' tokens, one rank's behind the other's, those of the sequence in turn.
        rotate_by: `[s]`: positions in the place of those that the model counts, where it cannot be told.
        options: Of the model's `forward`.
    """

    tokens: Tensor
    at: Tensor
    layout: str
    here: Tensor
    order: Tensor
    rotate_by: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)


def calls(probe: Probe, settings: Settings, rank: int) -> Iterator[Call]:
    """The calls that ask a probe, on the rank with index `rank` of those that share a sequence."""
    rows, length = probe.tokens.shape
    at = np.arange(rows * length).reshape(rows, length)
    segmented = probe.segments is not None
    padded = segmented and int(probe.segments.max()) == 1  # type: ignore[union-attr]
    if segmented and not (padded and settings.topology.cp == 1):
        yield _packed(probe, at, settings, rank)
    elif probe.positions is not None and not segmented:
        for row in range(rows):
            yield _batch(probe, at[row : row + 1], settings, rank)
    else:
        yield _batch(probe, at, settings, rank)


def multiple_of(settings: Settings) -> int:
    """What the number of tokens of a sequence is padded to a multiple of; every recipe's on each rank."""
    cp = settings.topology.cp
    return (2 * cp if cp > 1 else 1) * (TOKENS if below_bf16(settings.precision) else 1)


def _batch(probe: Probe, at: Ids, settings: Settings, rank: int) -> Call:
    """Some rows of a probe, filled up at the end of each; under sequence parallelism to as many as it divides."""
    cp, parts = settings.topology.cp, settings.topology.tp if settings.topology.sp else 1
    whole = np.pad(at, ((0, 0), (0, -at.shape[1] % multiple_of(settings))), constant_values=-1)
    length = whole.shape[1]
    whole = np.concatenate([whole, np.full((-len(at) % parts, length), -1)])
    # What is added is another token of the probe, which only its own answer depends on: numbers like all others.
    tokens = np.where(whole < 0, np.resize(probe.tokens, whole.shape), probe.tokens.reshape(-1)[whole])
    options: dict[str, Any] = {}
    rotate_by = None
    if probe.segments is not None:
        mask = np.where(whole < 0, 0, probe.segments.reshape(-1)[whole] > 0)
        mask[len(at) :] = 1  # a row of which nothing is asked, but every row has tokens
        options["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
    elif probe.positions is not None:
        first, row = positions_of(probe).reshape(-1)[at[0]], np.arange(length)
        row[: len(first)] = first
        row[len(first) :] = first[-1]
        if cp > 1 or parts > 1:
            rotate_by = torch.from_numpy(row)
        else:
            options["position_ids"] = torch.from_numpy(row)[None]
            options["attention_mask"] = torch.ones(1, length, dtype=torch.int64)
    held = [zigzag_positions(length, cp, one) if cp > 1 else torch.arange(length) for one in range(cp)]
    return Call(
        tokens=torch.from_numpy(tokens),
        at=torch.from_numpy(whole),
        layout="bshd",
        here=held[rank],
        order=torch.cat(held).argsort(),
        rotate_by=rotate_by,
        options=options,
    )


def _packed(probe: Probe, at: Ids, settings: Settings, rank: int) -> Call:
    """Every sequence of a probe by itself, one behind the other, each filled up so that ranks can share it."""
    topology = settings.topology
    cp, tp = topology.cp, topology.tp if topology.sp else 1
    each = 2 * cp if cp > 1 else 1
    places = [at[piece.row, piece.start : piece.stop] for piece in probe.pieces]
    filled = [len(place) + -len(place) % each for place in places]
    total = math.lcm(each, cp * tp, cp * (TOKENS if below_bf16(settings.precision) else 1))
    lengths = [len(place) for place in places]
    if short := -sum(filled) % total:  # one more sequence, of which nothing is asked
        lengths, filled = [*lengths, short], [*filled, short]
        places.append(np.full(short, -1))
    whole = np.concatenate(
        [np.pad(place, (0, room - len(place)), constant_values=-1) for place, room in zip(places, filled, strict=True)]
    )
    tokens = np.where(whole < 0, np.resize(probe.tokens, whole.shape), probe.tokens.reshape(-1)[whole])
    starts, rooms = (torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32) for counts in (lengths, filled))
    options: dict[str, Any] = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
    if cp > 1:
        options |= {"cu_seq_lens_q_padded": rooms, "cu_seq_lens_k_padded": rooms, "pad_between_seqs": True}
    options |= {"max_length_q": max(filled), "max_length_k": max(filled)}
    edges = [int(edge) for edge in rooms]

    def of(one: int) -> Tensor:
        if cp == 1:
            return torch.arange(len(whole))
        return torch.cat([start + zigzag_positions(stop - start, cp, one) for start, stop in pairwise(edges)])

    return Call(
        tokens=torch.from_numpy(tokens)[None],
        at=torch.from_numpy(whole)[None],
        layout="thd",
        here=of(rank),
        order=torch.cat([of(one) for one in range(cp)]).argsort(),
        options=options,
    )


@contextlib.contextmanager
def laid_out(model: Any, layout: str) -> Iterator[None]:
    """Let a model take its tokens in `layout`: the format that it was built for is a matter of how it is asked."""
    layers = list(model.model.layers)
    attention = [layer.self_attention for layer in layers]
    held = [
        *((layer, "attn_input_format") for layer in layers if hasattr(layer, "attn_input_format")),
        *((one, "qkv_format") for one in attention),
        *((one.core_attention, "qkv_format") for one in attention),
        (model.config, "attn_input_format"),
    ]
    before = [getattr(one, name) for one, name in held]
    for one, name in held:
        setattr(one, name, layout)
    try:
        yield
    finally:
        for (one, name), was in zip(held, before, strict=True):
            setattr(one, name, was)


@contextlib.contextmanager
def rotating_by(model: Any, positions: Tensor | None) -> Iterator[None]:
    """Let a model rotate by `positions` `[s]`, of whole sequences, in the place of those that it counts."""
    if positions is None:
        yield
        return
    angles, right = model.model.rotary_emb, model.model.rotary_emb.forward
    angles.forward = lambda counted: right(positions.to(counted.device))
    try:
        yield
    finally:
        del angles.forward


def ranks_along(topology: Topology, rank: int, dim: str) -> list[int]:
    """The ranks of a mesh that differ from `rank` in nothing but `dim`, in its order."""
    here = topology.coord(rank)
    others = [(one, topology.coord(one)) for one in range(topology.world_size)]
    same = [(getattr(at, dim), one) for one, at in others if _but(at, dim) == _but(here, dim)]
    return [one for _, one in sorted(same)]


def _but(coord: Any, dim: str) -> tuple[int, ...]:
    return tuple(getattr(coord, name) for name in ("tp", "cp", "dp") if name != dim)
