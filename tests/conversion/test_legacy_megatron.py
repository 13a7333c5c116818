"""Legacy checkpoints of ranks, saved by real Megatron-Core ranks, seen as whole tensors."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron_files
import pytest
import torch
from megatron_files import LLAMA, config_of, megatron_lm_args, tensors_of
from safetensors.torch import load_file

from converters.errors import CheckpointError
from converters.files import checksums
from converters.files.extents import Recorded
from converters.files.identity import check
from converters.files.megatron_folder import MegatronFolder
from converters.topology import Topology
from parity.ranks import Zygote
from parity.seeded import write_checkpoint
from parity.tiny import odd_config, with_layers

pytest.importorskip("megatron.core", reason="real ranks save these checkpoints")
TINY = with_layers(odd_config(), 4) | {"intermediate_size": 434}
MODELS: dict[str, dict[str, Any]] = {
    "biased": TINY,
    "tied": TINY | {"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False},
    "attention": TINY | {"mlp_bias": False},
}
LAYOUTS = {
    "tp1": Topology(),
    "tp2": Topology(tp=2),
    "tp2pp2": Topology(tp=2, pp=2),
    "pp2vpp2": Topology(pp=2, vpp=2),
}


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    torch.set_num_threads(1)
    with Zygote() as running:
        yield running


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_checkpoint(config, root / name) for name, config in MODELS.items()}


def save(zygote: Zygote, source: Path, target: Path, topology: Topology, **changes: Any) -> Path:
    """A folder of checkpoints with one, of ranks."""
    args = megatron_lm_args(source, topology, **changes)
    zygote.run(
        megatron_files.saved_by_ranks,
        source,
        topology,
        target / "iter_0000030",
        args,
        world=topology.world_size,
        coords=topology.coords(),
        timeout=60,
        env={"CUDA_VISIBLE_DEVICES": ""},
    )
    (target / "latest_checkpointed_iteration.txt").write_text("30")
    return target


def back(folder: MegatronFolder, source: Path) -> dict[str, torch.Tensor]:
    """The Hugging Face tensors of a checkpoint, by the copy kernel of modules."""
    from converters import execute

    config = config_of(source)
    hf = LLAMA.fields.read(config)[0]
    held = tensors_of(folder.files)
    rows = held["embedding.word_embeddings.weight"].shape[0]
    qkv = next(tensor for key, tensor in held.items() if key.endswith("linear_qkv.weight"))
    each = (hf["num_attention_heads"] // hf["num_key_value_heads"] + 2) * hf["head_dim"]
    plan = LLAMA.plan(folder.column, "hf", config, padded_vocab_size=rows, padded_query_groups=qkv.shape[-2] // each)
    ((part, files),) = folder.parts(plan)
    assert files is folder.files
    out = {key: torch.zeros(shape) for key, shape in part.target_tensors.items()}
    for copy in part.copies:
        execute.apply(copy, held[copy.source.key], out[copy.target.key])
    return out


@pytest.mark.parametrize(
    ("model", "layout"),
    [("biased", "tp2pp2"), ("attention", "tp2"), ("tied", "pp2vpp2"), ("tied", "tp1")],
)
def test_ranks_are_one_model(models: dict[str, Path], zygote: Zygote, tmp_path: Path, model: str, layout: str) -> None:
    folder = MegatronFolder.open(save(zygote, models[model], tmp_path, LAYOUTS[layout]))
    assert (folder.iteration, folder.column, folder.hf_folder) == (30, "megatron_local", None)
    assert "optimizer" in folder.left_alone
    assert folder.settings is not None
    fields = megatron_files.fields_of(models[model])
    assert {name: folder.settings.fields[name] for name in fields} == fields
    expected = load_file(models[model] / "model.safetensors")
    found = back(folder, models[model])
    assert found.keys() == expected.keys()
    assert not [key for key, tensor in expected.items() if not torch.equal(found[key], tensor)]


@pytest.fixture(scope="module")
def saved(models: dict[str, Path], zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(zygote, models["tied"], tmp_path_factory.mktemp("legacy"), LAYOUTS["tp2pp2"])


class TestRefusals:
    @pytest.fixture
    def ranks(self, saved: Path, tmp_path: Path) -> Path:
        """A checkpoint to be damaged."""
        return Path(shutil.copytree(saved, tmp_path / "damaged")) / "iter_0000030"

    def rewrite(self, file: Path, change: Any) -> None:
        state = torch.load(file, weights_only=False)
        change(state)
        torch.save(state, file)

    def refused(self, ranks: Path, *words: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            MegatronFolder.open(ranks.parent)
        assert [word for word in words if word not in str(caught.value)] == []

    def test_a_rank_is_missing(self, ranks: Path) -> None:
        shutil.rmtree(ranks / "mp_rank_01_000")
        self.refused(ranks, "unfinished", "tp=1 pp=0")

    def test_a_file_that_changes_after_it_was_read(self, ranks: Path) -> None:
        files = MegatronFolder.open(ranks.parent).files
        check(files.identities)
        assert len(files.identities) == 4
        assert {extent.file for key in files.tensors() for extent in files.extents(key)} <= files.identities.keys()
        changed = ranks / "mp_rank_01_000" / "model_optim_rng.pt"
        self.rewrite(changed, lambda state: None)
        with pytest.raises(CheckpointError, match=f"{changed} changed while it was read"):
            check(files.identities)

    def test_a_file_is_missing(self, ranks: Path) -> None:
        (ranks / "mp_rank_01_000" / "model_optim_rng.pt").unlink()
        self.refused(ranks, "mp_rank_01_000", "model_optim_rng.pt")

    def test_experts(self, ranks: Path) -> None:
        (ranks / "mp_rank_01_000").rename(ranks / "mp_rank_01_000_000")
        self.refused(ranks, "mp_rank_01_000_000", "experts")

    def test_a_mesh_that_the_arguments_contradict(self, ranks: Path) -> None:
        for pp in (0, 1):
            shutil.rmtree(ranks / f"mp_rank_01_{pp:03}")
        self.refused(ranks, "tensor_model_parallel_size=2", "files say 1")

    def test_names_of_before_megatron_core(self, ranks: Path) -> None:
        def older(state: dict[str, Any]) -> None:
            state["model"] = {"language_model": {"encoder": {}}}

        self.refused_after(ranks, older, "language_model", "convert.py")

    def test_a_tied_head_that_differs(self, ranks: Path) -> None:
        def changed(state: dict[str, Any]) -> None:
            state["model"]["output_layer.weight"][3, 2] += 1

        self.refused_after(ranks, changed, "output_layer.weight", "not equal", rank="mp_rank_01_001")

    def test_a_norm_that_differs_between_ranks(self, ranks: Path) -> None:
        def changed(state: dict[str, Any]) -> None:
            state["model"]["decoder.layers.0.input_layernorm.weight"][0] += 1

        self.refused_after(ranks, changed, "input_layernorm", "not equal", rank="mp_rank_01_001")

    def test_a_tensor_of_another_shape(self, ranks: Path) -> None:
        def cut(state: dict[str, Any]) -> None:
            state["model"]["decoder.layers.1.mlp.linear_fc2.weight"] = torch.zeros(3, 2)

        self.refused_after(ranks, cut, "linear_fc2.weight", "[3, 2]", "tp=1 pp=1", rank="mp_rank_01_001")

    def test_a_transposed_tensor(self, ranks: Path) -> None:
        def turned(state: dict[str, Any]) -> None:
            tensor = state["model"]["decoder.layers.1.mlp.linear_fc2.weight"]
            state["model"]["decoder.layers.1.mlp.linear_fc2.weight"] = tensor.t().contiguous().t()

        self.refused_after(ranks, turned, "linear_fc2.weight", "contiguous")

    def test_a_tensor_whose_sign_is_still_to_be_turned(self, ranks: Path) -> None:
        def negated(state: dict[str, Any]) -> None:
            name = "decoder.layers.0.mlp.linear_fc2.weight"
            state["model"][name] = torch._neg_view(state["model"][name])

        self.refused_after(ranks, negated, "decoder.layers.0.mlp.linear_fc2.weight", "neg still to be done")

    def test_a_flipped_bit(self, ranks: Path) -> None:
        files = MegatronFolder.open(ranks).files
        assert isinstance(files, Recorded)
        held = checksums.check(files)
        assert held == len({(record.file, record.offset) for record in files.records()}) > 20
        box = files.extents("decoder.layers.3.mlp.linear_fc1.weight")[-1]
        content = bytearray(box.file.read_bytes())
        content[box.offset] ^= 1
        box.file.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"mlp\.linear_fc1\.weight: .* of {box.file}"):
            checksums.check(MegatronFolder.open(ranks).files)

    def test_another_dtype_on_one_rank(self, ranks: Path) -> None:
        def halved(state: dict[str, Any]) -> None:
            tensor = state["model"]["decoder.layers.1.mlp.linear_fc2.weight"]
            state["model"]["decoder.layers.1.mlp.linear_fc2.weight"] = tensor.bfloat16()

        self.refused_after(ranks, halved, "linear_fc2.weight", "bfloat16 and float32", rank="mp_rank_01_001")

    def test_code_in_a_file(self, ranks: Path) -> None:
        class Bomb:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.unlink, (Path(ranks / "mp_rank_00_000" / "model_optim_rng.pt"),))

        def armed(state: dict[str, Any]) -> None:
            state["model"]["bomb"] = Bomb()

        self.refused_after(ranks, armed, "mp_rank_01_001", "not read", rank="mp_rank_01_001")
        assert (ranks / "mp_rank_00_000" / "model_optim_rng.pt").is_file()

    def test_more_layers_than_tensors(self, ranks: Path) -> None:
        """Refused before a plan for all of them is made, which would take hours."""

        def grown(state: dict[str, Any]) -> None:
            state["args"].num_layers = 10**8

        self.refused_after(ranks, grown, "num_layers=100,000,000", "tensors of all ranks")

    def test_a_rank_behind_a_link_out(self, ranks: Path, tmp_path: Path) -> None:
        (ranks / "mp_rank_01_000").rename(tmp_path / "elsewhere")
        (ranks / "mp_rank_01_000").symlink_to(tmp_path / "elsewhere")
        self.refused(ranks, "mp_rank_01_000", "is a link out of its folder")

    def test_no_arguments(self, ranks: Path) -> None:
        def bare(state: dict[str, Any]) -> None:
            del state["args"]

        self.refused_after(ranks, bare, "arguments")

    def refused_after(self, ranks: Path, change: Any, *words: str, rank: str = "mp_rank_00_000") -> None:
        self.rewrite(ranks / rank / "model_optim_rng.pt", change)
        self.refused(ranks, *words)
