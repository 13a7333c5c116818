"""Folders of Megatron checkpoints: real Megatron-Core loads what is written, and what is there is found or refused."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron_files
import pytest
import torch
from megatron_files import fields_of, imported

from converters import pickled
from converters.errors import CheckpointError
from converters.files import megatron_folder, megatron_state
from converters.files.extents import FolderLayout
from converters.files.megatron_folder import MegatronFolder
from converters.tensors import TensorInfo
from converters.topology import Topology
from parity.ranks import Zygote
from parity.seeded import write_checkpoint
from parity.tiny import odd_config, with_layers

TINY = with_layers(odd_config(), 4) | {"intermediate_size": 434, "num_attention_heads": 12, "num_key_value_heads": 4}
TIED = TINY | {"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False}
NAMED = {"model.embed_tokens.weight": (5, 4), "model.layers.0.mlp.down_proj.weight": (4, 6)}


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    pytest.importorskip("megatron.core", reason="real ranks load these checkpoints")
    torch.set_num_threads(1)
    with Zygote() as running:
        yield running


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(TIED, tmp_path_factory.mktemp("models") / "tied")


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imported(source, tmp_path_factory.mktemp("written"), layers="local")


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A checkpoint to be damaged."""
    return Path(shutil.copytree(written, tmp_path / "checkpoint"))


class TestMegatronCore:
    @pytest.mark.parametrize(
        ("stacked", "topology"),
        [(True, Topology(tp=2, pp=2)), (True, Topology()), (False, Topology(tp=2))],
        ids=["tp2pp2", "tp1", "tp2-per-layer"],
    )
    def test_it_loads_under_the_strictest_setting(
        self, source: Path, written: Path, tmp_path: Path, zygote: Zygote, stacked: bool, topology: Topology
    ) -> None:
        target = written if stacked else imported(source, tmp_path, stacked=False, layers="local")
        load(zygote, source, topology, target, stacked=stacked)

    def test_groups_of_zeros(self, tmp_path: Path, zygote: Zygote) -> None:
        """Five groups on two ranks: six in a checkpoint that was asked to have them, and five again when it is read."""
        source = write_checkpoint(TINY | {"num_attention_heads": 15, "num_key_value_heads": 5}, tmp_path / "model")
        padding = {"padded_query_groups": 6, "padded_vocab_size": TINY["vocab_size"] + 1}
        target = imported(source, tmp_path / "checkpoint", padding=padding, layers="local")
        load(zygote, source, Topology(tp=2), target)
        (target / "iter_0000000/run_config.yaml").rename(tmp_path / "run_config.yaml")
        from_args = MegatronFolder.open(target).settings
        (tmp_path / "run_config.yaml").rename(target / "iter_0000000/run_config.yaml")
        from_config = MegatronFolder.open(target).settings
        assert from_args is not None
        assert from_config is not None
        assert from_args.fields == from_config.fields == _fields(source)

    def test_the_config_has_every_argument_that_a_load_reads(self, source: Path, folder: Path) -> None:
        """Those that Megatron-LM compares with its own, and those that `--use-checkpoint-args` takes."""
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(folder / "iter_0000000/common.pt", weights_only=True)
        args, fields = state["args"], fields_of(source)
        assert (args.num_layers, args.hidden_size, args.num_attention_heads) == (4, fields["hidden_size"], 12)
        assert (args.add_position_embedding, args.position_embedding_type) == (True, "rope")
        assert (args.swiglu, args.untie_embeddings_and_output_weights) == (True, False)
        assert (args.norm_epsilon, args.layernorm_epsilon) == (fields["layernorm_epsilon"],) * 2
        assert (args.use_rope_scaling, args.rope_scaling_factor) == (True, fields["rope_scaling_factor"])
        assert (args.group_query_attention, args.num_query_groups) == (True, fields["num_query_groups"])
        assert (args.no_save_optim, args.no_save_rng, args.tensor_model_parallel_size) == (True, True, 1)
        assert state["content_metadata"] == {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}

    def test_layers_of_transformer_engine_have_one_state_more(self) -> None:
        shapes = {
            "decoder.layers.mlp.linear_fc1.weight": (2, 8, 4),
            "decoder.layers.mlp.linear_fc1.layer_norm_weight": (2, 4),
            "decoder.final_layernorm.weight": (4,),
        }
        infos = {key: TensorInfo(shape, "float32") for key, shape in shapes.items()}
        local = [f"decoder.layers.mlp.linear_fc1._extra_state/shard_{layer}_2" for layer in (0, 1)]
        assert megatron_folder.extra_states(infos, layers="local") == local
        te = [*local, "decoder.final_layernorm._extra_state/shard_0_1"]
        assert megatron_folder.extra_states(infos, layers="te") == te
        assert megatron_folder.extra_states(infos) == te


