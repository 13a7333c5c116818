"""Folders of Megatron checkpoints: which iteration, whose names, whose settings; and the folder that an import writes.

What is written satisfies its three readers at once:

- Megatron-Core knows a checkpoint by `metadata.json`, and reads `common.pt` beside the DCP (0.16; 0.19 reads it too);
- Megatron-LM goes by `latest_checkpointed_iteration.txt`, and takes the model's arguments from `common.pt`;
- Megatron-Bridge goes by `latest_train_state.pt`, and takes the model from `run_config.yaml`. Its `load_megatron_model`
  and `export_ckpt` enter folders named `iter_*` and no other, so the default is `iter_0000000` as in its own imports.
  Megatron-LM reads iteration 0 since core_v0.16, with `--finetune` or `--no-load-optim --no-load-rng`, as there is no
  state of an optimizer. In a folder named `release` it needs neither, and Megatron-Bridge does not find it.

Sources: NVIDIA/Megatron-LM core_v0.16.1, megatron/training/checkpointing.py `read_metadata`, `_load_base_checkpoint`,
    `load_checkpoint`; NVIDIA-NeMo/Megatron-Bridge 2026-08, src/megatron/bridge/training/checkpointing.py
    `_resolve_checkpoint_iteration`, models/conversion/auto_bridge.py `load_megatron_model`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from converters.errors import CheckpointError, listing
from converters.files import dcp, legacy, megatron_state, torch_archive
from converters.files import settings as model_settings
from converters.files.dcp import DcpFiles
from converters.files.extents import FolderLayout, TensorFiles
from converters.files.iterations import Iteration, contents, folder_name, iteration_of, resolve
from converters.files.links import check_inside
from converters.files.settings import Settings
from converters.plan import Plan
from converters.tensors import TensorInfo, check_tensors

Layers = Literal["te", "local"]
HF = Path("hf")
EMBEDDING = {"embedding.word_embeddings.weight": "megatron", "model.embed_tokens.weight": "hf"}
"""The one tensor that every model has, in the names of each column."""
LINEAR = re.compile(r"(.*\.linear_(?:qkv|proj|fc1|fc2))\.weight")
COMMON_STATE = "common_state/shard_0_1"


@dataclass(frozen=True, kw_only=True)
class MegatronFolder:
    """A Megatron checkpoint, open for reading.

    Attributes:
        root: The folder of the iteration.
        iteration: Its number or `release`; `None` where nothing says.
        column: Of the weights' table: `megatron_dist` (stacked layers), `megatron` (a key for each layer),
            `megatron_local` (the same, with norms of their own), `hf`.
        settings: What the checkpoint says of its model; `None` where it says nothing.
        hf_folder: The config and the other files of the Hugging Face model, where they were carried.
        files: Its tensors, whole.
    """

    root: Path
    iteration: Iteration | None
    column: str
    settings: Settings | None
    hf_folder: Path | None
    files: TensorFiles = field(repr=False)

    @classmethod
    def open(cls, path: Path, iteration: Iteration | None = None) -> MegatronFolder:
        """The checkpoint in a folder of checkpoints, at the iteration that its tracker names, or the one asked for.

        Args:
            path: The folder that holds the trackers, or that of an iteration.
            iteration: Overrides the trackers.

        Raises:
            CheckpointError: No checkpoint, several and none named, an unfinished one, or one that cannot be trusted.
            ConfigError: Its settings contradict each other.
        """
        root = resolve(path, iteration)
        found = iteration_of(root)
        hf_folder = next((folder for folder in (root / HF, root) if (folder / "config.json").is_file()), None)
        if hf_folder is not None:
            check_inside(hf_folder / "config.json", root)
        if legacy.rank_folders(root):
            ranks = legacy.open_ranks(root)
            if ranks.args is None:
                raise CheckpointError(
                    f"{ranks.where}: has no arguments of Megatron-LM in it, and they tell how its ranks cut tensors"
                )
            column = _column([key for rank in ranks.ranks for key in rank.tensors()], root)
            settings = model_settings.from_args(ranks.args, ranks.where)
            said: Settings | None = settings
            files: TensorFiles = ranks.whole(root, column, settings)
        else:
            _check_finished(root)
            files = checkpoint = _dcp(root)
            column, said = _column(checkpoint.tensors(), root), _settings(root, checkpoint)
        return cls(root=root, iteration=found, column=column, settings=said, hf_folder=hf_folder, files=files)

    @property
    def left_alone(self) -> Mapping[str, str]:
        """What is there besides weights."""
        return self.files.left_alone

    def parts(self, plan: Plan) -> list[tuple[Plan, TensorFiles]]:
        """What the checkpoint gives to a plan.

        Args:
            plan: From `column`, of whole tensors with their padding.

        Raises:
            CheckpointError: Tensors that are not the plan's.
        """
        check_tensors(plan.source_tensors, self.files.tensors(), str(self.root))
        return [(plan, self.files)]


def _check_finished(root: Path) -> None:
    """Refuse what a writer left before it was done, and formats other than torch_dist.

    Megatron writes `.metadata` when all data is there, and `metadata.json` last of all.
    """
    if not (root / ".metadata").is_file():
        raise CheckpointError(f"{root}: unfinished, or no checkpoint: .metadata is missing; found {contents(root)}")
    if (root / megatron_state.METADATA).is_file():
        megatron_state.check_backend(root / megatron_state.METADATA)
    elif (root / megatron_state.COMMON).is_file():
        raise CheckpointError(
            f"{root}: unfinished: {megatron_state.METADATA}, which Megatron writes last, is missing; "
            "use an older iteration"
        )


def _dcp(root: Path) -> DcpFiles:
    """The tensors, under the names of a column: what comes before those names is left off."""
    files = DcpFiles(root)
    prefixes = {
        key[: -len(name)]
        for key in files.tensors()
        for name in EMBEDDING
        if key.endswith(name) and (len(key) == len(name) or key[: -len(name)].endswith("."))
    }
    # `model.` belongs to the names of Hugging Face: the longest name decides.
    if len(prefixes) > 1:
        raise CheckpointError(
            listing(f"{root}: holds several models, and one is expected; their names begin with", map(repr, prefixes))
        )
    prefix = next(iter(prefixes), "")
    return DcpFiles(root, prefix=prefix, metadata=files.metadata) if prefix else files


def _column(keys: Mapping[str, TensorInfo] | Sequence[str], root: Path) -> str:
    """The column of the weights' table whose names these are."""
    numbered = [key for key in keys if re.match(r"decoder\.layers\.[0-9]+\.", key)]
    stacked = [key for key in keys if re.match(r"decoder\.layers\.[^0-9]", key)]
    if numbered and stacked:
        raise CheckpointError(
            f"{root}: names of stacked layers ({stacked[0]}) and of single ones ({numbered[0]}) in one checkpoint"
        )
    if stacked:
        return "megatron_dist"
    if numbered:
        local = any(re.fullmatch(r"decoder\.layers\.[0-9]+\.input_layernorm\.weight", key) for key in numbered)
        return "megatron_local" if local else "megatron"
    if any(key.startswith("model.layers.") for key in keys):
        return "hf"
    shown = ", ".join(repr(key) for key in list(keys)[:4]) or "no weights"
    raise CheckpointError(
        f"{root}: expected names of Megatron-Core (decoder.layers...) or of Hugging Face (model.layers...), "
        f"found {shown}"
    )


