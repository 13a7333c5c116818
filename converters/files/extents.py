"""The one idea behind every checkpoint format: a tensor is boxes, and each box is a byte range of a file.

Reading, a format says where the boxes of its tensors are; writing, it says where they will be, before a byte is moved.
What lies between is `stream`, which knows no format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from converters.tensors import TensorInfo

if TYPE_CHECKING:
    from converters.files.identity import Identity


@dataclass(frozen=True, slots=True)
class Extent:
    """A box of a tensor whose elements lie in one file, row-major and without gaps.

    Attributes:
        file: Absolute where it is read; relative to the folder to be where it is written.
        offset: Of its first byte in the file.
        starts: The box's first index along each dim of the tensor.
        shape: Of the box.
    """

    file: Path
    offset: int
    starts: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """Bytes of a file whose CRC-32 was noted when they were written.

    Attributes:
        key: A tensor of which they hold some.
        file: Absolute.
        offset: Of the first byte.
        nbytes: Of the record, which may hold more than the tensor.
        crc: 0 where none was noted.
    """

    key: str
    file: Path
    offset: int
    nbytes: int
    crc: int


class TensorFiles(Protocol):
    """The tensors of a checkpoint on disk. Opening one checks that the extents of each cover it exactly once."""

    @property
    def root(self) -> Path:
        """The folder, for messages."""

    @property
    def left_alone(self) -> Mapping[str, str]:
        """What is there besides weights, with the reason (`optimizer state`: `291 tensors, 3.2 GB, not weights`)."""

    @property
    def identities(self) -> Mapping[Path, Identity]:
        """Which file each of its extents' paths led to when its header was read."""

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every weight."""

    def extents(self, key: str) -> Sequence[Extent]:
        """Where its boxes are."""


@runtime_checkable
class Recorded(Protocol):
    """Tensors on disk whose format notes checksums."""

    def records(self) -> Sequence[Record]:
        """The bytes of every weight."""


Seal = Callable[[int], Sequence[tuple[int, bytes]]]
"""From the CRC-32 of a chunk's bytes, what else its record needs: bytes, each with its offset in the same file."""


def no_seal(crc: int) -> Sequence[tuple[int, bytes]]:
    """For formats without checksums."""
    return ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a target tensor that is one record of a file: one worker writes it, in the order of its bytes."""

    key: str
    info: TensorInfo
    extent: Extent
    seal: Seal = no_seal


@dataclass(frozen=True, kw_only=True)
class FolderLayout:
    """All that a format will write, known beforehand: so several processes can write one folder.

    Attributes:
        sizes: Bytes of each large file, by its path relative to the folder.
        fixed: For each large file, bytes that do not depend on the weights (headers), with their offsets.
        chunks: The boxes of all tensors. Together with `fixed` and the seals they fill the files.
        small: Small files, whole: an index, metadata, trackers.
        copied: Files that are taken over byte for byte and are not small, with where they are read.
    """

    sizes: Mapping[Path, int]
    fixed: Mapping[Path, Sequence[tuple[int, bytes]]]
    chunks: Sequence[Chunk]
    small: Mapping[Path, bytes] = field(default_factory=dict)
    copied: Mapping[Path, Path] = field(default_factory=dict)
