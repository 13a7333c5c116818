"""Folders of torch.distributed.checkpoint: read whoever cut them, written as torch reads them, refused if they lie."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch_files import Box, boxed, fill, info_of, saved, tensor_of

from converters import pickled
from converters.errors import CheckpointError
from converters.files import dcp, dcp_metadata, torch_archive
from converters.files.dcp import DcpFiles
from converters.files.dcp_metadata import DcpMetadata, Piece, Place

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STATE = {
    "model": {"a.weight": torch.randn(5, 7).bfloat16(), "b": torch.tensor(3.0), "n": 5, "empty": torch.zeros(0, 3)},
    "optimizer": {"state": {"exp_avg": torch.ones(3), "lr": 0.1}},
    "freqs": torch.zeros(2, dtype=torch.complex64),
}


def test_what_torch_saves_is_read(tmp_path: Path) -> None:
    torch_dcp.save(STATE, checkpoint_id=tmp_path, no_dist=True)
    files = DcpFiles(tmp_path, prefix="model.")
    expected = {key: value for key, value in STATE["model"].items() if isinstance(value, torch.Tensor)}
    assert files.tensors() == {key: info_of(value) for key, value in expected.items()}
    for key, value in expected.items():
        assert torch.equal(tensor_of(files, key), value)
    assert set(files.keys()) == {"model.a.weight", "model.b", "model.n", "model.empty", "freqs"} | {
        "optimizer.state.exp_avg",
        "optimizer.state.lr",
    }
    assert files.left_alone["optimizer state"].startswith("1 tensor, 12 bytes, not weights; 1 object, 1.")
    assert files.left_alone["n"].startswith("1 object, ")
    assert files.left_alone["outside of 'model.'"].startswith("1 tensor")
    assert torch_archive.read(files.object("model.n"), where="n") == 5
    assert DcpFiles(tmp_path).left_alone["tensors of dtype complex64"].startswith("1 tensor")
    with pytest.raises(CheckpointError, match=r"has no object 'model\.b'"):
        files.object("model.b")


def test_torch_loads_what_is_written(tmp_path: Path) -> None:
    tensors = {"layers.w": torch.randn(3, 4, 5), "experts.w": torch.randn(2, 3, 4).bfloat16(), "norm": torch.randn(7)}
    split = {"layers.w": 1, "experts.w": 2}
    layout = dcp.lay_out(
        {key: info_of(tensor) for key, tensor in tensors.items()},
        split=split,
        extra_states=["layers._extra_state/shard_0_1"],
        objects={"n": torch_archive.save([1, "x"])},
    )
    assert [chunk.extent.shape for chunk in layout.chunks] == [(1, 4, 5)] * 3 + [(1, 1, 4)] * 6 + [(7,)]
    assert all(chunk.extent.offset % 64 == 0 for chunk in layout.chunks)
    assert pickle.loads(pickle.dumps(layout.chunks)) == layout.chunks  # they are sent to other processes
    fill(layout, tmp_path / "made", tensors)
    loaded = {key: torch.full_like(tensor, float("nan")) for key, tensor in tensors.items()}
    torch_dcp.load(loaded, checkpoint_id=tmp_path / "made", no_dist=True)
    dcp_to_torch_save(tmp_path / "made", tmp_path / "all.pt")
    everything = torch.load(tmp_path / "all.pt", weights_only=True)
    files = DcpFiles(tmp_path / "made")
    for key, tensor in tensors.items():
        assert torch.equal(loaded[key], tensor)
        assert torch.equal(everything[key], tensor)
        assert torch.equal(tensor_of(files, key), tensor)
    assert everything["layers._extra_state/shard_0_1"] == [None]
    assert everything["n"] == [1, "x"]
    content = (tmp_path / "made" / "__0_0.distcp").read_bytes()
    for pieces in files.metadata.pieces.values():
        for piece in pieces:
            box = tensors["norm"] if piece.shape == (7,) else None
            archive = content[piece.place.offset :][: piece.place.size]
            assert box is None or torch_archive.read(archive, where="it").info == info_of(box)


def test_metadata_is_what_it_was() -> None:
    """Written and read; and as Python's own unpickler and torch's classes see it."""
    place = Place("__0_0.distcp", 3_000_000_000, 70)
    metadata = DcpMetadata(
        tensors={"a": info_of(torch.zeros(300, 70000)), "s": info_of(torch.zeros(()))},
        pieces={"a": [Piece((0, 0), (300, 70000), place)], "s": [Piece((), (), place)]},
        objects={"o": place},
    )
    content = dcp_metadata.write(metadata)
    assert dcp_metadata.parse(content, where="it") == metadata
    theirs: torch_dcp.Metadata = pickle.loads(content)
    assert theirs.state_dict_metadata["a"].properties == torch_dcp.metadata.TensorProperties(dtype=torch.float32)
    assert theirs.storage_data[torch_dcp.metadata.MetadataIndex("a", (0, 0))].offset == 3_000_000_000
    assert theirs.storage_data[torch_dcp.metadata.MetadataIndex("o")].length == 70
    assert (theirs.version, theirs.planner_data["a"]) == ("1.0.0", ("a",))
    again = pickle.dumps(theirs)
    assert dcp_metadata.parse(again, where="it") == metadata


GRID: list[Box] = [((i, j), (2, 3)) for i, j in itertools.product((0, 2), (0, 3))]
CUTS: dict[str, list[Box]] = {
    "one": [((0, 0), (4, 6))],
    "rows, as FSDP cuts them, the last rank's fewer": [((0, 0), (3, 6)), ((3, 0), (1, 6))],
    "two dims": GRID,
    "a pinwheel": [((0, 0), (1, 4)), ((0, 4), (3, 2)), ((3, 2), (1, 4)), ((1, 0), (3, 2)), ((1, 2), (2, 2))],
    "an empty box of a rank without rows": [((0, 0), (4, 6)), ((4, 0), (0, 6))],
}
WHOLE = torch.arange(24.0).view(4, 6)


@pytest.mark.parametrize("name", CUTS)
def test_boxes_of_any_cut_are_put_together(name: str, tmp_path: Path) -> None:
    boxed(tmp_path, WHOLE, CUTS[name])
    assert torch.equal(tensor_of(DcpFiles(tmp_path), "weight"), WHOLE)
    loaded = {"weight": torch.zeros(4, 6)}
    torch_dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(loaded["weight"], WHOLE)


def test_a_box_that_is_no_row_major_piece(tmp_path: Path) -> None:
    """A transposed tensor, and a view into a larger storage, as torch saves them: more extents, the same elements."""
    for number, tensor in enumerate((WHOLE.T, WHOLE[:, 2:5], torch.randn(2, 3, 4).transpose(0, 1)[:, :, 1:3])):
        folder = tmp_path / str(number)
        metadata = boxed(folder, tensor.contiguous(), [((0,) * tensor.ndim, tuple(tensor.shape))])
        content = saved(tensor)
        (folder / "__0_0.distcp").write_bytes(content)
        (piece,) = metadata.pieces["weight"]
        moved = replace(metadata, pieces={"weight": [replace(piece, place=replace(piece.place, size=len(content)))]})
        files = DcpFiles(folder, metadata=moved)
        assert len(files.extents("weight")) > 1
        assert torch.equal(tensor_of(files, "weight"), tensor)


def place(**changes: Any) -> Callable[[Piece], Piece]:
    return lambda piece: replace(piece, place=replace(piece.place, **changes))


FAULTS: dict[str, tuple[Callable[[Piece], Piece], str]] = {
    "a folder above": (place(file="../x.distcp"), r"names '../x\.distcp', a file outside of its folder"),
    "an absolute path": (place(file="/etc/passwd"), r"names '/etc/passwd', a file outside"),
    "the folder itself": (place(file="."), "outside of its folder"),
    "a link to a folder elsewhere": (place(file="link/x.distcp"), "is a link out of its folder"),
    "a name with a zero": (place(file="a\0b"), r"names 'a.*x00b', a file outside"),
    "a name without end": (place(file="a" * 5000), "cannot be read"),
    "no such file": (place(file="__1_0.distcp"), r"the file __1_0\.distcp is missing"),
    "an empty file": (place(file="empty.distcp"), r"the file empty\.distcp cannot be read"),
    "beyond the file": (place(offset=10**15), "are promised, and it has"),
    "more than there is": (place(size=10**15), "are promised, and it has"),
    "not where an archive begins": (place(offset=1), "not an archive of torch.save"),
    "shorter than an archive": (place(size=8), "not an archive of torch.save"),
    "compressed": (place(transforms=("zstd",)), r"were transformed \(zstd\)"),
    "another shape": (lambda piece: replace(piece, starts=(1, 3), shape=(3, 3)), r"at \[0, 3\] and \[1, 3\] overlap"),
    "a hole": (lambda piece: replace(piece, shape=(2, 2)), "hold 22 of 24 elements: they leave holes"),
    "outside of the tensor": (
        lambda piece: replace(piece, starts=(3, 3)),
        r"at \[3, 3\] of \[2, 3\] leaves the tensor",
    ),
    "of other dims": (lambda piece: replace(piece, starts=(0,), shape=(6,)), "a box of 1 dims in a tensor of 2"),
    "on another": (lambda piece: replace(piece, starts=(0, 1)), r"its boxes at \[0, 0\] and \[0, 1\] overlap"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_trusted_is_told(name: str, tmp_path: Path) -> None:
    """With the folder and the tensor; a second fault in another tensor is told as well."""
    folder = tmp_path / "checkpoint"
    change, said = FAULTS[name]
    metadata = boxed(folder, WHOLE, GRID)
    (folder / "empty.distcp").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.distcp").write_bytes((folder / "__0_0.distcp").read_bytes())
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "x.distcp").write_bytes((folder / "__0_0.distcp").read_bytes())
    *rest, last = metadata.pieces["weight"]
    pieces = {"weight": [*rest, change(last)], "other": [place(file="gone.distcp")(piece) for piece in (*rest, last)]}
    lying = replace(metadata, tensors=dict.fromkeys(("weight", "other"), info_of(WHOLE)), pieces=pieces)
    (folder / ".metadata").write_bytes(dcp_metadata.write(lying))
    with pytest.raises(CheckpointError, match=said) as caught:
        DcpFiles(folder, metadata=lying if "transforms" in str(lying) and name == "compressed" else None)
    assert f"{folder}: a checkpoint that cannot be trusted" in str(caught.value)
    assert "weight" in str(caught.value)
    assert "gone.distcp is missing; of other" in str(caught.value)


def test_an_archive_of_something_else(tmp_path: Path) -> None:
    for number, (content, said) in enumerate(
        (
            (saved(torch.zeros(6, 4)), r"expected \[4, 6\] float32, found \[6, 4\] float32"),
            (saved(WHOLE.bfloat16()), r"expected \[4, 6\] float32, found \[4, 6\] bfloat16"),
            (saved([WHOLE]), r"expected \[4, 6\] float32, found list"),
        )
    ):
        metadata = boxed(tmp_path / str(number), WHOLE, CUTS["one"])
        (tmp_path / str(number) / "__0_0.distcp").write_bytes(content)
        (piece,) = metadata.pieces["weight"]
        with pytest.raises(CheckpointError, match=said):
            DcpFiles(
                tmp_path / str(number),
                metadata=replace(metadata, pieces={"weight": [place(size=len(content))(piece)]}),
            )


def test_a_file_may_be_a_link(tmp_path: Path) -> None:
    """As in the cache of the hub, where every file of a snapshot is one."""
    boxed(tmp_path / "blobs", WHOLE, GRID)
    inner = tmp_path / "snapshots" / "0a1b" / "iter_0000000"
    inner.mkdir(parents=True)
    for file in (tmp_path / "blobs").iterdir():
        (inner / file.name).symlink_to(file)
    assert torch.equal(tensor_of(DcpFiles(inner), "weight"), WHOLE)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"expected \.metadata, found model\.safetensors"):
        DcpFiles(tmp_path)


class Hostile:
    def __reduce__(self) -> Any:
        return print, ("it was run",)


def test_metadata_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A command where the planner's data is, as Python pickles it; other values; parts that are missing."""
    metadata = torch_dcp.Metadata({}, planner_data=Hostile(), storage_data={})
    for content, said in (
        (pickle.dumps(metadata), r"/\.metadata calls builtins\.print"),
        (pickle.dumps(metadata, protocol=2), r"/\.metadata calls __builtin__\.print"),
        (pickle.dumps([1]), "holds a list, expected the Metadata"),
        (pickle.dumps(torch_dcp.Metadata({}, storage_data=None)), "storage_data is a NoneType"),
        (pickle.dumps(torch_dcp.Metadata({"x": 5}, storage_data={})), "x: a int, expected TensorStorageMetadata"),  # type: ignore[dict-item]
        (pickle.dumps(torch_dcp.Metadata({5: 5}, storage_data={})), "a key that is a int"),  # type: ignore[dict-item]
        (
            pickle.dumps(torch_dcp.Metadata({"x": torch_dcp.BytesStorageMetadata()}, storage_data={})),
            "x: no bytes are recorded for this object",
        ),
        (b"", "is no pickle"),
    ):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointError, match=said):
            DcpFiles(tmp_path)
    assert capsys.readouterr().out == ""