def _settings(root: Path, files: DcpFiles) -> Settings | None:
    """What a checkpoint says of its model: Megatron-Bridge in its config, Megatron-LM in its arguments."""
    if (root / megatron_state.RUN_CONFIG).is_file():
        path = root / megatron_state.RUN_CONFIG
        return model_settings.from_run_config(megatron_state.read_run_config(path)["model"], str(path))
    if (root / megatron_state.COMMON).is_file():
        where = str(root / megatron_state.COMMON)
        state = megatron_state.read_common(root / megatron_state.COMMON)
    elif COMMON_STATE in files.metadata.objects:
        where = f"{root}: {COMMON_STATE}"
        found = torch_archive.read(files.object(COMMON_STATE), where=where, names=megatron_state.NAMES)
        state = megatron_state.state_of(found[0] if type(found) is list and found else found, where)
    else:
        return None
    args = megatron_state.args_of(state, where)
    return None if args is None else model_settings.from_args(args, where)


def lay_out(
    tensors: Mapping[str, TensorInfo],
    *,
    settings: Mapping[str, Any],
    stacked: bool = True,
    iteration: Iteration | None = 0,
    hf_artefacts: Mapping[Path, bytes] | None = None,
    model_id: str | None = None,
    layers: Layers = "te",
) -> FolderLayout:
    """The folder of a Megatron checkpoint: one iteration, the trackers that name it, and the model's files in `hf/`.

    Args:
        tensors: Of the column `megatron_dist` (stacked layers), or `megatron`.
        settings: The model's fields: `Ledger.megatron`.
        stacked: Which of the two.
        iteration: Of training; `None`, where it is not known, is 0. `release` is for Megatron-LM alone.
        hf_artefacts: The files of the Hugging Face model but weights, by their paths in its folder, and how those were
            laid out.
        model_id: Its name, where it has one on the hub.
        layers: Who will load it: layers of Transformer Engine keep a state for the final norm as well. A checkpoint
            without it is refused by their models, however lenient; one with it by models of local layers under
            `strict="raise_all"` alone.
    """
    cut = {key: 1 for key in tensors if stacked and key.startswith("decoder.layers.")}
    inner = dcp.lay_out(tensors, split=cut, extra_states=extra_states(tensors, layers=layers))
    iteration = 0 if iteration is None else iteration
    step = iteration if isinstance(iteration, int) else 0
    state = megatron_state.train_state(step)
    small = {
        megatron_state.COMMON: megatron_state.common(
            model_settings.to_args(settings, iteration=step, model_id=model_id, stacked=stacked), iteration=step
        ),
        megatron_state.RUN_CONFIG: megatron_state.run_config(
            model_settings.to_run_config(settings, model_id=model_id, stacked=stacked)
        ),
        megatron_state.TRAIN_STATE: state,
        **{HF / path: content for path, content in (hf_artefacts or {}).items()},
        **inner.small,
        megatron_state.METADATA: megatron_state.metadata(),
    }
    folder = Path(folder_name(iteration))
    trackers = {megatron_state.TRACKER: str(iteration).encode()}
    if iteration != "release":
        trackers[megatron_state.STATE_TRACKER] = state
    return inside(inner, folder, small=small, beside=trackers)


