"""A folder written aside: refused targets, full disks, two writers, journals, and what a second run takes over."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from converters.errors import CheckpointError
from converters.files import place, share
from converters.files.extents import Chunk, Extent, FolderLayout
from converters.files.fingerprint import of_sources
from converters.files.interruption import Interrupted
from converters.files.partial import Partial
from converters.files.pending import Pending
from converters.files.stream import Written
from converters.tensors import TensorInfo

NAMES = ("a.bin", "deep/b.bin")
HEAD, SIZE, CHUNKS = 16, 24, 5


def layout(tag: bytes = b"head", chunks: int = CHUNKS) -> FolderLayout:
    """Two files of a header and sealed chunks, and small ones: `header (data seal)*`."""

    def chunk(name: str, number: int) -> Chunk:
        offset = HEAD + number * (SIZE + 4)
        extent = Extent(Path(name), offset, (0,), (SIZE // 2,))
        return Chunk(
            f"{name}.{number}",
            TensorInfo((SIZE // 2,), "bfloat16"),
            extent,
            lambda crc: [(offset + SIZE, crc.to_bytes(4, "little"))],
        )

    return FolderLayout(
        sizes={Path(name): HEAD + chunks * (SIZE + 4) for name in NAMES},
        fixed={Path(name): [(0, tag.ljust(HEAD, b"."))] for name in NAMES},
        chunks=[chunk(name, number) for name in NAMES for number in range(chunks)],
        small={Path("config.json"): b"{}", Path("deep/index.json"): b"[]"},
    )


LAYOUT = layout()


def data(chunk: Chunk) -> bytes:
    return chunk.key.encode().ljust(SIZE, b"-")


def write(pending: Pending, chunks: Iterable[Chunk]) -> Iterator[Written]:
    """Bytes and seals, as a stream of chunks does it."""
    for chunk in chunks:
        with (pending.folder / chunk.extent.file).open("r+b") as file:
            for offset, piece in [(chunk.extent.offset, data(chunk)), *chunk.seal(zlib.crc32(data(chunk)))]:
                file.seek(offset)
                file.write(piece)
        yield Written(
            key=chunk.key,
            file=chunk.extent.file,
            offset=chunk.extent.offset,
            nbytes=SIZE,
            crc32=zlib.crc32(data(chunk)),
            digest="",
            nonfinite=0,
        )


Then = Callable[[Pending, int], None]


def convert(
    target: Path, then: Then = lambda pending, count: None, what: FolderLayout = LAYOUT, **options: Any
) -> Pending:
    """One run; `then` is called at the start with 0, and with the number of chunks after each."""
    with Pending.begin(target, what, **{"fingerprint": "f", **options}) as pending:
        then(pending, 0)
        for number, written in enumerate(write(pending, pending.missing()), 1):
            pending.note(written)
            then(pending, number)
        pending.commit()
    return pending


def at(number: int, error: BaseException) -> Then:
    def then(pending: Pending, count: int) -> None:
        if count == number:
            raise error

    return then


def interrupted(target: Path, after: int = 4, **options: Any) -> Path:
    """The partial folder of a run that was stopped after some chunks."""
    with pytest.raises(Interrupted):
        convert(target, at(after, KeyboardInterrupt()), **options)
    return Partial(target).root


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run writes that nothing disturbs."""
    target = tmp_path_factory.mktemp("whole") / "out"
    convert(target)
    return files(target)


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"

    def look(pending: Pending, count: int) -> None:
        assert not target.exists()
        assert files(pending.folder).keys() == set(NAMES)  # nothing that would make it look like a checkpoint

    pending = convert(target, look)
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    expected = b"head".ljust(HEAD, b".")
    for chunk in LAYOUT.chunks[:CHUNKS]:
        expected += data(chunk) + zlib.crc32(data(chunk)).to_bytes(4, "little")
    assert files(target)["a.bin"] == expected
    assert files(target).keys() == {*NAMES, "config.json", "deep/index.json"}
    assert [each.key for each in pending.written] == [chunk.key for chunk in LAYOUT.chunks]
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o777 & ~umask
    assert pending.notices == ()


def test_a_folder_that_is_left_early_is_not_there(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="out was left before it was complete"),
        Pending.begin(tmp_path / "out", LAYOUT, fingerprint="f"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [CheckpointError("a NaN"), ValueError("a bug"), OSError(28, "No space left")])
@pytest.mark.parametrize("count", [0, 1, 2 * CHUNKS])
def test_an_error_leaves_nothing(tmp_path: Path, error: Exception, count: int) -> None:
    with pytest.raises(CheckpointError if isinstance(error, OSError) else type(error), match=str(error.args[-1])):
        convert(tmp_path / "out", at(count, error))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [0, 4, 2 * CHUNKS])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), share.RankLost("interrupted")])
