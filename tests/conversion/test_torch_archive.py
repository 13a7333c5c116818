"""Files of `torch.save` without torch: written byte for byte as it does, read as byte ranges, and never unpickled."""

from __future__ import annotations

import io
import mmap
import os
import pickle as python_pickle
import pickletools
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_files import archive_of, data_of, info_of, saved

from converters import pickled
from converters.errors import CheckpointError
from converters.files import torch_archive
from converters.files.torch_archive import Stored
from converters.pickled import Named, Names, Outside, Symbol
from converters.tensors import TensorInfo

RECORDS = [
    "data.pkl",
    ".format_version",
    ".storage_alignment",
    "byteorder",
    "data/0",
    "version",
    ".data/serialization_id",
]
DTYPES = [torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]
SHAPES: list[tuple[int, ...]] = [(), (1,), (3, 4), (1, 300, 70), (70000,), (0, 4), (4, 0, 3)]


def records(content: bytes) -> list[str]:
    return [info.filename.partition("/")[2] for info in zipfile.ZipFile(io.BytesIO(content)).infolist()]


def built(tensor: torch.Tensor) -> bytes:
    archive, data = torch_archive.build(info_of(tensor)), data_of(tensor)
    content = archive.before + data + archive.after(zlib.crc32(data))
    assert len(content) == archive.size
    assert len(archive.before) % 64 == 0
    return content


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_archives_are_those_of_torch(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 200).to(dtype)
    content = built(tensor)
    assert zipfile.ZipFile(io.BytesIO(content)).testzip() is None
    (tmp_path / "tensor.pt").write_bytes(content)
    for in_place in (False, True):
        loaded = torch.load(tmp_path / "tensor.pt", weights_only=True, mmap=in_place)
        assert (info_of(loaded), data_of(loaded)) == (info_of(tensor), data_of(tensor))
        assert loaded.stride() == tensor.stride()
    theirs = saved(tensor)
    found = torch_archive.read(theirs, where="theirs")
    assert (found.info, found.strides, found.contiguous) == (info_of(tensor), tensor.stride(), True)
    assert theirs[found.offset :].startswith(data_of(tensor))
    if records(theirs) != RECORDS:
        pytest.skip(f"this release of torch writes other records: {records(theirs)}")
    assert content == theirs


def test_plain_values_are_saved_as_torch_saves_them() -> None:
    for value in ([None], {}, {"a": 1, "b": (2, 3.5, "x")}, [True, -1, 70000, 2**40, [], ()]):
        ours, theirs = torch_archive.save(value), saved(value)
        assert torch.load(io.BytesIO(ours), weights_only=True) == value
        assert torch_archive.read(theirs, where="theirs") == torch_archive.read(ours, where="ours") == value
        if records(theirs) == [name for name in RECORDS if name != "data/0"]:
            assert ours == theirs


def test_more_than_four_gibibytes(tmp_path: Path) -> None:
    """A sparse file: sizes and offsets of 64 bits are where zip readers and torch look for them."""
    info = TensorInfo((2**32 + 100,), "uint8")
    archive, path = torch_archive.build(info), tmp_path / "large.pt"
    with path.open("wb") as file:
        file.write(archive.before)
        file.seek(info.nbytes - 1, os.SEEK_CUR)
        file.write(b"\x07" + archive.after(0))
    assert path.stat().st_size == archive.size
    entry = zipfile.ZipFile(path).getinfo("archive/data/0")
    assert (entry.file_size, entry.compress_size) == (info.nbytes, info.nbytes)
    # What precedes the data, as torch 2.13 writes it: the size in 64 bits, and no packed size.
    field = b"archive/data/0\x01\x00\x10\x00" + info.nbytes.to_bytes(8, "little") + bytes(8) + b"FB"
    assert field in archive.before
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert (loaded.shape[0], int(loaded[-1]), int(loaded[-2])) == (info.nbytes, 7, 0)
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    assert torch_archive.read(content, where="large").offset == len(archive.before)