def inside(
    layout: FolderLayout, folder: Path, *, small: Mapping[Path, bytes], beside: Mapping[Path, bytes]
) -> FolderLayout:
    """A layout moved into a folder, with other small files in it and beside it."""
    return FolderLayout(
        sizes={folder / path: size for path, size in layout.sizes.items()},
        fixed={folder / path: parts for path, parts in layout.fixed.items()},
        chunks=[
            replace(chunk, extent=replace(chunk.extent, file=folder / chunk.extent.file)) for chunk in layout.chunks
        ],
        small={folder / path: content for path, content in small.items()} | dict(beside),
        copied={folder / path: source for path, source in layout.copied.items()},
    )


def extra_states(tensors: Mapping[str, TensorInfo], *, layers: Layers = "te") -> list[str]:
    """The keys of the states that layers keep besides weights, one for each linear layer (and norm, see `lay_out`).

    Source: NVIDIA/Megatron-LM core_v0.16.1 and core_v0.19.2, `GPTModel.sharded_state_dict` of models of both specs,
        with and without `hetereogenous_dist_checkpoint`: stacked, `..._extra_state/shard_LAYER_LAYERS`.
    """
    out = []
    for key, info in tensors.items():
        if match := LINEAR.fullmatch(key):
            stack = info.shape[0] if len(info.shape) > 2 else 1
            out += [f"{match[1]}._extra_state/shard_{layer}_{stack}" for layer in range(stack)]
    if layers == "te" and "decoder.final_layernorm.weight" in tensors:
        out.append("decoder.final_layernorm._extra_state/shard_0_1")
    return out