class TestMegatronBridge:
    def test_both_trackers_and_the_state_of_training(self, written: Path) -> None:
        assert (written / "latest_checkpointed_iteration.txt").read_text() == "0"
        for path in (written / "latest_train_state.pt", written / "iter_0000000/train_state.pt"):
            state = torch.load(path, weights_only=True)
            assert {name: tensor.item() for name, tensor in state.items()} == {
                "step": 0,
                "consumed_train_samples": 0,
                "skipped_train_samples": 0,
                "consumed_valid_samples": 0,
                "floating_point_operations_so_far": 0.0,
                "do_train": False,
                "do_valid": False,
                "do_test": False,
            }
            assert state["step"].dtype == torch.int64

    def test_the_step_is_the_iteration(self, source: Path) -> None:
        layout = lay_out(source, iteration=12345)
        assert {path.parts[0] for path in layout.sizes} == {"iter_0012345"}
        assert layout.small[Path("latest_checkpointed_iteration.txt")] == b"12345"

    def test_release_is_for_megatron_lm(self, source: Path) -> None:
        layout = lay_out(source, iteration="release")
        assert {path.parts[0] for path in layout.sizes} == {"release"}
        assert layout.small[Path("latest_checkpointed_iteration.txt")] == b"release"
        assert Path("latest_train_state.pt") not in layout.small


def lay_out(source: Path, **options: Any) -> FolderLayout:
    infos = {"decoder.final_layernorm.weight": TensorInfo((4,), "float32")}
    return megatron_folder.lay_out(infos, settings=fields_of(source), **options)