def test_tensors_of_every_kind_are_found() -> None:
    base = torch.arange(24.0).view(4, 6)
    state = OrderedDict(
        plain=base, transposed=base.T, part=base[1:3, 2:], parameter=torch.nn.Parameter(base.clone()), n=3
    )
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    content = saved({"model": state, "rest": [None, 1.5, "x", b"bytes", (1, 2)]})
    found = torch_archive.read(content, where="file")
    assert found["rest"] == [None, 1.5, "x", b"bytes", (1, 2)]
    assert list(found["model"]) == ["plain", "transposed", "part", "parameter", "n"]
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            stored = found["model"][name]
            flat = torch.frombuffer(bytearray(content[stored.record[0] :][: stored.record[1]]), dtype=torch.float32)
            view = flat.as_strided(stored.info.shape, stored.strides, (stored.offset - stored.record[0]) // 4)
            assert torch.equal(view, value)
            assert stored.contiguous == value.is_contiguous()
            assert zlib.crc32(content[stored.record[0] :][: stored.record[1]]) == stored.crc


def test_what_is_still_to_be_done_to_a_tensor_is_known() -> None:
    values = torch.arange(6.0)
    state = {"plain": values, "view": torch._neg_view(values), "part": torch.complex(values, values).conj().imag}
    content = saved({**state, "parameter": torch.nn.Parameter(torch._neg_view(values))})
    found = torch_archive.read(content, where="file")
    assert {name: stored.pending for name, stored in found.items()} == {
        "plain": (),
        "view": ("neg",),
        "part": ("neg",),
        "parameter": ("neg",),
    }


class Odd(torch.Tensor):
    """A tensor of another class."""


def test_tensors_of_other_kinds_are_named() -> None:
    marked = torch.zeros(3)
    marked.mark = 1  # type: ignore[attr-defined]
    for name, value in {
        "_rebuild_from_type_v2": torch.zeros(3).as_subclass(Odd),
        "_rebuild_from_type_v2 ": marked,
        "_rebuild_sparse_tensor": torch.eye(3).to_sparse(),
        "_rebuild_meta_tensor_no_storage": torch.zeros(3, device="meta"),
    }.items():
        with pytest.raises(CheckpointError, match=rf"file.*{name.strip()}"):
            torch_archive.read(saved({"weight": value}), where="file")


def reading(pickle: bytes) -> Any:
    return torch_archive.read(archive_of(pickle), where="/folder/model.pt")


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


COMMAND = text("true") + b"\x85R."
NAMED = {
    "REDUCE": b"\x80\x02cos\nsystem\n" + COMMAND,
    "STACK_GLOBAL": b"\x80\x04" + text("os") + text("system") + b"\x93" + COMMAND,
    "STACK_GLOBAL by memo": b"\x80\x04" + text("os") + b"\x940" + text("system") + b"\x940h\x00h\x01\x93" + COMMAND,
    "INST": b"\x80\x02(" + text("true") + b"ios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\n" + text("true") + b"o.",
    "NEWOBJ": b"\x80\x02cos\nsystem\n)\x81.",
    "BUILD": b"\x80\x02cos\nsystem\n}" + text("x") + b"Ksb.",
    "in a persistent id": b"\x80\x02(" + text("storage") + b"cos\nsystem\n" + text("0") + text("cpu") + b"K\x04tQ.",
    "in a list": b"\x80\x02](K\x01cos\nsystem\n" + text("true") + b"\x85Re.",
    "behind a real tensor": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n0cos\nsystem\n" + COMMAND,
}


@pytest.mark.parametrize("name", NAMED)
def test_a_command_is_named_and_not_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever opcode asks for it: the error tells the file and what it would have called."""
    monkeypatch.setattr(os, "system", lambda command: pytest.fail(f"{command} was run"))
    pickle = NAMED[name].replace(b"\x940", b"\x94").replace(b"_v2\n0", b"_v2\n")  # nothing here pops
    with pytest.raises(CheckpointError, match=r"^/folder/model\.pt: data\.pkl calls os\.system.*: it is not read"):
        reading(pickle)
    with pytest.raises(CheckpointError, match=r"^x/\.metadata calls os\.system"):
        pickled.parse(pickle, names=torch_archive.TENSORS, where="x/.metadata", persistent=lambda _: None)


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04tQ"
MANY = 20_000
HOSTILE = {
    "a known name built upon": (b"\x80\x02ctorch\nSize\n}" + text("x") + b"K\x01sb.", "changes a torch.Size"),
    "a name that is called on nothing": (b"\x80\x02" + text("os") + b")R.", "calls a str"),
    "an opcode of the extension registry": (b"\x80\x02\x82\x01.", "the pickle opcode 0x82"),
    "a persistent id in text": (b"\x80\x00P0\n.", "the pickle opcode 0x50"),
    "an object outside that is no storage": (
        b"\x80\x02" + text("x") + b"Q.",
        "an object outside of it that is no storage",
    ),
    "an integer without end": (b"\x80\x02\x8b\xff\xff\xff\x7f" + bytes(64) + b".", "an integer of 2,147,483,647 bytes"),
    "a text without end": (b"\x80\x02X\xff\xff\xff\x7fabc.", "its end is missing"),
    "no end": (b"\x80\x02N", "a damaged one"),
    "an empty stack": (b"\x80\x02.", "0 values at its end"),
    "below a mark": (b"\x80\x02N(a.", "its stack runs empty"),
    "state given without end": (
        b"\x80\x04" + b"}\x94(" + b"".join(text(f"{i:06}") + b"N" for i in range(1000)) + b"u"
        b"cx\nY\n)\x81" + b"h\x00b" * MANY + b".",
        "its state twice",
    ),
    "a size of too many dims": (b"\x80\x04ctorch\nSize\n(" + b"K\x01" * 65 + b"t\x85R.", "sizes that are none"),
    "pairs copied without end": (
        b"\x80\x04]\x94("
        + b"K\x01K\x02\x86" * 2000
        + b"e\x85\x94(ccollections\nOrderedDict\n\x94h\x01R"
        + b"h\x02h\x01R" * MANY
        + b"t\x86.",
        "asks for more work",
    ),
    "bytes copied without end": (
        b"\x80\x04X\x00\x40\x00\x00"
        + b"a" * 0x4000
        + text("latin1")
        + b"\x86\x94(c_codecs\nencode\n\x94h\x00R"
        + b"h\x01h\x00R" * MANY
        + b"t\x86.",
        "asks for more work",
    ),
    "a key that takes forever to hash": (
        b"\x80\x04}N\x85\x94" + b"".join(b"h" + bytes([i]) + b"\x86\x94" for i in range(60)) + b"Ns.",
        "a tuple as the key",
    ),
    "keys that collide": (b"\x80\x04}\x8a\x0a" + bytes(9) + b"\x01Ns.", "a int as the key"),
    "a tensor beyond its storage": (
        b"\x80\x02" + REBUILD + b"(" + STORAGE + b"K\x00K\x05\x85K\x01\x85\x89}tR.",
        "does not lie in its storage",
    ),
    "a tensor before its storage": (
        b"\x80\x02" + REBUILD + b"(" + STORAGE + b"J\xff\xff\xff\xffK\x01\x85K\x01\x85\x89}tR.",
        "no storage with a place",
    ),
    "strides that leave it": (
        b"\x80\x02" + REBUILD + b"(" + STORAGE + b"K\x00K\x02\x85K\x04\x85\x89}tR.",
        "does not lie in its storage",
    ),
    "a storage that is smaller": (
        b"\x80\x02" + STORAGE.replace(b"K\x04", b"K\x05") + b".",
        "has 16 bytes, expected 5 elements of float32",
    ),
    "a storage that is missing": (
        b"\x80\x02" + STORAGE.replace(text("0"), text("7")) + b".",
        "the data of storage 7 is missing",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_ends_in_an_error(name: str) -> None:
    pickle, said = HOSTILE[name]
    names = Names(objects=frozenset(["x.Y"]))
    with pytest.raises(CheckpointError, match=said) as caught:
        torch_archive.read(archive_of(pickle), where="/folder/model.pt", names=names)
    assert str(caught.value).startswith("/folder/model.pt")
    assert len(str(caught.value)) < 400


def test_nesting_is_no_recursion() -> None:
    """Lists in lists, very deep, and a tuple of 2**60 parts that are all one: read, shared, and dropped again."""
    nested = reading(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    assert type(nested) is list
    doubled = b"".join(b"h" + bytes([i, ord("h"), i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
    assert type(reading(b"\x80\x02(]q\x00" + doubled + b"t.")) is tuple
    del nested


def test_only_what_a_reader_names_is_kept() -> None:
    """As a name and its state: nothing is imported, nothing is made."""
    pickle = pickled.write(Named(Symbol("argparse", "Namespace"), (), {"lr": 0.1}, new=True))
    assert pickle_says(pickle) == {"argparse Namespace"}
    with pytest.raises(CheckpointError, match=r"calls argparse\.Namespace"):
        reading(pickle)
    found = torch_archive.read(archive_of(pickle), where="f", names=Names(objects=frozenset(["argparse.*"])))
    assert (str(found.symbol), found.fields) == ("argparse.Namespace", {"lr": 0.1})
    assert vars(python_pickle.loads(pickle)) == {"lr": 0.1}


def pickle_says(content: bytes) -> set[Any]:
    return {argument for opcode, argument, _ in pickletools.genops(content) if opcode.name == "GLOBAL"}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_python_are_read(protocol: int) -> None:
    value = {"a": [1, -5, 2**70, 1.5, None, True], "b": ("x" * 300, b"\x00\xff", (), {}), 3: {"c": [[], ["d"]]}}
    assert pickled.parse(python_pickle.dumps(value, protocol=protocol), names=Names(), where="it") == value


def test_an_outside_object_is_written_as_its_identity() -> None:
    content = pickled.write([Outside(("storage", 1)), "x", "x"])
    assert pickled.parse(content, names=Names(), where="it", persistent=list) == [["storage", 1], "x", "x"]
    with pytest.raises(TypeError, match="found a set"):
        pickled.write({1, 2})


def edited(content: bytes, was: bytes, now: bytes, count: int = -1) -> bytes:
    assert was in content
    return content.replace(was, now, count)


TENSOR = saved(torch.arange(4.0))
ENTRY = b"PK\x01\x02\x00\x00\x00\x00\x08\x08\x00\x00"  # of the directory: signature, versions, flags, method
DAMAGED = {
    "cut short": (TENSOR[:-1], "its end is missing"),
    "its first half": (TENSOR[:700], "its end is missing"),
    "nothing": (b"", "it is no zip archive"),
    "text": (b"some text", "it is no zip archive"),
    "of torch before 1.6": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "torch before 1.6"),
    "compressed": (edited(TENSOR, ENTRY, ENTRY[:-2] + b"\x08\x00"), "compressed"),
    "of another name": (edited(TENSOR, b"archive/data/0", b"archive/data/1", 1), "is not where its directory says"),
    "two folders": (edited(TENSOR, b"archive/version", b"another/version"), "in 2 folders"),
    "without a pickle": (edited(TENSOR, b"archive/data.pkl", b"archive/dato.pkl"), "without data.pkl"),
    "without data": (edited(TENSOR, b"archive/data/0", b"archive/dota/0"), "the data of storage 0 is missing"),
    "a pickle that was changed": (edited(TENSOR, b"FloatStorage", b"floatStorage"), "data.pkl is damaged"),
    "another byte order": (edited(TENSOR, b"Zlittle", b"Zbiggie"), "big-endian"),
    "a directory outside": (TENSOR[:-6] + b"\xff\xff\xff\xff\x00\x00", None),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_archive_is_told(name: str) -> None:
    content, said = DAMAGED[name]
    if said is None:  # harmless, for what matters is elsewhere
        assert torch_archive.read(content, where="f").info == TensorInfo((4,), "float32")
        return
    with pytest.raises(CheckpointError, match=said) as caught:
        torch_archive.read(content, where="/folder/model.pt")
    assert "/folder/model.pt" in str(caught.value)


def test_records_that_are_there_twice() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02N.")
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("archive/data.pkl", b"\x80\x02N.")
    with pytest.raises(CheckpointError, match=r"archive/data\.pkl is there twice"):
        torch_archive.read(buffer.getvalue(), where="f")


def test_a_stored_tensor_is_plain_data() -> None:
    assert isinstance(torch_archive.read(TENSOR, where="f"), Stored)
