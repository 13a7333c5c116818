"""Files of torch with bytes changed at random: they are read, or an error tells why not; nothing else comes out."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_files import archive_of, boxed, saved

from converters import pickled
from converters.errors import CheckpointError
from converters.files import dcp_metadata, torch_archive
from converters.files.dcp import DcpFiles
from converters.pickled import Names
from converters.tensors import ITEMSIZE

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
OPCODES = b"(N\x88\x89KMJ\x8a\x8bGX\x8c\x8dBC\x8e)\x85\x86\x87t]}aesuqr\x94hjc\x93R\x81bQi.o0\x82\x92"
WHOLE = torch.arange(24.0).view(4, 6)
FILE = saved({"model": {"a": WHOLE, "b": WHOLE[1:, 2:].bfloat16()}, "rest": ["x", 1, None]})
PICKLE = zipfile.ZipFile(io.BytesIO(saved(torch.arange(4.0)))).read("archive/data.pkl")
STATE = pickle.dumps({"a": [1, "text", (2.5, None)], "b": {"c": b"bytes"}})

change = st.tuples(
    st.sampled_from(["put", "cut", "insert", "copy"]),
    st.integers(0, 1 << 20),
    st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([OPCODES[i : i + 1] for i in range(len(OPCODES))])),
    st.integers(0, 1 << 20),
)


def changed(content: bytes, changes: list[tuple[str, int, bytes, int]]) -> bytes:
    for kind, at, new, other in changes:
        if not content:
            break
        at, other = at % len(content), other % len(content)
        match kind:
            case "put":
                content = content[:at] + new + content[at + len(new) :]
            case "cut":
                content = content[:at] + content[at + 1 + other % 16 :]
            case "insert":
                content = content[:at] + new + content[at:]
            case _:
                content = content[:at] + content[other : other + 32] + content[at:]
    return content


changes = st.lists(change, min_size=1, max_size=4)


def said(read: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    """The message of a `CheckpointError`; empty where none is raised."""
    try:
        read(*arguments, **named)
    except CheckpointError as error:
        return str(error) or "nothing"
    return ""


def check(files: DcpFiles) -> None:
    """What was read lies in the files."""
    for key, info in files.tensors().items():
        for extent in files.extents(key):
            assert extent.file.parent == files.root
            size = torch.Size(extent.shape).numel() * ITEMSIZE[info.dtype]
            assert 0 <= extent.offset <= extent.offset + size <= extent.file.stat().st_size


@given(changes)
@FUZZ
def test_pickles(edits: list[tuple[str, int, bytes, int]]) -> None:
    names = Names(objects=frozenset(["x.*"]))
    told = said(pickled.parse, changed(STATE, edits), names=names, where="it", persistent=id)
    assert not told or told.startswith("it ")


@given(
    st.lists(st.sampled_from([OPCODES[i : i + 1] for i in range(len(OPCODES))] + [b"\0", b"\1", b"\n"]), max_size=60)
)
@FUZZ
def test_opcodes(codes: list[bytes]) -> None:
    content = b"\x80\x04" + b"".join(codes)
    told = said(pickled.parse, content, names=torch_archive.TENSORS, where="it", persistent=lambda key: key)
    assert not told or told.startswith("it")


@given(changes)
@FUZZ
def test_archives(edits: list[tuple[str, int, bytes, int]]) -> None:
    told = said(torch_archive.read, changed(FILE, edits), where="it")
    assert not told or told.startswith("it")


@given(changes)
@FUZZ
def test_pickles_in_archives(edits: list[tuple[str, int, bytes, int]]) -> None:
    """With a checksum that holds, so that the pickle is looked at."""
    told = said(torch_archive.read, archive_of(changed(PICKLE, edits)), where="it")
    assert not told or told.startswith("it")


@given(changes, st.sampled_from([".metadata", "__0_0.distcp"]))
@FUZZ
def test_checkpoints(tmp_path: Path, edits: list[tuple[str, int, bytes, int]], name: str) -> None:
    boxed(tmp_path, WHOLE, [((0, 0), (4, 2)), ((0, 2), (4, 4))])
    (tmp_path / name).write_bytes(changed((tmp_path / name).read_bytes(), edits))
    told = said(lambda: check(DcpFiles(tmp_path)))
    assert not told or str(tmp_path) in told


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(values)
@FUZZ
def test_what_is_written_is_read(value: Any) -> None:
    """By this reader and by Python's; and what Python writes is read here."""
    content = pickled.write(value)
    assert pickle.loads(content) == value
    for each in (content, pickle.dumps(value, protocol=2), pickle.dumps(value, protocol=4)):
        assert pickled.parse(each, names=Names(), where="it") == value


@given(st.lists(st.sampled_from(["a", "b", "c"]), unique=True), st.data())
@FUZZ
def test_metadata_comes_back(keys: list[str], data: st.DataObject) -> None:
    size = st.integers(0, 2**40)
    place = st.builds(dcp_metadata.Place, st.text(), size, size)
    shape = st.lists(size, max_size=4).map(tuple)
    infos = {
        key: torch_archive.TensorInfo(data.draw(shape), data.draw(st.sampled_from(list(ITEMSIZE)))) for key in keys
    }
    starts = {key: data.draw(st.lists(shape, max_size=3, unique=True)) for key in keys}
    pieces = {key: [dcp_metadata.Piece(at, data.draw(shape), data.draw(place)) for at in starts[key]] for key in keys}
    metadata = dcp_metadata.DcpMetadata(tensors=infos, pieces=pieces, objects={"o": data.draw(place)})
    assert dcp_metadata.parse(dcp_metadata.write(metadata), where="it") == metadata
