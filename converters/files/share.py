"""Several processes that write one folder: who they are, what they tell each other, and which chunks are whose.

Started by torchrun, or with a process group already, they are the ranks of it. A single process is one rank, and
imports no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol, TypeVar

from converters.errors import CheckpointError
from converters.files.journal import place_of
from converters.tensors import ITEMSIZE

if TYPE_CHECKING:
    from converters.files.extents import Chunk

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for the slowest. A rank that died is known at once: its connections close."""


class RankLost(CheckpointError):
    """Another rank has ended without a word; what is written stays, for a resumed run."""


class Ranks(Protocol):
    """The processes of one conversion."""

    @property
    def rank(self) -> int:
        """This one."""

    @property
    def count(self) -> int:
        """How many."""

    def everyone(self, own: T) -> list[T]:
        """What every rank passed, in rank order."""

    def first(self, step: Callable[[], T]) -> T:
        """Run `step` on rank 0, and give its result, or its error, to every rank."""


class Alone:
    """A single process."""

    rank, count = 0, 1

    def everyone(self, own: T) -> list[T]:
        """What it passed."""
        return [own]

    def first(self, step: Callable[[], T]) -> T:
        """What `step` gives."""
        return step()


class Group:
    """The ranks of torch's default process group."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def everyone(self, own: T) -> list[T]:
        """What every rank passed, in rank order.

        Raises:
            RankLost: A rank has ended.
        """
        from converters import collective

        with _lost():
            return collective.everyone(own)

    def first(self, step: Callable[[], T]) -> T:
        """Run `step` on rank 0, and give its result, or its error, to every rank.

        Raises:
            RankLost: A rank has ended.
        """
        from converters import collective

        with _lost():
            return collective.on_first(step)


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # all that gloo says; an error of a step is a ConversionError or an OSError
        raise RankLost("another rank has ended, or cannot be reached") from error


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of this run. Under torchrun every one of them has to get here.

    Raises:
        CheckpointError: The others cannot be met.
    """
    running = sys.modules.get("torch.distributed")
    if running is not None and running.is_available() and running.is_initialized():
        yield Group() if running.get_world_size() > 1 else Alone()
        return
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        yield Alone()
        return
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"WORLD_SIZE is {count}, and the other ranks cannot be met: {error}. Start all of them with torchrun, or "
            "unset WORLD_SIZE for a single process"
        ) from error
    try:
        yield Group()
    finally:
        dist.destroy_process_group()


def nbytes(chunk: Chunk) -> int:
    """Bytes of a chunk's elements."""
    count = ITEMSIZE[chunk.info.dtype]
    for size in chunk.extent.shape:
        count *= size
    return count


def shares(chunks: Sequence[Chunk], count: int) -> list[list[Chunk]]:
    """Chunks over `count` ranks, by bytes: the largest first, to the rank that has least; each share in file order."""
    held = [0] * count
    out: list[list[Chunk]] = [[] for _ in range(count)]
    for chunk in sorted(chunks, key=lambda chunk: (-nbytes(chunk), place_of(chunk))):
        rank = held.index(min(held))
        held[rank] += nbytes(chunk)
        out[rank].append(chunk)
    return [sorted(share, key=place_of) for share in out]
