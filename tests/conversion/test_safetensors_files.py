"""Safetensors folders without torch: laid out as transformers does, followed byte for byte, and never trusted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from safetensors_folders import FIRST, SECOND, entry, raw, sharded
from transformers import LlamaConfig, LlamaForCausalLM

from converters.artefacts import carried
from converters.errors import CheckpointError
from converters.files.extents import FolderLayout
from converters.files.module_order import in_module_order
from converters.files.safetensors import INDEX, SINGLE, Pattern, SafetensorsFiles, lay_out
from converters.files.safetensors_header import LONGEST
from converters.tensors import CODES, ITEMSIZE, STORAGES, TensorInfo

A, B = entry(0, 8), entry(8, 24)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        SafetensorsFiles(folder)
    return str(raised.value)


def refused(folder: Path, content: bytes) -> str:
    """What is said of a folder of one file, without the folder's name."""
    (folder / SINGLE).write_bytes(content)
    message = refusal(folder)
    assert message.startswith(f"{folder}: files that cannot be trusted (")
    return message.partition("\n")[2]


def written(layout: FolderLayout, source: SafetensorsFiles) -> dict[str, bytes]:
    """The files of a layout, with the bytes that the tensors have in `source`."""
    made = {path: bytearray(size) for path, size in layout.sizes.items()}
    for path, pieces in layout.fixed.items():
        for offset, content in pieces:
            made[path][offset : offset + len(content)] = content
    for chunk in layout.chunks:
        (extent,) = source.extents(chunk.key)
        data = extent.file.read_bytes()[extent.offset : extent.offset + chunk.info.nbytes]
        made[chunk.extent.file][chunk.extent.offset : chunk.extent.offset + len(data)] = data
    return {str(path): bytes(content) for path, content in (*made.items(), *layout.small.items())}


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("model*")}


def test_names_are_those_of_torch() -> None:
    from torch.storage import _dtype_to_storage_type_map

    assert {name: getattr(torch, name).itemsize for name in ITEMSIZE} == dict(ITEMSIZE)
    assert set(CODES.values()) == set(ITEMSIZE)
    known = {storage: str(dtype).removeprefix("torch.") for dtype, storage in _dtype_to_storage_type_map().items()}
    assert dict(STORAGES) == {storage: name for storage, name in known.items() if name in ITEMSIZE}
    info = TensorInfo((3, 5), "bfloat16")
    assert (info.elements, info.nbytes) == (15, 30)


# Laid out as others lay them out


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """A model as transformers saves it, in files of a given size."""
    root = tmp_path_factory.mktemp("saved")

    def save(size: str, tied: bool) -> Path:
        folder = root / f"{size}-{tied}"
        if not folder.exists():
            config = LlamaConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=11,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=33,
                attention_bias=True,
                mlp_bias=True,
                tie_word_embeddings=tied,
            )
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size=size)
        return folder

    return save


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("size", "limit"), [("30KB", 30_000), ("2KB", 2_000), ("1GB", 10**9)])
def test_laid_out_as_transformers_does(saved: Callable[[str, bool], Path], size: str, limit: int, tied: bool) -> None:
    """Files, headers and index, byte for byte, from nothing but shapes and dtypes in another order."""
    files = SafetensorsFiles(saved(size, tied))
    shuffled = dict(sorted(files.tensors().items(), key=lambda item: item[0][::-1]))
    assert written(lay_out(shuffled, max_shard_bytes=limit), files) == weights(files.root)
    assert files.remarks == ()


