"""Hugging Face folders into Megatron checkpoints and back, file to file: bytes, padding, settings, other layouts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from converters.bridge import AutoBridge
from converters.checkpoint import Checkpoint
from converters.commands.account import print_account
from converters.convert import Conversion, convert_folder
from converters.errors import CheckpointError, ConfigError, ConversionError
from converters.files.verify import verify
from converters.megatron.rope import are_frequencies, frequencies_of_fields
from converters.models import FAMILIES
from converters.sources import read_config
from converters.topology import Topology
from parity.seeded import write_checkpoint
from parity.tiny import odd_config, shrink, with_layers

ODD = with_layers(odd_config(), 3) | {"hidden_size": 30, "intermediate_size": 45}
TIED = with_layers(shrink(read_config("meta-llama/Llama-3.2-1B")), 2)
MODELS = {"biased": ODD, "attention-biased": ODD | {"mlp_bias": False}, "tied": TIED}
EMBEDDING = "embedding.word_embeddings.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    shards = {"biased": 3}
    return {name: write_checkpoint(config, root / name, shards=shards.get(name, 1)) for name, config in MODELS.items()}


def to_megatron(source: Path, target: Path, **options: Any) -> Conversion:
    return convert_folder(source, target, target_column="megatron", **options)


def to_hf(source: Path, target: Path, **options: Any) -> Conversion:
    return convert_folder(source, target, target_column="hf", **options)


def files(folder: Path) -> dict[str, bytes]:
    """All that a folder holds, but what no conversion takes along: hidden files."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".complete")
    }