def test_an_interrupted_run_is_finished_by_another(
    tmp_path: Path, error: BaseException, count: int, whole: dict[str, bytes]
) -> None:
    target = tmp_path / "out"
    kept = r"interrupted\. .*/\.out\.partial keeps what .*--resume"
    with pytest.raises((Interrupted, share.RankLost), match=kept):
        convert(target, at(count, error))
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    told: list[int] = []
    missing: list[str] = []

    def look(pending: Pending, done: int) -> None:
        if not done:
            missing.extend(chunk.key for chunk in pending.missing())

    pending = convert(target, look, resume=True, report=told.append)
    assert missing == [chunk.key for chunk in LAYOUT.chunks[count:]]
    assert sum(told) == pending.resumed == count * SIZE
    assert files(target) == whole
    assert [each.key for each in pending.written] == [chunk.key for chunk in LAYOUT.chunks]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_sigterm_is_an_interruption(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="interrupted by SIGTERM"):
        convert(tmp_path / "out", lambda pending, count: os.kill(os.getpid(), signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]


def test_no_line_of_a_journal_is_believed_unread(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Bytes that a power cut took, of a chunk, a seal and a header; and a torn last line."""
    target = tmp_path / "out"
    root = interrupted(target)
    lost, sealed = LAYOUT.chunks[1].extent, LAYOUT.chunks[2].extent
    with (root / "folder" / "a.bin").open("r+b") as file:
        for offset, piece in [(0, b"?"), (lost.offset + 3, b"?"), (sealed.offset + SIZE, b"????")]:
            file.seek(offset)
            file.write(piece)
    with (root / "journal-0").open("r+b") as journal:
        journal.truncate((root / "journal-0").stat().st_size - 9)
    assert convert(target, resume=True).resumed == 2 * SIZE
    assert files(target) == whole


def test_a_file_that_is_gone_is_written_again(tmp_path: Path, whole: dict[str, bytes]) -> None:
    target = tmp_path / "out"
    root = interrupted(target, after=7)
    (root / "folder" / "a.bin").unlink()
    assert convert(target, resume=True).resumed == 2 * SIZE
    assert files(target) == whole


def test_a_line_after_a_torn_one_counts(tmp_path: Path) -> None:
    target = tmp_path / "out"
    root = interrupted(target, after=2)
    with (root / "journal-0").open("ab") as journal:
        journal.write(b'{"key": "torn')
    interrupted(target, after=1, resume=True)
    assert convert(target, resume=True).resumed == 3 * SIZE


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"fingerprint": "g"}, "other source files or options;"),
        ({"what": layout(b"other")}, "other files to write;"),
        ({"what": layout(chunks=4), "fingerprint": "g"}, "other source files or options and other files to write;"),
    ],
)
def test_another_conversion_is_not_resumed(
    tmp_path: Path, options: dict[str, Any], named: str, whole: dict[str, bytes]
) -> None:
    target = tmp_path / "out"
    root = interrupted(target)
    before = files(root)
    with pytest.raises(CheckpointError, match=named):
        convert(target, resume=True, **options)
    assert files(root) == before
    convert(target, resume=True)
    assert files(target) == whole


def test_a_refused_run_leaves_what_another_may_resume(tmp_path: Path) -> None:
    target = tmp_path / "out"
    root = interrupted(target)
    target.mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        convert(target)
    assert (root / "journal-0").exists()
    assert convert(target, resume=True, overwrite=True).resumed == 4 * SIZE


def test_what_a_killed_run_left_is_removed_and_said_so(tmp_path: Path, whole: dict[str, bytes]) -> None:
    target = tmp_path / "out"
    root = interrupted(target)
    (root / "folder" / "stray").write_text("x")
    assert convert(target).notices == (f"removed what an interrupted run had left in {root}",)
    assert files(target) == whole


def test_nothing_to_resume_is_said_too(tmp_path: Path) -> None:
    notice = "there was nothing to resume: the conversion begins anew"
    assert convert(tmp_path / "out", resume=True).notices == (notice,)


def test_a_run_that_was_killed_while_it_made_room_is_begun_anew(tmp_path: Path, whole: dict[str, bytes]) -> None:
    target = tmp_path / "out"
    (interrupted(target) / "state").write_text('{"version"')
    assert len(convert(target, resume=True).notices) == 2
    assert files(target) == whole


def test_two_writers(tmp_path: Path) -> None:
    target = tmp_path / "out"
    named = f"out is being written by process {os.getpid()} on .*; wait for it"

    def another(pending: Pending, count: int) -> None:
        for resume in (False, True):
            with pytest.raises(CheckpointError, match=named):
                convert(target, resume=resume)

    convert(target, another)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_targets_that_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "inner").symlink_to(source)
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.iterdir())
    for name, text in [
        ("file", "is a file, expected a folder or nothing"),
        ("link", "is a link, expected a folder or nothing"),
        ("source", "is the source itself"),
        ("source/out", "lies inside the source"),
        ("inner/out", "source/out lies inside the source"),
        (".", f"holds the source {source}"),
        ("file/out", "cannot write beside"),
    ]:
        for overwrite in (False, True):
            with pytest.raises(CheckpointError, match=text):
                convert(tmp_path / name, sources=[source], overwrite=overwrite)
    with pytest.raises(CheckpointError, match="exists already; choose another folder, or allow it to be replaced"):
        convert(tmp_path / "there")
    assert sorted(tmp_path.iterdir()) == before
    assert list(source.iterdir()) == []


def test_a_layout_stays_in_its_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absolute", Path("../outside")):
        for sizes, small in (({path: 1}, {}), ({}, {path: b"x"})):
            with pytest.raises(CheckpointError, match="is not inside the folder to be written"):
                convert(tmp_path / "out", what=FolderLayout(sizes=sizes, fixed={}, chunks=[], small=small))
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_no_folder_can_be_made() -> None:
    with pytest.raises(CheckpointError, match=r"cannot write beside /proc/\d+/out"):
        convert(Path("/proc/self/out"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="cannot write beside"):
        convert(tmp_path / "out")


@contextmanager
def no_exchange(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> Iterator[None]:
    with monkeypatch.context() as patch:
        if wanted:
            patch.setattr(place, "exchange", lambda one, other: False)
        yield


@pytest.mark.parametrize("fallback", [False, True])
def test_a_replaced_target_is_the_old_one_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fallback: bool, whole: dict[str, bytes]
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.safetensors").write_text("x")

    def look(pending: Pending, count: int) -> None:
        assert list(files(target)) == ["old.safetensors"]

    with no_exchange(monkeypatch, fallback):
        convert(target, look, overwrite=True)
    assert files(target) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_names_change_places_in_one_step(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "one" / "x").touch()
    if not place.exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this kernel, or this file system, cannot exchange two names")
    assert (tmp_path / "other" / "x").exists()
    with pytest.raises(FileNotFoundError):
        place.exchange(tmp_path / "one", tmp_path / "none")


def test_a_name_that_cannot_be_taken_keeps_both_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.safetensors").write_text("x")
    rename = Path.rename

    def fails(self: Path, to: Path) -> Path:
        if self.name == "folder":
            raise OSError("no")
        return rename(self, to)

    with no_exchange(monkeypatch, True), monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails)
        with pytest.raises(CheckpointError, match=r"no\. All is written, in .*\.out\.partial"):
            convert(target, overwrite=True)
    assert list(files(target)) == ["old.safetensors"]
    assert convert(target, overwrite=True, resume=True).resumed == 2 * CHUNKS * SIZE
    assert files(target) == whole


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path, whole: dict[str, bytes]) -> None:
    target = tmp_path / "out"

    def appear(pending: Pending, count: int) -> None:
        if count == 1:
            target.mkdir()
            (target / "theirs.safetensors").write_text("x")

    with pytest.raises(CheckpointError, match=r"exists already.*\(--overwrite\), and go on from there with --resume"):
        convert(target, appear)
    assert list(files(target)) == ["theirs.safetensors"]
    convert(target, resume=True, overwrite=True)
    assert files(target) == whole


@pytest.mark.parametrize("moment", ["between", "after", "after, exchanged", "after, nothing there"])
def test_a_kill_around_the_rename(tmp_path: Path, moment: str, whole: dict[str, bytes]) -> None:
    """The old folder or the new one is whole, whatever happens; a second run, of either kind, ends with the new one."""
    target = tmp_path / "out"
    for resume in (False, True):
        if target.exists():
            shutil.rmtree(target)
        if "nothing" not in moment:
            target.mkdir()
            (target / "old.safetensors").write_text("x")
        script = f"""
            import os, signal
            from pathlib import Path
            from test_pending import convert
            from converters.files import place
            from converters.files.partial import Partial
            def kill(*args, **named):
                os.kill(os.getpid(), signal.SIGKILL)
            if {"exchanged" not in moment}:
                place.exchange = lambda one, other: False
            rename = Path.rename
            def then_kill(self, to):
                rename(self, to)
                kill()
            if {moment == "between"}:
                Path.rename = then_kill
            else:
                Partial.remove = kill
            convert(Path({str(target)!r}), overwrite=True)
        """
        assert run(script).returncode == -signal.SIGKILL
        root = Partial(target).root
        if moment == "between":
            assert not target.exists()
            assert files(root / "replaced") == {"old.safetensors": b"x"}
        else:
            assert files(target) == whole
        if moment == "between":  # asked for nothing, it brings the old one back
            with pytest.raises(CheckpointError, match="exists already"):
                convert(target)
            assert files(target) == {"old.safetensors": b"x"}
        done = convert(target, overwrite=True, resume=resume)
        assert files(target) == whole
        assert len(done.written) == len(LAYOUT.chunks)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_half_of_an_old_folder_is_never_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.safetensors").write_text("x")

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    with no_exchange(monkeypatch, True), monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(Interrupted):
            convert(target, overwrite=True)
    assert files(target) == whole
    shutil.rmtree(target)
    root = Partial(target).root
    assert convert(target).notices == (f"removed what an interrupted run had left in {root}",)
    assert files(target) == whole


def test_a_finished_target_that_was_changed_is_not_taken_for_the_result(tmp_path: Path) -> None:
    target = tmp_path / "out"
    script = f"""
        import os, signal
        from pathlib import Path
        from test_pending import convert
        from converters.files.partial import Partial
        Partial.remove = lambda self: os.kill(os.getpid(), signal.SIGKILL)
        convert(Path({str(target)!r}))
    """
    assert run(script).returncode == -signal.SIGKILL
    (target / "config.json").write_text("[]")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="was complete, and has been changed since"):
            convert(target, resume=True)
    assert (target / "config.json").read_text() == "[]"


def run(script: str, *before: str) -> subprocess.CompletedProcess[str]:
    """Python in another process, this file being importable."""
    return subprocess.run(
        [*before, sys.executable, "-c", dedent(script)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    """Before the work where room is made, in the midst of it where the limit comes later."""
    script = f"""
        import resource, sys
        from pathlib import Path
        from test_pending import *
        limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        target = Path({str(tmp_path)!r}, "out")
        limit(100)
        for then in (None, lambda pending, count: limit(100)):
            try:
                convert(target, *[then][: then is not None])
            except CheckpointError as error:
                print(error)
            limit(resource.RLIM_INFINITY)
    """
    ran = run(script)
    before, within = ran.stdout.splitlines()
    assert "cannot make room for 316 bytes beside" in before, ran.stderr
    assert "File too large, at a.bin" in before
    assert "File too large" in within
    assert "cannot write" in within
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> list[str]:
    """What to run a command with, for a disk of 64 kB at `tmp_path/disk` that is seen by it alone."""
    (tmp_path / "disk").mkdir()
    mount = f'mount -t tmpfs -o size=64k none {tmp_path / "disk"} && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a small disk in a namespace of their own")
    return command


def test_a_full_disk(tmp_path: Path, small_disk: list[str]) -> None:
    """Before the work where the file system gives room, in the midst of it where it only promises it."""
    script = f"""
        from pathlib import Path
        from test_pending import *
        from converters.files import partial
        target = Path({str(tmp_path / "disk" / "out")!r})
        large = layout(chunks=2000)
        for _ in range(2):
            try:
                convert(target, what=large)
            except CheckpointError as error:
                print(error)
            assert list(target.parent.iterdir()) == []
            partial.allocate = os.ftruncate
        convert(target)  # what fits is written
        print(sorted(path.name for path in target.parent.iterdir()))
    """
    ran = run(script, *small_disk)
    before, within, after = ran.stdout.splitlines() or [ran.stderr] * 3
    assert "cannot make room for 112,036 bytes beside" in before
    assert "No space left on device, at deep/b.bin (" in before
    assert "No space left on device" in within
    assert after == "['out']", ran.stderr


def test_fingerprints(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(bytes(200_000))
    other.write_bytes(b"x")
    first = of_sources([one, other], dtype="bfloat16")
    assert of_sources([other, one], dtype="bfloat16") == first
    assert of_sources([one, other], dtype="float32") != first
    assert of_sources([one], dtype="bfloat16") != first
    status = one.stat()
    with one.open("r+b") as file:
        file.seek(199_999)
        file.write(b"x")
    os.utime(one, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert of_sources([one, other], dtype="bfloat16") != first
    one.write_bytes(bytes(200_000))
    os.utime(one, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert of_sources([one, other], dtype="bfloat16") == first
    os.utime(one, ns=(0, 0))
    assert of_sources([one, other], dtype="bfloat16") != first


def test_shares_are_even_and_cover_all() -> None:
    sizes = [90, 10, 10, 60, 10, 40, 0, 20]
    chunks = [
        Chunk(str(n), TensorInfo((size,), "uint8"), Extent(Path("f"), sum(sizes[:n]), (0,), (size,)))
        for n, size in enumerate(sizes)
    ]
    for count in (1, 2, 3, 9):
        found = share.shares(chunks, count)
        assert len(found) == count
        assert sorted(int(chunk.key) for each in found for chunk in each) == list(range(len(sizes)))
        loads = [sum(map(share.nbytes, each)) for each in found]
        assert max(loads) <= max(90, sum(sizes) / count + 10)
        assert all([c.extent.offset for c in each] == sorted(c.extent.offset for c in each) for each in found)