def test_another_checkpoint_is_followed_to_the_byte(tmp_path: Path) -> None:
    """Whatever its writer did: order, spaces, metadata, a wrong total in the index; and again from the kept headers."""
    sharded(tmp_path)
    odd = json.dumps({"b": entry(0, 24, shape=[2, 3]), "__metadata__": {"by": "ünknown"}, "a": entry(24, 48)}, indent=1)
    (tmp_path / FIRST).write_bytes(raw(odd + "   ", 48))
    (tmp_path / INDEX).write_text(
        "\n"
        + json.dumps({"weight_map": {"c": SECOND, "b": FIRST, "a": FIRST}, "metadata": {"total_size": 7}, "more": []})
    )
    files = SafetensorsFiles(tmp_path)
    assert files.shards() == {FIRST: ["b", "a"], SECOND: ["c"]}
    assert files.remarks == (f"{INDEX}: total_size is 7, the tensors have 64 bytes",)
    infos = dict(reversed(files.tensors().items()))
    assert written(lay_out(infos, like=files.pattern), files) == weights(tmp_path)
    kept = tmp_path / "kept"
    kept.mkdir()
    for path, content in files.pattern.files().items():
        (kept / path).write_bytes(content)
    pattern = Pattern.read(kept)
    assert pattern is not None
    assert pattern == files.pattern
    assert Pattern.read(tmp_path) is None


def test_only_what_still_holds_is_followed(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"c": torch.ones(4)}, tmp_path / SECOND, metadata={"by": "its writer"})
    files = SafetensorsFiles(tmp_path)
    infos = dict(files.tensors())
    layout = lay_out(infos | {"c": TensorInfo((4,), "bfloat16")}, like=files.pattern)
    assert layout.fixed[Path(FIRST)] == [(0, files.pattern.headers[FIRST].preamble)]
    ((_, header),) = layout.fixed[Path(SECOND)]
    assert b'{"__metadata__":{"by":"its writer"},"c":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]}}' in header
    assert json.loads(layout.small[Path(INDEX)])["metadata"] == {"total_parameters": 16, "total_size": 56}
    other = lay_out(infos | {"d": TensorInfo((1,), "int8")}, like=files.pattern, sidecars={Path("x/y"): b"z"})
    assert (list(other.sizes), dict(other.small)) == ([Path(SINGLE)], {Path("x/y"): b"z"})
    assert list(lay_out(infos, like=files.pattern, max_shard_bytes=10**6).sizes) == [Path(SINGLE)]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("model.safetensors", raw({"a": {"dtype": "F32"}}, 0), "'a': expected an object of"),
        ("model.safetensors", raw({"a": A}, 8), "not a header, or truncated"),
        ("..", raw({"a": A}, 0), "not of a .safetensors file"),
        ("model.bin", raw({"a": A}, 0), "not of a .safetensors file"),
    ],
)
def test_a_kept_layout_is_not_trusted(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / f"{name}.header").write_bytes(content)
    with pytest.raises(CheckpointError, match="kept layout that cannot be trusted") as raised:
        Pattern.read(tmp_path)
    assert expected in str(raised.value)


def test_a_kept_index_of_other_tensors(tmp_path: Path) -> None:
    (tmp_path / f"{FIRST}.header").write_bytes(raw({"a": A}, 0))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": FIRST, "b": SECOND}}))
    with pytest.raises(CheckpointError, match=f"promises other tensors in {SECOND}"):
        Pattern.read(tmp_path)


def test_the_order_of_modules() -> None:
    keys = ["lm_head.weight", "model.norm.weight", "model.layers.10.mlp.x", "model.layers.9.self_attn.o_proj.bias"]
    assert in_module_order(keys) == [keys[3], keys[2], keys[1], keys[0]]


# Headers that lie