class TestOpening:
    def test_what_was_written_is_found(self, source: Path, written: Path) -> None:
        found = MegatronFolder.open(written)
        assert (found.iteration, found.column) == (0, "megatron_dist")
        assert found.hf_folder is not None
        assert (found.hf_folder / "config.json").read_bytes() == (source / "config.json").read_bytes()
        fields = fields_of(source)
        assert found.settings is not None
        assert {name: found.settings.fields[name] for name in fields} == fields
        assert "_extra_state" in found.left_alone

    def test_an_iteration_by_itself(self, written: Path) -> None:
        assert MegatronFolder.open(written / "iter_0000000").iteration == 0

    def test_arguments_say_the_same_as_the_run_config(self, source: Path, folder: Path) -> None:
        (folder / "iter_0000000/run_config.yaml").unlink()
        found = MegatronFolder.open(folder)
        assert found.settings is not None
        assert found.settings.where.endswith("common.pt")
        assert found.settings.fields == _fields(source)

    def test_one_of_several_iterations(self, folder: Path) -> None:
        shutil.copytree(folder / "iter_0000000", folder / "iter_0000200")
        assert MegatronFolder.open(folder).iteration == 0
        assert MegatronFolder.open(folder, 200).iteration == 200

    def test_without_a_tracker_the_only_one(self, folder: Path) -> None:
        (folder / "latest_checkpointed_iteration.txt").unlink()
        (folder / "latest_train_state.pt").unlink()
        assert MegatronFolder.open(folder).iteration == 0
        shutil.copytree(folder / "iter_0000000", folder / "iter_0000200")
        refused(folder, "several", "iter_0000200", "--iteration")

    def test_bridges_tracker_alone(self, folder: Path) -> None:
        (folder / "latest_checkpointed_iteration.txt").unlink()
        shutil.copytree(folder / "iter_0000000", folder / "iter_0000200")
        assert MegatronFolder.open(folder).iteration == 0

    @pytest.mark.parametrize(("prefix", "column"), [("", "hf"), ("model.", "hf"), ("app.net.", "hf")])
    def test_names_of_hugging_face_in_dcp(self, tmp_path: Path, prefix: str, column: str) -> None:
        tensors = {prefix + key: torch.rand(shape) for key, shape in NAMED.items()}
        torch_saved({**tensors, "optimizer.state.exp_avg": torch.rand(3)}, tmp_path)
        found = MegatronFolder.open(tmp_path)
        assert (found.column, found.settings, set(found.files.tensors())) == (column, None, set(NAMED))
        held = megatron_files.tensors_of(found.files)
        assert all(torch.equal(held[key], tensors[prefix + key]) for key in NAMED)

    def test_common_state_inside_of_dcp(self, source: Path, tmp_path: Path) -> None:
        """As Megatron-Core 0.19 writes it, without `common.pt`."""
        args = megatron_files.megatron_lm_args(source, Topology())
        state = [{"args": argparse.Namespace(**args), "iteration": 7}]
        tensors = {
            "embedding.word_embeddings.weight": torch.rand(5, 4),
            "decoder.layers.mlp.linear_fc2.weight": torch.rand(2, 4, 6),
        }
        torch_saved({**tensors, "common_state/shard_0_1": state}, tmp_path)
        (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
        found = MegatronFolder.open(tmp_path)
        assert (found.column, found.hf_folder) == ("megatron_dist", None)
        assert found.settings is not None
        assert found.settings.fields == _fields(source)


def load(zygote: Zygote, source: Path, topology: Topology, target: Path, *, stacked: bool = True) -> None:
    found = zygote.run(
        megatron_files.loaded,
        source,
        topology,
        target / "iter_0000000",
        stacked=stacked,
        world=topology.world_size,
        coords=topology.coords(),
        timeout=60,
        env={"CUDA_VISIBLE_DEVICES": ""},
    )
    for rank in found:
        assert rank["differ"] == []
        assert (rank["common"]["iteration"], rank["common"]["checkpoint_version"]) == (0, 3.0)
        assert rank["common"]["args"].params_dtype == torch.float32


def _fields(source: Path) -> dict[str, Any]:
    """What settings read from a file have, for a model of this kind."""
    return fields_of(source) | {"layernorm_zero_centered_gamma": False}


def torch_saved(state: dict[str, Any], folder: Path) -> None:
    import torch.distributed.checkpoint as torch_dcp

    planner = torch_dcp.DefaultSavePlanner(flatten_state_dict=False)
    torch_dcp.save(state, checkpoint_id=folder, planner=planner, no_dist=True)


def refused(folder: Path, *words: str, iteration: int | None = None) -> None:
    with pytest.raises(CheckpointError) as caught:
        MegatronFolder.open(folder, iteration)
    assert [word for word in words if word not in str(caught.value)] == []


class TestRefusals:
    def test_nothing(self, tmp_path: Path) -> None:
        refused(tmp_path / "none", "nothing")
        refused(tmp_path, "no Megatron checkpoint", "an empty folder")

    def test_a_model_of_hugging_face(self, source: Path) -> None:
        refused(source, "Hugging Face", "config.json")

    @pytest.mark.parametrize("text", ["", "latest", "-1", "1e3", "12 13", "9" * 40, "../../etc", "\0"])
    def test_rubbish_in_the_tracker(self, folder: Path, text: str) -> None:
        (folder / "latest_checkpointed_iteration.txt").write_text(text)
        refused(folder, "latest_checkpointed_iteration.txt", "release", "--iteration")
        assert MegatronFolder.open(folder, 0).iteration == 0

    def test_a_tracker_that_is_no_text(self, folder: Path) -> None:
        (folder / "latest_checkpointed_iteration.txt").write_bytes(b"\xff\xfe\x00\x01")
        refused(folder, "latest_checkpointed_iteration.txt")

    def test_an_iteration_that_is_missing(self, folder: Path) -> None:
        (folder / "latest_checkpointed_iteration.txt").write_text("500")
        (folder / "latest_train_state.pt").unlink()
        refused(folder, "no iter_0000500", "iter_0000000")
        refused(folder, "no iter_0000007", "iter_0000000", iteration=7)
        refused(folder / "iter_0000000", "iter_0000007", iteration=7)

    def test_trackers_that_disagree(self, folder: Path) -> None:
        shutil.copytree(folder / "iter_0000000", folder / "iter_0000200")
        (folder / "latest_checkpointed_iteration.txt").write_text("200")
        refused(folder, "latest_train_state.pt: 0", "latest_checkpointed_iteration.txt: 200", "--iteration")

    def test_a_checkpoint_in_a_checkpoint(self, folder: Path) -> None:
        shutil.copytree(folder / "iter_0000000", folder / "iter_0000000/iter_0000005")
        refused(folder / "iter_0000000", "iter_0000005")

    @pytest.mark.parametrize("name", [".metadata", "metadata.json"])
    def test_an_unfinished_one(self, folder: Path, name: str) -> None:
        (folder / "iter_0000000" / name).unlink()
        refused(folder, "unfinished", name)

    @pytest.mark.parametrize("text", ['{"sharded_backend": "zarr"}', "[]", "{", "null", "[" * 100_000])
    def test_another_format(self, folder: Path, text: str) -> None:
        (folder / "iter_0000000/metadata.json").write_text(text)
        refused(folder, "metadata.json")

    @pytest.mark.parametrize(
        "text",
        ["", "[1]", "model: 3", "model: {", "!!python/object/apply:os.system [ls]", "a: &a [*a, *a]", "[" * 1_500],
    )
    def test_a_run_config_that_is_none(self, folder: Path, text: str) -> None:
        (folder / "iter_0000000/run_config.yaml").write_text(text)
        refused(folder, "run_config.yaml")

    def test_code_in_a_run_config(self, folder: Path, tmp_path: Path) -> None:
        text = f"model: {{a: !!python/object/apply:os.mkdir [{tmp_path / 'ran'}]}}"
        (folder / "iter_0000000/run_config.yaml").write_text(text)
        refused(folder, "run_config.yaml")
        assert not (tmp_path / "ran").exists()

    def test_code_in_common_state(self, folder: Path, tmp_path: Path) -> None:
        class Bomb:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.touch, (tmp_path / "ran",))

        (folder / "iter_0000000/run_config.yaml").unlink()
        torch.save({"args": Bomb()}, folder / "iter_0000000/common.pt")
        refused(folder, "common.pt", "not read")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x02]."])
    @pytest.mark.parametrize("name", ["latest_train_state.pt", "iter_0000000/common.pt"])
    def test_damaged_states(self, folder: Path, name: str, content: bytes) -> None:
        (folder / "iter_0000000/run_config.yaml").unlink()
        (folder / name).write_bytes(content)
        refused(folder, name)

    def test_a_link_out_of_the_folder(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("model: {}")
        (folder / "iter_0000000/run_config.yaml").unlink()
        (folder / "iter_0000000/run_config.yaml").symlink_to(tmp_path / "secret")
        refused(folder, "run_config.yaml", "link")

    @pytest.mark.parametrize(
        "name",
        ["", "/.metadata", "/__0_0.distcp", "/hf", "/hf/config.json"],
        ids=["iteration", "metadata", "data", "hf", "config"],
    )
    def test_links_out_of_the_checkpoint(self, folder: Path, tmp_path: Path, name: str) -> None:
        inside = folder / f"iter_0000000{name}"
        inside.rename(tmp_path / "elsewhere")
        inside.symlink_to(tmp_path / "elsewhere")
        refused(folder, f"iter_0000000{name}", "is a link out of its folder", str(tmp_path / "elsewhere"))

    def test_links_inside_of_the_checkpoint(self, folder: Path) -> None:
        inner = folder / "iter_0000000"
        (folder / "iter_0000007").symlink_to(inner)
        (inner / "__0_0.distcp").rename(inner / "data")
        (inner / "__0_0.distcp").symlink_to("data")
        assert list(MegatronFolder.open(folder, 7).files.tensors()) == list(
            MegatronFolder.open(folder, 0).files.tensors()
        )

    @pytest.mark.parametrize("name", ["__0_0.distcp", "hf/config.json"])
    def test_a_pipe_is_not_waited_for(self, folder: Path, name: str) -> None:
        path = folder / "iter_0000000" / name
        path.unlink()
        os.mkfifo(path)
        if name == "__0_0.distcp":
            refused(folder, name, "pipe")
        else:
            assert MegatronFolder.open(folder).hf_folder is None

    def test_metadata_that_is_too_large(self, folder: Path) -> None:
        os.truncate(folder / "iter_0000000/.metadata", pickled.MAX_BYTES + 1)
        refused(folder, ".metadata: 268,435,457 bytes, expected no more than")

    def test_aliases_of_aliases(self, folder: Path) -> None:
        """Written out it would have 9**12 values: not to be waited for, wherever it stands."""
        path = folder / "iter_0000000/run_config.yaml"
        levels = [f"l{i + 1}: &l{i + 1} [{', '.join([f'*l{i}'] * 9)}]" for i in range(12)]
        kept = path.read_text()
        for field in ("num_layers", "no_such_field"):
            bomb = "\n".join(["l0: &l0 word", *levels, kept.replace("model:\n", f"model:\n  {field}: *l12\n")])
            path.write_text(bomb)
            refused(folder, "run_config.yaml", "aliases of aliases")

    def test_an_alias_of_a_value_that_is_written_twice(self, folder: Path) -> None:
        path = folder / "iter_0000000/run_config.yaml"
        path.write_text("a: &a [1, 2]\nb: *a\nc: [*a, *a]\n" + path.read_text())
        assert megatron_state.read_run_config(path)["c"] == [[1, 2], [1, 2]]

    def test_two_models(self, tmp_path: Path) -> None:
        torch_saved({f"{who}.{key}": torch.rand(shape) for who in "ab" for key, shape in NAMED.items()}, tmp_path)
        refused(tmp_path, "several models", "'a.'", "'b.'")

    def test_names_that_no_column_has(self, tmp_path: Path) -> None:
        torch_saved({"transformer.h.0.attn.weight": torch.rand(3)}, tmp_path)
        refused(tmp_path, "transformer.h.0.attn.weight", "decoder.layers")

    def test_layers_stacked_and_single(self, tmp_path: Path) -> None:
        names = ["embedding.word_embeddings.weight", "decoder.layers.0.a.weight", "decoder.layers.a.weight"]
        torch_saved({name: torch.rand(3) for name in names}, tmp_path)
        refused(tmp_path, "decoder.layers.0.a.weight", "decoder.layers.a.weight")


def test_small_files_are_the_same_each_time(source: Path) -> None:
    one, other = (lay_out(source) for _ in range(2))
    assert one.small == other.small
    assert json.loads(one.small[Path("iter_0000000/metadata.json")])["common_backend"] == "torch"


def test_nothing_heavy_is_imported(written: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from converters.files.megatron_folder import MegatronFolder;"
        f"MegatronFolder.open(Path({str(written)!r}));"
        "print([name for name in ('torch', 'transformers', 'megatron') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_of_the_state_are_not_looked_up() -> None:
    assert megatron_state.NAMES.known(megatron_state.Symbol("megatron.core.enums", "ModelType"))
    assert not megatron_state.NAMES.known(megatron_state.Symbol("os", "system"))
