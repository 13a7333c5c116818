"""Safetensors folders against the safetensors library, which writes what is read here and reads what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from safetensors_folders import FIRST, SECOND, sharded

from converters.execute import bits, info_of
from converters.files.safetensors import INDEX, SINGLE, lay_out
from converters.stores.safetensors import DTYPES, MappedFiles, SafetensorsFolder, create
from converters.tensors import TensorInfo

ODD_SHAPES = ((3, 5), (7,), (), (2, 0, 3), (1, 1, 1))


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
        if shape or name != "F4"  # numbers that share a byte have no scalar
    }


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = every_dtype()
    save_file(tensors, tmp_path / SINGLE)
    held = SafetensorsFolder(tmp_path, quantized=True)
    assert held.tensors() == {key: info_of(tensor) for key, tensor in tensors.items()}
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
    infos = {key: info_of(tensors[key]) for key in order}
    files = lay_out(dict(reversed(infos.items())), like={SINGLE: order}) if like else lay_out(infos)
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
    files = lay_out({key: info_of(tensor) for key, tensor in tensors.items()})
    create(tmp_path, files)
    written = MappedFiles(tmp_path, files)
    for key, tensor in tensors.items():
        assert written.tensor(key).data_ptr() % tensor.element_size() == 0
        written.tensor(key).copy_(tensor)
    del written
    for key, tensor in load_file(tmp_path / SINGLE).items():
        assert torch.equal(bits(tensor), bits(tensors[key]))


def test_shards_by_size_and_an_index_that_agrees(tmp_path: Path) -> None:
    infos = {name: TensorInfo((count,), "float32") for name, count in (("a", 20), ("b", 6), ("c", 40), ("d", 1))}
    files = lay_out(infos, max_shard_bytes=100)
    create(tmp_path, files)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_parameters": 67, "total_size": 4 * 67}
    assert index["weight_map"] == {
        name: f"model-{at:05}-of-00003.safetensors" for name, at in zip("abcd", (1, 3, 2, 3), strict=True)
    }
    assert SafetensorsFolder(tmp_path).tensors() == infos


def test_files_of_another_checkpoint_are_followed(tmp_path: Path) -> None:
    sharded(tmp_path / "source")
    held = SafetensorsFolder(tmp_path / "source")
    files = lay_out(held.tensors(), like=held.shards())
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
        create(tmp_path, lay_out({"a": TensorInfo((1,), "float32")}))
    assert (tmp_path / SINGLE).read_text() == "precious"