LIES: dict[str, tuple[bytes, str]] = {
    "no length": (b"abc", "truncated: 3 bytes"),
    "empty": (b"", "truncated: 0 bytes"),
    "absurd length": ((LONGEST + 1).to_bytes(8, "little"), "a header of 100,000,001 bytes, at most 100,000,000"),
    "half a header": (raw({"a": A}, 8)[:40], "truncated: a header of 61 bytes in a file of 40"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
    "no JSON": (raw("{nonsense", 0), "no JSON: Expecting property name"),
    "a list": (raw("[]", 0), "expected JSON that begins with '{', found b'[]'"),
    "utf-16": (raw(json.dumps({"a": A}).encode("utf-16").decode("latin1"), 8), "expected JSON that begins with"),
    "not utf-8": (b"\x03" + bytes(7) + b"{\xff}", "no JSON: 'utf-8' codec"),
    "nested": (raw('{"a":' + "[" * 100_000, 0), "no JSON: "),
    "a long number": (raw('{"a":' + "9" * 5000 + "}", 0), "no JSON: Exceeds the limit"),
    "a key twice": (raw('{"a": X, "a": X}'.replace("X", json.dumps(A)), 8), "'a' is named twice"),
    "a field twice": (raw('{"a": {"dtype":"F32","shape":[2],"dtype":"F16","data_offsets":[0,8]}}', 8), "'dtype' is"),
    "metadata of numbers": (raw({"a": A, "__metadata__": {"x": 1}}, 8), "__metadata__ is not an object of strings"),
    "metadata a list": (raw({"a": A, "__metadata__": []}, 8), "__metadata__ is not an object of strings"),
    "an entry of nothing": (raw({"a": None}, 0), "'a': expected an object of data_offsets, dtype, shape, found None"),
    "a field more": (raw({"a": A | {"x": 1}}, 8), "found ['data_offsets', 'dtype', 'shape', 'x']"),
    "a field less": (raw({"a": {"dtype": "F32", "shape": [2]}}, 8), "found ['dtype', 'shape']"),
    "unknown dtype": (raw({"a": entry(0, 8, dtype="BF61")}, 8), "'a': dtype 'BF61' is unknown"),
    "a number as dtype": (raw({"a": entry(0, 8, dtype=3)}, 8), "'a': dtype 3 is unknown"),
    "complex": (raw({"a": entry(0, 8, dtype="C64", shape=[1])}, 8), "'a': dtype 'C64' is unknown"),
    "wrong dtype": (
        raw({"a": entry(0, 8, dtype="BF16")}, 8),
        "'a': BF16 of shape [2] is 4 bytes, its data_offsets span 8",
    ),
    "wrong shape": (raw({"a": entry(0, 8, shape=[2, 2])}, 8), "'a': F32 of shape [2, 2] is 16 bytes"),
    "huge shape": (raw({"a": entry(0, 8, shape=[2**62, 2**62])}, 8), "'a': F32 of shape [46"),
    "too many dims": (raw({"a": entry(0, 8, shape=[1] * 65)}, 8), "expected a list of sizes"),
    "negative size": (raw({"a": entry(0, 8, shape=[-1, -2])}, 8), "'a': its shape is [-1, -2]"),
    "true as size": (raw({"a": entry(0, 4, shape=[True])}, 4), "'a': its shape is [True]"),
    "a float as size": (raw({"a": entry(0, 8, shape=[2.0])}, 8), "'a': its shape is [2.0]"),
    "half a byte": (raw({"a": entry(0, 8, dtype="F4", shape=[3, 5])}, 8), "numbers of dtype F4 do not fill bytes"),
    "negative offset": (raw({"a": A | {"data_offsets": [-8, 0]}}, 8), "'a': data_offsets are [-8, 0]"),
    "offsets swapped": (raw({"a": A | {"data_offsets": [8, 0]}}, 8), "'a': data_offsets are [8, 0]"),
    "one offset": (raw({"a": A | {"data_offsets": [8]}}, 8), "'a': data_offsets are [8]"),
    "a huge offset": (raw({"a": A | {"data_offsets": [0, 2**64]}}, 8), "'a': data_offsets are [0, 1844"),
    "an overlap": (raw({"a": A, "b": entry(4, 12)}, 12), "'b' begins at byte 4, inside 'a', which ends at 8"),
    "the same place": (raw({"a": A, "b": A}, 8), "'b' begins at byte 0, inside 'a', which ends at 8"),
    "a hole": (raw({"a": A, "b": entry(12, 20)}, 20), "'b' begins at byte 12, and the 4 before it belong to no tensor"),
    "a hole first": (raw({"b": B}, 24), "'b' begins at byte 8, and the 8 before it belong to no tensor"),
    "truncated": (raw({"a": A, "b": B}, 20), "'b' ends at byte 24, and the file has 20: truncated"),
    "beyond the end": (raw({"a": A, "b": entry(8, 2**40 + 8)}, 24), "'b' ends at byte 1,099,511,627,784"),
    "a tail": (raw({"a": A}, 13), "the last 5 bytes belong to no tensor"),
    "a name that hides": (raw({"a\x1b[2K": A}, 8), "'a\\x1b[2K': a name with characters that cannot be printed"),
    "half a character": (
        raw('{"\\ud800": X}'.replace("X", json.dumps(A)), 8),
        "a name with characters that cannot be printed",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(tmp_path: Path, lie: str) -> None:
    content, expected = LIES[lie]
    message = refused(tmp_path, content)
    assert f"{SINGLE}: " in message
    assert expected in message


def test_all_lies_at_once(tmp_path: Path) -> None:
    header = {"a": entry(0, 8, dtype="??"), "b": entry(4, 12, shape=[9]), "c": entry(16, 20), "d": None}
    lines = refused(tmp_path, raw(header, 24)).splitlines()
    assert [line.split(": ")[1].split(" ")[0] for line in lines] == ["'a'", "'b'", "'b'", "'d'"]


def test_a_header_may_end_in_spaces_and_hold_nothing_else(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(
        raw(json.dumps({"s": entry(0, 4, shape=[]), "e": entry(4, 4, shape=[0, 3])}) + "  ", 4)
    )
    assert dict(SafetensorsFiles(tmp_path).tensors()) == {
        "s": TensorInfo((), "float32"),
        "e": TensorInfo((0, 3), "float32"),
    }
    (tmp_path / SINGLE).write_bytes(raw("{}", 0))
    assert not SafetensorsFiles(tmp_path).tensors()


def test_quantised_tensors_are_shown_to_those_who_ask(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "scale": torch.zeros(2).to(torch.float8_e5m2)}, tmp_path / SINGLE)
    assert "'scale' is quantised (F8_E5M2) and needs its scales" in refusal(tmp_path)
    assert SafetensorsFiles(tmp_path, quantized=True).tensors()["scale"] == TensorInfo((2,), "float8_e5m2")


# Indexes that lie


def test_an_index_and_files_that_disagree(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    index["weight_map"] |= {"lost": SECOND}
    del index["weight_map"]["b"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    message = refusal(tmp_path)
    assert f"{SECOND}: the index promises 'lost', the file lacks it" in message
    assert f"{FIRST}: holds 'b', which the index lacks" in message


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"a": torch.ones(6), "c": torch.ones(4)}, tmp_path / SECOND)
    assert f"{SECOND}: holds 'a', as {FIRST} does" in refusal(tmp_path)


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/etc/hostname", "sub/model.safetensors", "..", ".", "", "a\0.safetensors", "model.bin"],
)
def test_an_index_that_leads_outside_its_folder(tmp_path: Path, file: str) -> None:
    index = sharded(tmp_path)
    index["weight_map"]["a"] = file
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert f"names what is no .safetensors file of its folder: {file!r}" in refusal(tmp_path)


NO_MAP = "not an index with a weight_map"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected JSON that begins with"),
        ("{", "no JSON"),
        ("[]", "expected JSON that begins with"),
        ("{}", NO_MAP),
        ('{"weight_map": {}}', NO_MAP),
        ('{"weight_map": []}', NO_MAP),
        ('{"weight_map": {"a": 3}}', NO_MAP),
        ('{"weight_map": {"a": null}}', NO_MAP),
        ('{"weight_map": {"a": {"b": "c"}}}', NO_MAP),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' is named twice"),
    ],
)
def test_an_index_that_is_none(tmp_path: Path, text: str, expected: str) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).write_text(text)
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / INDEX}: cannot be trusted (1):\n")
    assert expected in message


