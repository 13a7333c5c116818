"""Safetensors folders against the safetensors library, which writes what is read here and reads what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from converters.errors import CheckpointError
from converters.execute import TensorInfo, bits
from converters.stores import safetensors as store
from converters.stores.safetensors import (
    DTYPES,
    INDEX,
    SINGLE,
    MappedFiles,
    SafetensorsFolder,
    create,
    lay_out,
)

ODD_SHAPES = ((3, 5), (7,), (), (2, 0, 3), (1, 1, 1))
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def patterns(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bytes, as `dtype`; booleans are 0 and 1."""
    count = torch.Size(shape).numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=generator).to(torch.uint8)
    return raw.view(dtype).view(shape)


def every_dtype() -> dict[str, torch.Tensor]:
    """Every dtype in every shape, names in no order: files start their tensors aligned all the same."""
    return {
        f"{chr(ord('z') - 3 * place)}.{name}.{len(shape)}": patterns(shape, dtype, place)
        for place, shape in enumerate(ODD_SHAPES)
        for name, dtype in DTYPES.items()
    }


def sharded(folder: Path) -> dict[str, Any]:
    """Two files and their index."""
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.arange(6.0), "b": torch.zeros(2, 3)}, folder / FIRST)
    save_file({"c": torch.ones(4)}, folder / SECOND)
    index = {"metadata": {"total_size": 64}, "weight_map": {"a": FIRST, "b": FIRST, "c": SECOND}}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        SafetensorsFolder(folder)
    return str(raised.value)


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = every_dtype()
    save_file(tensors, tmp_path / SINGLE)
    held = SafetensorsFolder(tmp_path, quantized=True)
    assert held.tensors() == {key: TensorInfo(tuple(t.shape), t.dtype) for key, t in tensors.items()}
    for key, tensor in tensors.items():
        assert torch.equal(held.tensor(key).view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_reads_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    held = SafetensorsFolder(tmp_path)
    assert held.shards() == {FIRST: ["a", "b"], SECOND: ["c"]}
    assert torch.equal(held.tensor("c"), torch.ones(4))


@pytest.mark.parametrize("like", [False, True], ids=["own", "like"])
def test_writes_what_the_library_writes(tmp_path: Path, like: bool) -> None:
    """Byte for byte, whatever the order in which tensors are named."""
    tensors = every_dtype()
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    with safe_open(tmp_path / "expected", framework="pt") as handle:
        order = list(handle.offset_keys())
    infos = {key: TensorInfo(tuple(tensors[key].shape), tensors[key].dtype) for key in order}
    files = lay_out(dict(reversed(infos.items())), {SINGLE: order}) if like else lay_out(infos)
    create(tmp_path, files)
    written = MappedFiles(tmp_path, files)
    for key, tensor in tensors.items():
        written.tensor(key).copy_(tensor)
    del written
    assert (tmp_path / SINGLE).read_bytes() == (tmp_path / "expected").read_bytes()
    assert not (tmp_path / INDEX).exists()


def test_mixed_dtypes_start_aligned_and_are_read_by_the_library(tmp_path: Path) -> None:
    tensors = {
        f"{at}": patterns((3,), dtype, at) for at, dtype in enumerate((torch.int8, torch.float64, torch.bfloat16))
    }
    files = lay_out({key: TensorInfo((3,), t.dtype) for key, t in tensors.items()})
    create(tmp_path, files)
    written = MappedFiles(tmp_path, files)
    for key, tensor in tensors.items():
        assert written.tensor(key).data_ptr() % tensor.element_size() == 0
        written.tensor(key).copy_(tensor)
    del written
    for key, tensor in load_file(tmp_path / SINGLE).items():
        assert torch.equal(bits(tensor), bits(tensors[key]))


def test_shards_by_size_and_an_index_that_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_SHARD_BYTES", 100)
    infos = {name: TensorInfo((count,), torch.float32) for name, count in (("a", 20), ("b", 6), ("c", 40), ("d", 1))}
    files = lay_out(infos)
    assert [list(file.tensors) for file in files] == [["a"], ["b"], ["c"], ["d"]]
    create(tmp_path, files)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 4 * 67}
    assert index["weight_map"] == {name: f"model-{at:05}-of-00004.safetensors" for at, name in enumerate("abcd", 1)}
    assert SafetensorsFolder(tmp_path).tensors() == infos


def test_files_of_another_checkpoint_are_followed(tmp_path: Path) -> None:
    sharded(tmp_path / "source")
    held = SafetensorsFolder(tmp_path / "source")
    files = lay_out(dict(held.tensors()), held.shards())
    target = tmp_path / "target"
    target.mkdir()
    create(target, files)
    written = MappedFiles(target, files)
    for key in held.tensors():
        written.tensor(key).copy_(held.tensor(key))
    for file in (FIRST, SECOND):
        assert load_file(target / file).keys() == load_file(tmp_path / "source" / file).keys()
    assert json.loads((target / INDEX).read_text())["weight_map"] == {"a": FIRST, "b": FIRST, "c": SECOND}


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_text("precious")
    with pytest.raises(FileExistsError):
        create(tmp_path, lay_out({"a": TensorInfo((1,), torch.float32)}))
    assert (tmp_path / SINGLE).read_text() == "precious"


def test_an_index_and_files_that_disagree(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    index["weight_map"] |= {"lost": SECOND}
    del index["weight_map"]["b"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    message = refusal(tmp_path)
    assert f"{SECOND}: the index promises 'lost', the file lacks it" in message
    assert f"{FIRST}: holds 'b', which the index lacks" in message


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    save_file({"a": torch.ones(6), "c": torch.ones(4)}, tmp_path / SECOND)
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert f"{SECOND}: holds 'a', as {FIRST} does" in refusal(tmp_path)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/hostname", "sub/model.safetensors"])
def test_an_index_that_leads_outside_its_folder(tmp_path: Path, file: str) -> None:
    index = sharded(tmp_path)
    index["weight_map"]["a"] = file
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert f"names files outside its folder: {file}" in refusal(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": null}}']
)
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).write_text(text)
    assert "not an index with a weight_map" in refusal(tmp_path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / SECOND).unlink()
    assert f"names files that are not there (1):\n  {SECOND}" in refusal(tmp_path)
    (tmp_path / INDEX).unlink()
    assert f"expected {SINGLE} or {INDEX}, found {FIRST}" in refusal(tmp_path)


@pytest.mark.parametrize("left", [0, 4, 40, -1])
def test_a_truncated_file(tmp_path: Path, left: int) -> None:
    sharded(tmp_path)
    whole = (tmp_path / FIRST).read_bytes()
    (tmp_path / FIRST).write_bytes(whole[:left])
    assert f"files that cannot be trusted (1):\n  {FIRST}: " in refusal(tmp_path)


def test_a_dtype_that_cannot_be_converted(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "scale": torch.zeros(2).to(torch.float8_e5m2)}, tmp_path / SINGLE)
    assert "'scale' has dtype F8_E5M2, which cannot be converted yet" in refusal(tmp_path)