def test_many_boxes_are_checked_in_turn(tmp_path: Path) -> None:
    """A tensor cut into 40,000 boxes, and one whose cuts would make the check quadratic."""
    grid: list[Box] = [((i, j), (1, 1)) for i, j in itertools.product(range(200), range(200))]
    assert dcp.uncovered(grid, (200, 200)) is None
    assert dcp.uncovered([*grid[:-1], grid[0]], (200, 200)) == "its boxes at [0, 0] and [0, 0] overlap"
    stairs: list[Box] = [((i, 0), (40_000 - i, 1)) for i in range(20_000)]
    assert dcp.uncovered(stairs, (40_000, 2)) == "its boxes are cut too irregularly to be checked"
    assert dcp.uncovered([((), ())], ()) is None
    assert dcp.uncovered([((), ()), ((), ())], ()) == "its boxes at [] and [] overlap"
    assert dcp.uncovered([], ()) == "its boxes hold 0 of 1 elements: they leave holes"


def test_names_in_messages_are_plain() -> None:
    assert pickled.shown("a\nb\x1b[2J" + "x" * 500) == "a\\nb\\x1b[2J" + "x" * 106 + "..."


def test_values_that_are_not_the_bytes_are_refused(tmp_path: Path) -> None:
    plain = torch.arange(6.0)
    torch_dcp.save({"a.weight": torch._neg_view(plain), "b": plain}, checkpoint_id=tmp_path / "lazy", no_dist=True)
    with pytest.raises(CheckpointError, match=r"a\.weight.* neg still to be done"):
        DcpFiles(tmp_path / "lazy")
    torch_dcp.save({"a.weight": plain.to(torch.float8_e4m3fn), "b": plain}, checkpoint_id=tmp_path / "8", no_dist=True)
    with pytest.raises(CheckpointError, match=r"a\.weight is quantised \(float8_e4m3fn\) and needs its scales"):
        DcpFiles(tmp_path / "8")
