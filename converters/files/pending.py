"""A folder that several processes may write together, that a kill cannot spoil, and that a second run can finish.

    with Pending.begin(target, layout, fingerprint=..., resume=True) as pending:
        for written in stream(parts, pending.missing(), pending.folder):
            pending.note(written)
        pending.commit()

An error leaves nothing: the same run would fail again, and a full disk should not stay full. An interruption (Ctrl-C,
SIGTERM, a rank that was lost), and a finished folder whose name cannot be taken, leave what is written, hidden beside
the target, and say how to go on. So does a kill, without the words.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import CheckpointError
from converters.files import fingerprint as fingerprints
from converters.files import journal, place, reread, share
from converters.files.extents import Chunk, FolderLayout
from converters.files.interruption import Interrupted, told_to_stop
from converters.files.partial import FAILED, INTERRUPTED, Partial

if TYPE_CHECKING:
    from converters.files.stream import Written

GO_ON = "go on from there with --resume (in Python resume=True)"


class Pending:
    """A folder being written.

    Attributes:
        folder: Where the files are, until `commit`.
        notices: What was found and done at the beginning that a person should hear of.
        resumed: Bytes of chunks that an earlier run had written, over all ranks.
    """

    def __init__(
        self, partial: Partial, layout: FolderLayout, ranks: share.Ranks, *, overwrite: bool, notices: Sequence[str]
    ) -> None:
        self._partial, self._layout, self._ranks, self._overwrite = partial, layout, ranks, overwrite
        self._chunks = {journal.place_of(chunk): chunk for chunk in layout.chunks}
        assert len(self._chunks) == len(layout.chunks)
        self._done: dict[journal.Place, Written] = {}
        self._journal: journal.Journal | None = None
        self._agreed = self.committed = self._placed = False
        self.notices = tuple(notices)
        self.folder = partial.folder
        self.resumed = 0

    @classmethod
    @contextmanager
    def begin(
        cls,
        target: Path,
        layout: FolderLayout,
        *,
        fingerprint: str,
        here: str = "",
        sources: Sequence[Path] = (),
        overwrite: bool = False,
        resume: bool = False,
        report: Callable[[int], None] | None = None,
    ) -> Iterator[Pending]:
        """Make room for a folder, or come back to one. Collective, where there are several ranks.

        Args:
            target: The folder to make; it appears when `commit` is called, complete.
            layout: All that will be in it.
            fingerprint: Of what is read and of the options, from `fingerprint.of_sources`: a run with another one
                cannot be resumed, and all ranks must have the same.
            here: Of the files that are read, from `fingerprint.of_identities`: a run with another one cannot be
                resumed. Machines may know one file differently, so that of rank 0 alone counts.
            sources: Folders or files that are read meanwhile, which the target must keep clear of.
            overwrite: Replace the target where it exists.
            resume: Finish what an interrupted run has left, where there is something; each of its chunks is read and
                held against its checksum first.
            report: Called with bytes that were found to be written already.

        Raises:
            CheckpointError: A target that is refused, one that another process writes, a full disk, or a rest of
                another conversion.
            Interrupted: Ctrl-C or SIGTERM; what is written stays.
        """
        target = place.settled(target)
        identity = {"source files or options": fingerprint, "files to write": fingerprints.of_layout(layout)}
        with share.joined() as ranks, told_to_stop() as no_more:
            if len({tuple(each.items()) for each in ranks.everyone(identity)}) > 1:
                raise CheckpointError(f"{target}: the ranks do not read the same source files with the same options")
            identity["source files or options"] += here
            partial = Partial(target)
            try:
                notices, back = ranks.first(
                    lambda: _open(
                        partial,
                        layout,
                        identity,
                        sources=sources,
                        overwrite=overwrite,
                        resume=resume,
                        several=ranks.count > 1,
                    )
                )
                pending = cls(partial, layout, ranks, overwrite=overwrite, notices=notices)
                try:
                    pending._start(back=back, report=report or (lambda count: None))
                    yield pending
                    if not pending.committed:
                        raise CheckpointError(f"{target} was left before it was complete")
                except BaseException as error:
                    no_more()
                    pending._end(error)
                    raise
                finally:
                    if pending._journal is not None:
                        pending._journal.close()
            finally:
                partial.unlock()

    def missing(self, chunks: Sequence[Chunk] | None = None) -> list[Chunk]:
        """What this rank has to write (of `chunks`), in the order of files."""
        wanted = self._layout.chunks if chunks is None else chunks
        rest = [chunk for chunk in wanted if journal.place_of(chunk) not in self._done]
        return share.shares(rest, self._ranks.count)[self._ranks.rank]

    def note(self, written: Written) -> None:
        """A chunk is in its file, with its seal.

        Raises:
            CheckpointError: Another rank has failed, or was interrupted.
            OSError: The journal cannot be written.
        """
        at = journal.place_of(written)
        assert written.nbytes == share.nbytes(self._chunks[at]), written
        assert self._journal is not None
        self._journal.note(written)
        self._done[at] = written
        if self._ranks.count > 1 and (stopped := self._partial.heard()):
            raise Heard("another rank has failed") if stopped == FAILED else share.RankLost("another rank has ended")

    @property
    def written(self) -> list[Written]:
        """What was written, or found written, in the order of the layout; after `commit` that of all ranks."""
        return [self._done[at] for at in self._chunks if at in self._done]

    def commit(self) -> None:
        """Wait for all ranks, have everything on disk, and give the folder its name. Collective.

        Raises:
            CheckpointError: A rank failed, the target has appeared meanwhile, or its name cannot be taken.
        """
        if not self._placed:
            for path in self._layout.sizes:
                place.sync(self.folder / path)  # each rank its own; on one machine the second finds nothing to do
        for theirs in self._agree(None):
            self._done |= theirs
        left = self._chunks.keys() - self._done.keys()
        assert not left, f"chunks that no rank has written: {sorted(left)[:5]}"
        self._ranks.first(self._place)
        self.committed = True

    def _place(self) -> None:
        if not self._placed:
            try:
                self._partial.place(self._layout, overwrite=self._overwrite)
            except (CheckpointError, OSError) as error:
                raise NotPlaced(
                    f"{error}. All is written, in {self._partial.root}: clear the place, or allow it to be replaced "
                    f"(--overwrite), and {GO_ON}"
                ) from error
        self._partial.remove()

    def _agree(self, fault: str | None) -> list[dict[journal.Place, Written]]:
        """Tell the others how this rank has ended. Once.

        Raises:
            CheckpointError: A rank has failed.
        """
        found = self._ranks.everyone((fault, self._done))
        self._agreed = True
        faults = [f"rank {rank}: {each}" for rank, (each, _) in enumerate(found) if each is not None]
        if faults and fault is None:
            raise CheckpointError("\n".join(faults))
        return [each for _, each in found]

    def _start(self, *, back: bool, report: Callable[[int], None]) -> None:
        """Join in: the lock, the journal, and what earlier runs have written."""
        fault = None
        try:
            if self._ranks.rank:
                self._partial.share()
            if back:
                self._placed = self._partial.holds(self._partial.target)
                if self._placed:
                    self.folder = self._partial.target
                self._read_again(report)
            self._journal = journal.Journal(self._partial.root / f"journal-{self._ranks.rank}")
        except (CheckpointError, OSError) as error:
            fault = str(error)
        faults = sorted({each for each in self._ranks.everyone(fault) if each is not None})
        if faults:
            self._agreed = True
            raise CheckpointError("\n".join(faults))
        if back:
            for theirs in self._ranks.everyone(self._done):
                self._done |= theirs
            self.resumed = sum(written.nbytes for written in self._done.values())
            if self._placed and len(self._done) < len(self._chunks):
                raise CheckpointError(f"{self._partial.target} was complete, and has been changed since")

    def _read_again(self, report: Callable[[int], None]) -> None:
        """Of what the journals say, this rank's share: what has its checksum need not be written."""
        noted = journal.read(self._partial.journals)
        chunks = [chunk for at, chunk in self._chunks.items() if at in noted]
        mine = share.shares(chunks, self._ranks.count)[self._ranks.rank]
        for written in reread.still_there(self.folder, mine, noted, seal=not self._placed):
            self._done[journal.place_of(written)] = written
            report(written.nbytes)

    def _end(self, error: BaseException) -> None:
        """Keep what may be finished, remove what may not; and have all ranks say why."""
        target, several = self._partial.target, self._ranks.count > 1
        kept = f"{self._partial.root} keeps what is written of {target}; {GO_ON}"
        if isinstance(error, NotPlaced):
            return
        if isinstance(error, share.RankLost):
            raise share.RankLost(f"{error}. {kept}") from error
        if not isinstance(error, Exception):
            who = f"rank {self._ranks.rank}" if several else "the conversion"
            if several:
                self._partial.stop(INTERRUPTED)
            raise Interrupted(f"{who} was interrupted{f' by {error}' if str(error) else ''}. {kept}") from error
        if not self._agreed and not isinstance(error, Heard):
            self._partial.stop(FAILED)
            with contextlib.suppress(share.RankLost):
                self._agree(str(error) or type(error).__name__)
        elif not self._agreed:
            try:
                self._agree(None)
            except CheckpointError as told:
                error = told
        with contextlib.suppress(share.RankLost, OSError):
            self._ranks.first(self._partial.remove)  # no rank ends before, or torchrun would end the one that removes
        if isinstance(error, OSError):
            raise CheckpointError(f"cannot write {target}: {error}") from error
        raise error


