"""Files of a source that are replaced, rewritten, truncated or removed between their headers and the last byte."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from converters.convert import Conversion, convert_folder
from converters.errors import CheckpointError
from converters.files import fingerprint, stream
from converters.files.identity import Identity, check
from converters.files.interruption import Interrupted
from converters.files.verify import verify
from converters.sources import read_config
from parity.seeded import write_checkpoint
from parity.tiny import shrink, with_layers

CONFIG = with_layers(shrink(read_config("meta-llama/Llama-3.2-1B")), 2)
WEIGHTS = {"hf": Path("model.safetensors"), "megatron": Path("iter_0000000/__0_0.distcp")}
Change = Callable[[Path], Any]
Cause = Callable[[], Any]


def replaced(file: Path) -> None:
    """Another file of the same size takes the name, as one who saves with care does it."""
    other = file.with_suffix(".new")
    other.write_bytes(bytes(file.stat().st_size))
    os.utime(other, ns=(0, file.stat().st_mtime_ns))
    other.replace(file)


def rewritten(file: Path) -> None:
    """Some bytes are written over, and the time is set back."""
    before = file.stat().st_mtime_ns
    with file.open("r+b") as handle:
        handle.seek(-5000, os.SEEK_END)
        handle.write(b"\x01" * 4096)
    os.utime(file, ns=(0, before))


def longer(file: Path) -> None:
    with file.open("ab") as handle:
        handle.write(b"more")


def shorter(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def emptied(file: Path) -> None:
    os.truncate(file, 0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    hf = write_checkpoint(CONFIG, root / "hf")
    convert_folder(hf, root / "megatron", target_column="megatron")
    return {"hf": hf, "megatron": root / "megatron"}


@pytest.fixture
def source(folders: dict[str, Path], column: str, tmp_path: Path) -> Path:
    shutil.copytree(folders[column], tmp_path / "source")
    os.utime(tmp_path / "source" / WEIGHTS[column], ns=(0, 10**18))
    return tmp_path / "source"


def other(column: str) -> str:
    return {"hf": "megatron", "megatron": "hf"}[column]


def convert(source: Path, target: Path, column: str, **options: Any) -> Conversion:
    return convert_folder(source, target, target_column=other(column), **options)


def interposed(monkeypatch: pytest.MonkeyPatch, *, before: int, then: Cause) -> None:
    """Let something happen before the chunk of that number is asked for; before the first with 0, after all with -1."""
    real = stream.stream

    def streamed(*args: Any, **options: Any) -> Iterator[stream.Written]:
        if before == 0:
            then()
        for number, written in enumerate(real(*args, **options), 1):
            yield written
            if number == before:
                then()
        if before < 0:
            then()

    monkeypatch.setattr(stream, "stream", streamed)


@pytest.mark.parametrize("change", [replaced, rewritten, longer, shorter, emptied, Path.unlink])
@pytest.mark.parametrize("column", WEIGHTS)
def test_before_the_first_byte(
    source: Path, column: str, change: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interposed(monkeypatch, before=0, then=lambda: change(source / WEIGHTS[column]))
    with pytest.raises(CheckpointError, match=f"{WEIGHTS[column].name}.*(changed while|No such file|empty file)"):
        convert(source, tmp_path / "out", column)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("change", [replaced, rewritten, longer, Path.unlink])
@pytest.mark.parametrize("column", WEIGHTS)
def test_before_the_folder_takes_its_name(
    source: Path, column: str, change: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interposed(monkeypatch, before=-1, then=lambda: change(source / WEIGHTS[column]))
    with pytest.raises(
        CheckpointError, match=rf"{WEIGHTS[column].name} changed while it was read; nothing was written; start again$"
    ):
        convert(source, tmp_path / "out", column)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("column", ["megatron"])
def test_while_two_are_compared(source: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file rewritten once its bytes were looked at: its verdict would be of bytes that are there no more."""
    from converters.files import verify as verifying

    real = verifying.compare

    def compared(*args: Any, **options: Any) -> Iterator[Any]:
        yield from real(*args, **options)
        rewritten(source / WEIGHTS["megatron"])

    monkeypatch.setattr(verifying, "compare", compared)
    with pytest.raises(CheckpointError, match=r"distcp changed while it was read"):
        verify(folders["hf"], source, sample=1 << 20)  # of which no checksums are read
    monkeypatch.undo()
    assert not verify(folders["hf"], source).equal


def stop() -> None:
    raise KeyboardInterrupt


def moved(source: Path) -> Path:
    """Another model in another folder of the same kind: names, sizes and times, headers and ends are the same."""
    there = source.with_name("there")
    shutil.copytree(source, there / "source")
    file = there / "source" / WEIGHTS["hf"]
    content = bytearray(file.read_bytes())
    assert len(content) > 4 * fingerprint.ENDS
    for at in range(fingerprint.ENDS, len(content) - fingerprint.ENDS, 2):
        content[at] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(0, (source / WEIGHTS["hf"]).stat().st_mtime_ns))
    return there / "source"


def swapped(source: Path) -> Path:
    """The same in the same place."""
    there = moved(source)
    shutil.rmtree(source)
    there.rename(source)
    return source


def inside(source: Path) -> Path:
    """Bytes in the middle of the same file, and the time set back."""
    file = source / WEIGHTS["hf"]
    before = file.stat().st_mtime_ns
    with file.open("r+b") as handle:
        handle.seek(file.stat().st_size // 2)
        handle.write(b"\x01" * 8)
    os.utime(file, ns=(0, before))
    return source


@pytest.mark.parametrize("change", [moved, swapped, inside])
@pytest.mark.parametrize("column", ["hf"])
def test_a_second_run_does_not_go_on_with_another_model(
    source: Path, change: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interposed(monkeypatch, before=3, then=stop)
    with pytest.raises(Interrupted):
        convert(source, tmp_path / "out", "hf", workers=1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="left of a conversion with other source files or options"):
        convert(change(source), tmp_path / "out", "hf", resume=True)
    assert convert(source, tmp_path / "out", "hf").resumed == 0
    assert verify(source, tmp_path / "out").equal


@pytest.mark.parametrize("column", WEIGHTS)
def test_a_second_run_goes_on_with_the_same(
    source: Path, column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interposed(monkeypatch, before=3, then=stop)
    with pytest.raises(Interrupted):
        convert(source, tmp_path / "out", column, workers=1)
    monkeypatch.undo()
    (tmp_path / "link").symlink_to(source)
    assert convert(tmp_path / "link", tmp_path / "out", column, resume=True).resumed
    assert verify(source, tmp_path / "out").equal


def test_all_files_that_changed_are_named(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_bytes(b"1")
    read = {file: Identity.of(file) for file in files}
    check(read)
    digest = fingerprint.of_identities(read)
    assert fingerprint.of_identities(dict(reversed(read.items()))) == digest
    assert fingerprint.of_identities({tmp_path / "deep" / "a": read[files[0]]}) != fingerprint.of_identities(
        {files[0]: read[files[0]]}
    )
    longer(files[0])
    files[2].unlink()
    with pytest.raises(CheckpointError, match=r"/a, \S*/c changed while"):
        check(read)
    assert fingerprint.of_identities(read | {files[0]: Identity.of(files[0])}) != digest