def test_files_that_are_not_there(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / SECOND).unlink()
    assert f"files that cannot be trusted (1):\n  {SECOND}: is not there" in refusal(tmp_path)
    (tmp_path / INDEX).unlink()
    assert f"expected {SINGLE} or {INDEX}, found {FIRST}" in refusal(tmp_path)
    (tmp_path / SINGLE).mkdir()
    assert f"expected {SINGLE} or {INDEX}" in refusal(tmp_path)


def test_two_checkpoints_in_one_folder(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / SINGLE)
    assert f"holds both {SINGLE} and {INDEX}" in refusal(tmp_path)


def test_a_file_that_the_index_does_not_name_changes_nothing(tmp_path: Path) -> None:
    sharded(tmp_path)
    stray = "model-00003-of-00003.safetensors"
    (tmp_path / stray).write_bytes(b"")
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    assert SafetensorsFiles(tmp_path).remarks == (f"{stray}: the index does not name it",)


# Links


def test_files_beside_the_weights_may_not_be_links_out_of_the_folder(tmp_path: Path) -> None:
    """They would be copied: a checkpoint could have what only its reader may read carried into an export."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    (folder / "real.json").write_text("{}")
    (folder / "link.json").symlink_to("real.json")
    assert carried(folder) == [Path("link.json"), Path("real.json")]
    (folder / "notes.txt").symlink_to("../secret")
    with pytest.raises(CheckpointError, match="links that lead out of it") as raised:
        carried(folder)
    assert f"notes.txt -> {tmp_path / 'secret'}" in str(raised.value)


@pytest.mark.parametrize("name", [SECOND, INDEX])
def test_a_link_out_of_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoint"
    sharded(folder)
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    message = refusal(folder)
    assert f"is a link out of {'the' if name == SECOND else 'its'} folder, to {tmp_path / name}" in message
    assert name in message


def test_links_of_all_kinds(tmp_path: Path) -> None:
    """In the folder they are followed, and so is one to the folder; to nothing or in a circle they are errors."""
    folder = tmp_path / "checkpoint"
    sharded(folder)
    (folder / SECOND).rename(folder / "other")
    (folder / SECOND).symlink_to("other")
    (tmp_path / "link").symlink_to(folder)
    assert SafetensorsFiles(tmp_path / "link").tensors() == SafetensorsFiles(folder).tensors()
    (folder / "other").unlink()
    assert f"{SECOND}: is a link to nothing" in refusal(folder)
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to(SECOND)
    assert f"{SECOND}: " in refusal(folder)


def test_the_hub_cache(tmp_path: Path) -> None:
    """Its files are links to the blobs of the same repository; those of another are not this one's."""
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    sharded(snapshot)
    blobs.mkdir()
    for at, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / f"{at}")
        path.symlink_to(f"../../blobs/{at}")
    assert SafetensorsFiles(snapshot).tensors().keys() == {"a", "b", "c"}
    copied = tmp_path / "models--org--name" / "copies" / "0123"
    shutil.copytree(snapshot, copied, symlinks=True)
    assert "is a link out of" in refusal(copied)
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (snapshot / SECOND).rename(other / "x")
    (snapshot / SECOND).symlink_to(other / "x")
    assert f"{SECOND}: is a link" in refusal(snapshot)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    """A pipe would wait for a writer for ever; a folder is no file."""
    import os

    sharded(tmp_path)
    (tmp_path / FIRST).unlink()
    os.mkfifo(tmp_path / FIRST)
    (tmp_path / SECOND).unlink()
    (tmp_path / SECOND).mkdir()
    assert refusal(tmp_path).count("is not there") == 2


def test_extents_are_where_the_library_put_the_bytes(tmp_path: Path) -> None:
    tensors: Mapping[str, Any] = {"x": torch.arange(5.0), "y": torch.arange(6, dtype=torch.int8).view(2, 3)}
    save_file(dict(tensors), tmp_path / SINGLE)
    files = SafetensorsFiles(tmp_path)
    content = (tmp_path / SINGLE).read_bytes()
    for key, tensor in tensors.items():
        (extent,) = files.extents(key)
        assert (extent.file, extent.starts, extent.shape) == (tmp_path / SINGLE, (0,) * tensor.dim(), tensor.shape)
        assert content[extent.offset :][: tensor.nbytes] == tensor.numpy().tobytes()