def changed(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a model of one file, with other tensors; of several files, in one."""
    shutil.copytree(source, target)
    held = {key: tensor for path in sorted(target.glob("*.safetensors")) for key, tensor in load_file(path).items()}
    for path in target.glob("*.safetensors*"):
        path.unlink()
    change(held)
    save_file(held, target / "model.safetensors", metadata={"format": "pt"})
    return target


def iteration(folder: Path) -> Path:
    return folder / "iter_0000000"


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "per-layer"])
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_the_same_to_the_byte(
    folders: dict[str, Path], tmp_path: Path, name: str, stacked: bool
) -> None:
    done = to_megatron(folders[name], tmp_path / "megatron", stacked=stacked)
    back = to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert files(tmp_path / "hf") == files(folders[name])
    assert (done.columns, back.columns) == (("hf", "megatron"), ("megatron", "hf"))
    assert back.tensors == done.tensors[::-1]
    assert sum(chunk.nbytes for chunk in done.written) == done.bytes
    assert set(back.left_alone) == {"_extra_state"}
    assert Checkpoint.open(tmp_path / "megatron").column == ("megatron_dist" if stacked else "megatron")


def test_headers_that_another_library_wrote_come_back(folders: dict[str, Path], tmp_path: Path) -> None:
    """Tensors in no order of names, and metadata of its own."""
    source = tmp_path / "source"
    shutil.copytree(folders["tied"], source)
    held = load_file(source / "model.safetensors")
    save_file(dict(reversed(held.items())), source / "model.safetensors", metadata={"format": "pt", "by": "someone"})
    first = (source / "model.safetensors").read_bytes()
    size = int.from_bytes(first[:8], "little")
    header = first[8 : 8 + size] + b" " * 16
    longer = len(header).to_bytes(8, "little") + header + first[8 + size :]
    (source / "model.safetensors").write_bytes(longer)
    to_megatron(source, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert files(tmp_path / "hf") == files(source)


@pytest.mark.parametrize("options", [{}, {"stacked": False, "make_vocab_size_divisible_by": 64, "tp": 2}])
def test_a_tied_head_that_was_stored_comes_back(
    folders: dict[str, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    source = changed(
        folders["tied"],
        tmp_path / "source",
        lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].clone()}),
    )
    to_megatron(source, tmp_path / "megatron", **options)
    convert_folder(tmp_path / "megatron", tmp_path / "other", target_column=None, stacked=bool(options))
    for name in ("megatron", "other"):
        to_hf(tmp_path / name, tmp_path / f"hf-{name}")
        assert files(tmp_path / f"hf-{name}") == files(source)
    done = to_hf(tmp_path / "megatron", tmp_path / "rounded", dtype="bfloat16")
    assert done.tensors[1] == len(load_file(source / "model.safetensors"))
    to_hf(tmp_path / "megatron", tmp_path / "without", like=folders["tied"])
    assert files(tmp_path / "without") == files(folders["tied"])


class TestRotaryBuffers:
    NAME = "model.layers.1.self_attn.rotary_emb.inv_freq"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_they_are_dropped_and_said(self, folders: dict[str, Path], tmp_path: Path, dtype: torch.dtype) -> None:
        stored = torch.nextafter(self.right(), torch.tensor(9.0)).to(dtype)
        names = [self.NAME.replace("1", str(layer), 1) for layer in range(ODD["num_hidden_layers"])]
        buffers = {name: stored.clone() for name in names}
        source = changed(folders["biased"], tmp_path / "source", lambda held: held.update(buffers))
        done = to_megatron(source, tmp_path / "megatron")
        assert sorted(done.dropped) == names
        to_hf(tmp_path / "megatron", tmp_path / "hf")
        assert self.NAME not in load_file(tmp_path / "hf" / "model.safetensors")

    @pytest.mark.parametrize("factor", [1.001, 0.0, float("nan")])
    def test_others_than_the_config_s_are_refused(
        self, folders: dict[str, Path], tmp_path: Path, factor: float
    ) -> None:
        stored = self.right() * factor
        source = changed(folders["biased"], tmp_path / "source", lambda held: held.update({self.NAME: stored}))
        with pytest.raises(CheckpointError, match=self.NAME):
            to_megatron(source, tmp_path / "x")

    def test_positions_may_be_divided_instead(self) -> None:
        fields = {"head_dim": 8, "rope_theta": 10_000.0, "rope_type": "linear", "rope_factor": 4.0}
        plain = frequencies_of_fields({**fields, "rope_type": "default"})
        assert are_frequencies(plain, fields)
        assert are_frequencies(plain / 4, fields)
        assert not are_frequencies(plain / 2, fields)
        assert not are_frequencies(plain / 4, {**fields, "rope_type": "default"})
        assert not are_frequencies(torch.ones(4, dtype=torch.int64), fields)

    def right(self) -> torch.Tensor:
        return frequencies_of_fields(FAMILIES[0].fields.read(ODD)[0])


def test_a_dtype_that_is_not_the_config_s_is_told(folders: dict[str, Path], tmp_path: Path) -> None:
    def halved(held: dict[str, torch.Tensor]) -> None:
        held |= {key: tensor.bfloat16() for key, tensor in held.items() if "norm" not in key}

    source = changed(folders["tied"], tmp_path / "source", halved)
    held = load_file(source / "model.safetensors")
    count = sum(tensor.dtype == torch.bfloat16 for tensor in held.values())
    assert 0 < count < len(held)
    done = to_megatron(source, tmp_path / "megatron")
    assert done.notices == (f"config.json says float32, {count} tensors are bfloat16; kept",)
    assert to_megatron(folders["tied"], tmp_path / "plain").notices == ()
    assert to_megatron(source, tmp_path / "rounded", dtype="bfloat16").notices == ()
    to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert files(tmp_path / "hf") == files(source)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_weights_that_are_no_floats_are_refused(folders: dict[str, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    source = changed(folders["tied"], tmp_path / "source", lambda held: held.update({name: held[name].to(dtype)}))
    for asked in (None, "float32"):
        with pytest.raises(CheckpointError, match=f"{name}: {str(dtype)[6:]}"):
            to_megatron(source, tmp_path / "x", stacked=False, dtype=asked)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("value", [0, -5])
@pytest.mark.parametrize("name", ["tp", "make_vocab_size_divisible_by", "padded_vocab_size", "max_shard_size"])
def test_sizes_below_one_are_refused(folders: dict[str, Path], tmp_path: Path, name: str, value: int) -> None:
    column = None if name == "max_shard_size" else "megatron"
    with pytest.raises(ConversionError, match=f"{name}={value}, expected 1 or more"):
        convert_folder(folders["tied"], tmp_path / "x", target_column=column, **{name: value})


def test_through_te_the_checkpoint_is_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    convert_folder(folders["biased"], tmp_path / "te", target_column="te")
    to_megatron(folders["biased"], tmp_path / "direct")
    to_megatron(tmp_path / "te", tmp_path / "through")
    file = "__0_0.distcp"
    assert (iteration(tmp_path / "direct") / file).read_bytes() == (iteration(tmp_path / "through") / file).read_bytes()
    convert_folder(tmp_path / "direct", tmp_path / "te-back", target_column="te")
    assert verify(tmp_path / "te", tmp_path / "te-back").equal


def test_layouts_of_one_checkpoint_are_made_of_each_other(folders: dict[str, Path], tmp_path: Path) -> None:
    to_megatron(folders["biased"], tmp_path / "stacked")
    to_megatron(folders["biased"], tmp_path / "layers", stacked=False)
    convert_folder(tmp_path / "layers", tmp_path / "stacked-again", target_column=None, stacked=True)
    convert_folder(tmp_path / "stacked", tmp_path / "layers-again", target_column=None, stacked=False)
    convert_folder(tmp_path / "layers-again", tmp_path / "kept", target_column=None)
    assert files(tmp_path / "stacked-again") == files(tmp_path / "stacked")
    assert files(tmp_path / "layers-again") == files(tmp_path / "layers") == files(tmp_path / "kept")


def test_shards_of_another_size_and_back(folders: dict[str, Path], tmp_path: Path) -> None:
    done = convert_folder(folders["biased"], tmp_path / "many", target_column=None, max_shard_size=30_000)
    sizes = [path.stat().st_size for path in (tmp_path / "many").glob("*.safetensors")]
    assert len(sizes) > 3
    assert done.columns == ("hf", "hf")
    assert verify(folders["biased"], tmp_path / "many").equal
    convert_folder(tmp_path / "many", tmp_path / "one", target_column=None, max_shard_size=10**9)
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors")] == ["model.safetensors"]
    convert_folder(folders["biased"], tmp_path / "kept", target_column=None)
    assert files(tmp_path / "kept") == files(folders["biased"])


def test_padding_is_made_kept_changed_and_left_out(folders: dict[str, Path], tmp_path: Path) -> None:
    done = to_megatron(folders["biased"], tmp_path / "padded", make_vocab_size_divisible_by=32)
    rows, vocabulary = Checkpoint.open(tmp_path / "padded").tensors[EMBEDDING].shape[0], ODD["vocab_size"]
    assert rows == -(-vocabulary // 32) * 32 > vocabulary
    assert done.constants == (rows - vocabulary) * ODD["hidden_size"] * 2, "embedding and head"
    convert_folder(tmp_path / "padded", tmp_path / "layers", target_column=None, stacked=False)
    assert Checkpoint.open(tmp_path / "layers").tensors[EMBEDDING].shape[0] == rows
    convert_folder(tmp_path / "layers", tmp_path / "other", target_column=None, stacked=True, padded_vocab_size=600)
    assert Checkpoint.open(tmp_path / "other").tensors[EMBEDDING].shape[0] == 600
    assert verify(tmp_path / "padded", tmp_path / "other").equal
    for name in ("padded", "layers", "other"):
        to_hf(tmp_path / name, tmp_path / f"hf-{name}")
        assert files(tmp_path / f"hf-{name}") == files(folders["biased"])
    with pytest.raises(ConversionError, match="none may be lost"):
        to_megatron(folders["biased"], tmp_path / "x", padded_vocab_size=vocabulary - 1)
    with pytest.raises(ConversionError, match="has no padding for tp=2"):
        convert_folder(folders["biased"], tmp_path / "x", target_column="te", tp=2)
    with pytest.raises(ConversionError, match="pass one of them"):
        to_megatron(folders["biased"], tmp_path / "x", padded_vocab_size=600, make_vocab_size_divisible_by=8)


def test_heads_that_do_not_divide_get_groups_of_zeros(folders: dict[str, Path], tmp_path: Path) -> None:
    """Enough of them for as many ranks as will load it; they are in its arguments, and gone from an export."""
    to_megatron(folders["biased"], tmp_path / "padded", make_vocab_size_divisible_by=8, tp=4)
    padded, groups = Checkpoint.open(tmp_path / "padded"), ODD["num_key_value_heads"]
    assert groups % 4
    assert padded.padding == {
        "padded_vocab_size": -(-ODD["vocab_size"] // 32) * 32,
        "padded_query_groups": Topology(tp=4).query_groups(groups, ODD["num_attention_heads"] // groups),
    }
    assert padded.padding["padded_query_groups"] > groups
    to_hf(tmp_path / "padded", tmp_path / "hf")
    assert files(tmp_path / "hf") == files(folders["biased"])


def test_padding_that_was_trained_is_not_lost(folders: dict[str, Path], tmp_path: Path) -> None:
    done = to_megatron(folders["tied"], tmp_path / "padded", make_vocab_size_divisible_by=64)
    (place,) = [chunk for chunk in done.written if chunk.key == EMBEDDING]
    with (tmp_path / "padded" / place.file).open("r+b") as file:
        file.seek(place.offset + place.nbytes - 4)
        file.write(b"\0\0\x80\x3f")
    with pytest.raises(CheckpointError, match=rf"{EMBEDDING}: 1 of .* elements that must be 0 are not"):
        to_hf(tmp_path / "padded", tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["padded"]


def test_the_bridge_imports_and_exports_files(folders: dict[str, Path], tmp_path: Path) -> None:
    source = folders["tied"]
    AutoBridge.import_ckpt(
        source, tmp_path / "megatron", torch_dtype=torch.bfloat16, device_map="cpu", low_memory_save=True
    )
    bridge = AutoBridge.from_hf_pretrained(source)
    done = bridge.export_ckpt(tmp_path / "megatron", tmp_path / "hf", show_progress=False)
    assert done.tensors[1] == len(load_file(source / "model.safetensors"))
    rounded = {key: tensor.bfloat16() for key, tensor in load_file(source / "model.safetensors").items()}
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == rounded.keys()
    assert all(torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in rounded.items())
    with pytest.raises(CheckpointError, match="exists already"):
        bridge.export_ckpt(tmp_path / "megatron", tmp_path / "hf")
    AutoBridge.from_hf_config(read_config(str(source))).export_ckpt(tmp_path / "megatron", tmp_path / "bare")
    assert sorted(path.name for path in (tmp_path / "bare").iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(TypeError, match="no_such_option"):
        AutoBridge.import_ckpt(source, tmp_path / "x", no_such_option=1)


def test_a_config_that_is_not_carried_comes_from_the_settings(folders: dict[str, Path], tmp_path: Path) -> None:
    to_megatron(folders["biased"], tmp_path / "megatron")
    shutil.rmtree(iteration(tmp_path / "megatron") / "hf")
    done = to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert done.carried == ()
    found = verify(tmp_path / "hf", folders["biased"])
    assert (found.different, found.config) == ((), {}), "the same model, spelled from its settings"
    to_hf(tmp_path / "megatron", tmp_path / "like", like=folders["biased"])
    assert files(tmp_path / "like") == files(folders["biased"])


def test_settings_that_only_bridge_wrote_are_enough_and_none_are_not(folders: dict[str, Path], tmp_path: Path) -> None:
    to_megatron(folders["tied"], tmp_path / "megatron")
    inner = iteration(tmp_path / "megatron")
    shutil.rmtree(inner / "hf")
    (inner / "run_config.yaml").unlink()
    to_hf(inner, tmp_path / "args")
    assert verify(tmp_path / "args", folders["tied"]).equal
    (inner / "common.pt").unlink()
    with pytest.raises(CheckpointError, match="neither settings nor a config"):
        to_hf(inner, tmp_path / "none")
    assert verify(inner, folders["tied"]).equal, "the other says which model it is"
    to_hf(inner, tmp_path / "like", like=folders["tied"])
    assert files(tmp_path / "like") == files(folders["tied"])


def test_a_config_of_another_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    to_megatron(folders["tied"], tmp_path / "megatron")
    other = write_checkpoint(TIED | {"rms_norm_eps": 0.125}, tmp_path / "other")
    with pytest.raises(ConfigError, match="rms_norm_eps"):
        to_hf(tmp_path / "megatron", tmp_path / "hf", like=other)
    with pytest.raises(CheckpointError, match="no Megatron checkpoint"):
        to_megatron(folders["tied"], tmp_path / "x", like=folders["tied"])
    with pytest.raises(CheckpointError, match=r"no use for --iteration .* and --like .*: drop"):
        to_megatron(folders["tied"], tmp_path / "x", like=folders["tied"], iteration=0)
    with pytest.raises(ConfigError, match="is in the 'megatron' column, expected 'hf'"):
        to_megatron(tmp_path / "megatron", tmp_path / "x", source_column="hf")
    with pytest.raises(ConversionError, match=r"column already.*reshard"):
        to_megatron(tmp_path / "megatron", tmp_path / "x")
    with pytest.raises(ConversionError, match="a target in the 'hf' column has no stacked"):
        to_hf(tmp_path / "megatron", tmp_path / "x", stacked=True)
    with pytest.raises(ConversionError, match="a target in the 'megatron' column has no max_shard_size"):
        to_megatron(folders["tied"], tmp_path / "x", max_shard_size=10**9)
    assert not (tmp_path / "x").exists()


def test_digests_and_odd_numbers_are_told(folders: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folders["tied"], source)
    held = load_file(source / "model.safetensors")
    held["model.layers.0.mlp.down_proj.weight"][0, 0] = float("inf")
    held["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    held["model.layers.1.mlp.down_proj.weight"][5, 6] = -float("inf")
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    done = to_megatron(source, tmp_path / "megatron", digests=tmp_path / "digests" / "megatron.json")
    assert done.nonfinite == {"decoder.layers.mlp.linear_fc2.weight": 3}
    told = json.loads((tmp_path / "digests" / "megatron.json").read_text())["tensors"]
    stack = told["decoder.layers.mlp.linear_fc2.weight"]
    assert [box["starts"] for box in stack["boxes"]] == [[0, 0, 0], [1, 0, 0]]
    for layer, box in enumerate(stack["boxes"]):
        expected = held[f"model.layers.{layer}.mlp.down_proj.weight"].numpy().tobytes()
        assert box["digest"] == xxhash.xxh3_128(expected).hexdigest()
        assert box["nonfinite"] == 1 + layer
    back = to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert back.nonfinite == {f"model.layers.{layer}.mlp.down_proj.weight": 1 + layer for layer in range(2)}
    assert files(tmp_path / "hf") == files(source)


def test_what_rounding_makes_infinite_is_told_apart(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, key = tmp_path / "source", "model.norm.weight"
    shutil.copytree(folders["tied"], source)
    held = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    held[key][:4] = torch.tensor([3e38, -7e4, 6e4, float("inf")])
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    done = to_megatron(source, tmp_path / "megatron", dtype="float16")
    name = "decoder.final_layernorm.weight"
    assert (done.nonfinite, done.overflowed) == ({name: 3}, {name: 2})
    print_account(done)
    out = " ".join(capsys.readouterr().out.split())
    assert f"{name}: 1 NaN or infinite, kept as they are; 2 became infinite by rounding to float16" in out


def test_a_checkpoint_among_several_is_chosen(folders: dict[str, Path], tmp_path: Path) -> None:
    to_megatron(folders["tied"], tmp_path / "megatron")
    shutil.copytree(iteration(tmp_path / "megatron"), tmp_path / "megatron" / "iter_0000007")
    done = convert_folder(tmp_path / "megatron", tmp_path / "seven", target_column=None, iteration=7)
    assert done.source.name == "iter_0000007"
    assert sorted(path.name for path in (tmp_path / "seven").iterdir()) == [
        "iter_0000007",
        "latest_checkpointed_iteration.txt",
        "latest_train_state.pt",
    ]
    with pytest.raises(CheckpointError, match="has no iter_0000009"):
        to_hf(tmp_path / "megatron", tmp_path / "x", iteration=9)
    for wrong in (-1, "7", True):
        with pytest.raises(CheckpointError, match=f"iteration {wrong!r}: expected a number"):
            to_hf(tmp_path / "megatron", tmp_path / "x", iteration=wrong)


@pytest.mark.parametrize("content", [b'{"a": "\xff"}', b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"[]", b"{"])
def test_a_carried_config_that_is_none(folders: dict[str, Path], tmp_path: Path, content: bytes) -> None:
    to_megatron(folders["tied"], tmp_path / "megatron")
    (iteration(tmp_path / "megatron") / "hf/config.json").write_bytes(content)
    with pytest.raises(ConversionError, match=r"hf/config\.json"):
        to_hf(tmp_path / "megatron", tmp_path / "x")


def test_kept_headers_behind_a_link_out_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    to_megatron(folders["tied"], tmp_path / "megatron")
    kept = iteration(tmp_path / "megatron") / "hf/safetensors-headers"
    kept.rename(tmp_path / "elsewhere")
    kept.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="safetensors-headers: is a link out of its folder"):
        to_hf(tmp_path / "megatron", tmp_path / "x")