class NotPlaced(CheckpointError):
    """A finished folder could not take its name; it is kept."""


class Heard(CheckpointError):
    """Another rank has failed, and will say why."""


def _open(
    partial: Partial,
    layout: FolderLayout,
    identity: dict[str, str],
    *,
    sources: Sequence[Path],
    overwrite: bool,
    resume: bool,
    several: bool,
) -> tuple[list[str], bool]:
    """What rank 0 does before all others: check the target, look at what is there, make room.

    Returns:
        What to tell people, and whether there is something to come back to.
    """
    notices: list[str] = []
    if not partial.root.exists():
        place.check_target(partial.target, overwrite=overwrite, sources=sources)
    stale = partial.lock()
    keep = stale
    try:
        if partial.put_back():
            notices.append(f"put {partial.target} back, which an interrupted run was about to replace")
        placed = resume and partial.holds(partial.target)
        place.check_target(partial.target, overwrite=overwrite or placed, sources=sources)
        back = bool(stale and resume and (placed or partial.holds(partial.folder)))
        if back:
            others = [name for name, digest in identity.items() if partial.identity().get(name) != digest]
            if others:
                raise CheckpointError(
                    f"{partial.root} is left of a conversion with other {' and other '.join(others)}; without "
                    "--resume it is removed, and the conversion begins anew"
                )
            if placed and not partial.complete(layout):
                raise CheckpointError(f"{partial.target} was complete, and has been changed since; remove one of them")
        elif stale:
            partial.clear()
            notices.append(f"removed what an interrupted run had left in {partial.root}")
        if resume and not back:
            notices.append("there was nothing to resume: the conversion begins anew")
        if not placed:
            keep = back
            partial.prepare(layout, identity)
        if several:
            partial.share()
    except BaseException:
        if keep:
            partial.unlock()
        else:
            partial.remove()
        raise
    return notices, back
