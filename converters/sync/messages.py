"""Moves between ranks as messages: cut to size, packed, sent, received, unpacked.

A message is a flat run of bytes of at most a bucket. In one round each rank sends at most one to the rank some places
further round the ring, and receives at most one from the rank as many places back. All ranks go through the rounds in
one order, each leaving out those in which it has no part, so the first round that is not finished can always go on: no
two ranks wait for each other. Two rounds are under way at once; that is all the memory it takes.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist

from converters import execute
from converters.execute import bits, dtype_of, view
from converters.plan import Copy, Region
from converters.sync.resharding import Move, Place
from converters.tensors import ITEMSIZE

Tensors = Mapping[str, torch.Tensor]
DEPTH = 2
"""Rounds under way at once."""
FRAME = 256 << 10
"""Bytes from which a move travels by itself: then a copy costs more than a message."""


@dataclass(frozen=True)
class Names:
    """The names of the dtypes of a place's tensors: the usual one, and those of tensors that have another."""

    usual: str
    others: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, dtypes: Mapping[str, str]) -> Names:
        """From the dtype of every tensor."""
        usual = Counter(dtypes.values()).most_common(1)[0][0] if dtypes else ""
        return cls(usual, {key: dtype for key, dtype in dtypes.items() if dtype != usual})

    def __getitem__(self, key: str) -> str:
        return self.others.get(key, self.usual)


@dataclass(frozen=True, kw_only=True)
class Dtypes:
    """The dtypes of every tensor of every place of both sides."""

    read: Mapping[Place, Names]
    written: Mapping[Place, Names]

    @cached_property
    def only(self) -> str:
        """The dtype that all tensors have, or an empty string."""
        first, *others = (*self.read.values(), *self.written.values())
        return first.usual if not first.others and all(names == first for names in others) else ""

    def wire(self, move: Move) -> str:
        """What the elements of a move travel as: the narrower of what they are and what they become."""
        if self.only:
            return self.only
        read = self.read[move.sender][move.copy.source.key]
        written = self.written[move.receiver][move.copy.target.key]
        return written if ITEMSIZE[written] < ITEMSIZE[read] else read

    def itemsize(self, move: Move) -> int:
        """Bytes of one element of a move on its way."""
        return ITEMSIZE[self.wire(move)]


@dataclass(frozen=True, kw_only=True)
class Wire:
    """What messages travel over.

    Attributes:
        group: The process group.
        ranks: Global ranks of the ring, in order.
        rank: This process's.
        device: Where messages are packed: one that the group's backend sends from.
        bucket: The most bytes of one message.
    """

    group: dist.ProcessGroup | None
    ranks: Sequence[int]
    rank: int
    device: torch.device
    bucket: int
    _buffers: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict, repr=False)

    def transfer(
        self, moves: Iterable[Move], read: Mapping[Place, Tensors], written: Mapping[Place, Tensors], dtypes: Dtypes
    ) -> None:
        """Carry out this rank's part of `moves`: copies within it, then messages.

        Args:
            moves: Of all ranks, or of this one; every rank the same ones.
            read: The tensors of this rank's chunks on the source side.
            written: Likewise on the target side.
            dtypes: Of every rank's tensors.
        """
        pairs: dict[tuple[int, int], list[Move]] = {}
        for move in moves:
            sender, receiver = move.sender[0], move.receiver[0]
            if self.rank == sender == receiver:
                into = written[move.receiver][move.copy.target.key]
                _copy(view(into, move.copy.target, move.copy.shape), read[move.sender][move.copy.source.key], move.copy)
            elif self.rank in (sender, receiver):
                pairs.setdefault((sender, receiver), []).append(move)
        pending: deque[_Round] = deque()
        for number, (to, outgoing, source, incoming) in enumerate(self._rounds(pairs, dtypes)):
            if len(pending) == DEPTH:
                pending.popleft().finish(written)
            operations, arriving = [], []
            for frame, room in self._frames("in", number, incoming, dtypes):
                landing = self._in_place(frame, written[frame[0].receiver], frame[0].copy.target, dtypes)
                operations.append(dist.P2POp(dist.irecv, room() if landing is None else landing, source, self.group))
                if landing is None:
                    arriving += list(_laid_out(operations[-1].tensor, frame, dtypes))
            for frame, room in self._frames("out", number, outgoing, dtypes):
                packed = self._in_place(frame, read[frame[0].sender], frame[0].copy.source, dtypes)
                if packed is None:
                    packed = room()
                    for move, box in _laid_out(packed, frame, dtypes):
                        _copy(box, read[move.sender][move.copy.source.key], move.copy)
                operations.append(dist.P2POp(dist.isend, packed, to, self.group))
            pending.append(_Round(dist.batch_isend_irecv(operations), arriving))
        for last in pending:
            last.finish(written)

    def _rounds(
        self, pairs: Mapping[tuple[int, int], list[Move]], dtypes: Dtypes
    ) -> Iterator[tuple[int, list[Move], int, list[Move]]]:
        """Whom this rank sends what to and whom it receives what from, round by round."""
        at = self.ranks.index(self.rank) if self.rank in self.ranks else 0
        for shift in range(1, len(self.ranks)):
            to, source = self.ranks[(at + shift) % len(self.ranks)], self.ranks[at - shift]
            both = (
                messages(pairs.get(pair, ()), dtypes, self.bucket) for pair in ((self.rank, to), (source, self.rank))
            )
            for outgoing, incoming in itertools.zip_longest(*both, fillvalue=[]):
                yield to, outgoing, source, incoming

    def _frames(
        self, use: str, number: int, message: list[Move], dtypes: Dtypes
    ) -> Iterator[tuple[list[Move], Callable[[], torch.Tensor]]]:
        """A message as runs of bytes: each large move by itself, the small ones together; and room for each.

        What is by itself, on both ends, can be sent from where it lies, and received where it goes.
        """
        large = [[move] for move in message if _nbytes([move], dtypes) >= FRAME]
        small = [move for move in message if _nbytes([move], dtypes) < FRAME]
        start, size = 0, _nbytes(message, dtypes) + 8 * len(message)
        for frame in [*large, small] if small else large:
            stop = start + _nbytes(frame, dtypes)
            yield frame, partial(self._buffer, (use, number % DEPTH), start, stop, size)
            start = -(-stop // 8) * 8  # elements lie where their width wants them

    def _in_place(self, frame: list[Move], tensors: Tensors, region: Region, dtypes: Dtypes) -> torch.Tensor | None:
        """The bytes of a frame where they lie in a tensor, if one box without gaps is just what travels."""
        (move, *others), held = frame, tensors[region.key]
        box = view(held, region, move.copy.shape)
        fits = execute.name_of(held.dtype) == dtypes.wire(move) and held.device == self.device
        if others or move.copy.shift or not fits or not box.is_contiguous():
            return None
        return box.reshape(-1).view(torch.uint8)

    def _buffer(self, slot: tuple[str, int], start: int, stop: int, size: int) -> torch.Tensor:
        """Bytes that no message of another round under way is in, of a buffer of `size` bytes or more."""
        if slot not in self._buffers or self._buffers[slot].numel() < size:
            self._buffers[slot] = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self._buffers[slot][start:stop]


@dataclass(frozen=True)
class _Round:
    """A round under way, and where what arrives in it goes."""

    works: list[Any]
    arriving: list[tuple[Move, torch.Tensor]]

    def finish(self, written: Mapping[Place, Tensors]) -> None:
        """Wait, and unpack."""
        for work in self.works:
            work.wait()
        for move, box in self.arriving:
            into = view(written[move.receiver][move.copy.target.key], move.copy.target, move.copy.shape)
            _put(into, box)


def messages(moves: Iterable[Move], dtypes: Dtypes, bucket: int) -> Iterator[list[Move]]:
    """The moves of one pair of ranks, those of more than a bucket in parts, as messages of at most `bucket` bytes.

    Wide elements come first, so that all lie where their width wants them, without gaps.
    """
    message: list[Move] = []
    held = 0
    for move in sorted(moves, key=lambda move: -dtypes.itemsize(move)):
        itemsize = dtypes.itemsize(move)
        for part in split(move.copy, bucket // itemsize):
            if held + part.elements * itemsize > bucket:
                yield message
                message, held = [], 0
            message.append(Move(part, move.sender, move.receiver))
            held += part.elements * itemsize
    if message:
        yield message


def split(copy: Copy, elements: int) -> Iterator[Copy]:
    """`copy` in parts of at most `elements` elements, cut along its slowest dims only."""
    if copy.elements <= elements:
        yield copy
        return
    inner = math.prod(copy.shape[1:])
    step = max(elements // inner, 1)
    for start in range(0, copy.shape[0], step):
        part = replace(
            copy,
            source=_moved(copy.source, start * copy.source.strides[0]),
            target=_moved(copy.target, start * copy.target.strides[0]),
            shape=(min(step, copy.shape[0] - start), *copy.shape[1:]),
        )
        if inner <= elements:
            yield part
        else:
            yield from split(_without_first(part), elements)


def _moved(region: Region, by: int) -> Region:
    return Region(region.key, region.offset + by, region.strides)


def _without_first(copy: Copy) -> Copy:
    """The same elements without their first dim, whose extent is one."""
    source, target = (Region(r.key, r.offset, r.strides[1:]) for r in (copy.source, copy.target))
    return replace(copy, source=source, target=target, shape=copy.shape[1:], axes=copy.axes[1:])


def _nbytes(message: Iterable[Move], dtypes: Dtypes) -> int:
    return sum(move.copy.elements * dtypes.itemsize(move) for move in message)


def _laid_out(buffer: torch.Tensor, message: Iterable[Move], dtypes: Dtypes) -> Iterator[tuple[Move, torch.Tensor]]:
    """Each move with its part of a message's buffer, in the shape and dtype in which it travels."""
    start = 0
    for move in message:
        stop = start + move.copy.elements * dtypes.itemsize(move)
        yield move, buffer[start:stop].view(dtype_of(dtypes.wire(move))).view(move.copy.shape)
        start = stop


def _copy(into: torch.Tensor, source: torch.Tensor, copy: Copy) -> None:
    """The elements that a copy reads in `source`, shifted where it shifts, into a box of its shape."""
    values = view(source, copy.source, copy.shape)
    _put(into, values + copy.shift if copy.shift else values)


def _put(into: torch.Tensor, values: torch.Tensor) -> None:
    """Copy bits, or round where the dtypes differ."""
    if into.dtype == values.dtype:
        bits(into).copy_(bits(values))
    else:
        into.copy_(values)
