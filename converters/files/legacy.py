"""Legacy Megatron checkpoints: a file of `torch.save` for each rank of the model-parallel mesh.

Each file is mapped and its pickle read as data; the tensors become byte ranges. A rank's tensors are those of the plan
restricted to its place, once for each model chunk that it holds.

Source: NVIDIA/Megatron-LM core_v0.16.1, megatron/training/checkpointing.py `get_checkpoint_name` (`mp_rank_XX`,
    `mp_rank_XX_YYY` where there are pipeline stages, one more number where there are experts), `generate_state_dict`
    (`model`, or `model0`, `model1`, ... under interleaving; layers are numbered from 0 in each).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, TopologyError, listing
from converters.files import megatron_state, torch_archive
from converters.files import settings as model_settings
from converters.files.extents import Extent, Record
from converters.files.identity import Identity
from converters.files.links import check_inside
from converters.files.rank_tensors import RankTensors
from converters.files.settings import Settings
from converters.files.torch_archive import Stored
from converters.pickled import shown
from converters.tensors import QUANTIZED, TensorInfo
from converters.topology import Coord, Mesh, Topology

NAMES = ("model_optim_rng.pt", "model_rng.pt")
RANK = re.compile(r"mp_rank_([0-9]{2,4})(?:_([0-9]{3,4}))?(?:_([0-9]{3,4}))?")
NOT_WEIGHTS = {
    "optimizer": "the optimizer's state",
    "opt_param_scheduler": "the scheduler's state",
    "lr_scheduler": "the scheduler's state",
    "rng_state": "states of random generators",
    "rerun_state_machine": "what it takes to run a step again",
}
OLDER = ("language_model", "word_embeddings_for_head")


@dataclass(frozen=True, kw_only=True)
class RankFiles:
    """The tensors of one model chunk of one rank.

    Attributes:
        root: The rank's folder.
        mesh: The chunk's place.
        identities: Which file it is.
        left_alone: What the file holds besides weights.
    """

    root: Path
    mesh: Mesh
    infos: Mapping[str, TensorInfo] = field(repr=False)
    places: Mapping[str, Extent] = field(repr=False)
    identities: Mapping[Path, Identity] = field(repr=False)
    left_alone: Mapping[str, str] = field(default_factory=dict)
    held: Sequence[Record] = field(default=(), repr=False)

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every weight, as the rank holds it."""
        return self.infos

    def extents(self, key: str) -> Sequence[Extent]:
        """Its one box."""
        return (self.places[key],)

    def records(self) -> Sequence[Record]:
        """The records of its archive."""
        return self.held


@dataclass(frozen=True, kw_only=True)
class Legacy:
    """A legacy checkpoint.

    Attributes:
        ranks: Its model chunks, by rank.
        args: Megatron-LM's arguments, where the files have them.
        where: The file that they are from.
        state: What else the first file holds (the iteration).
    """

    ranks: tuple[RankFiles, ...]
    args: Mapping[str, Any] | None
    where: str
    state: Mapping[str, Any]

    @property
    def topology(self) -> Topology:
        """The mesh that wrote it."""
        return self.ranks[0].mesh.topology

    def whole(self, root: Path, column: str, settings: Settings) -> RankTensors:
        """Its tensors, whole.

        Args:
            root: The checkpoint's folder.
            column: Of the weights' table.
            settings: What its arguments say of the model.

        Raises:
            CheckpointError: Tensors that are not those of that model on this mesh, or copies that are not equal.
            ConfigError: A model that no family has.
        """
        layers, held = settings.fields["num_layers"], sum(len(rank.tensors()) for rank in self.ranks)
        if layers > held:  # before a plan for all of them is made
            raise CheckpointError(
                f"{self.where}: its arguments say num_layers={layers:,}, and the {held:,} tensors of all ranks cannot "
                "be of so many: the file is damaged, or files are missing"
            )
        family, config = model_settings.hf_config(settings)
        # Where parts lie, padding counts as what it pads, and a bias of zeros as a bias.
        sizes = family.fields.quantities(family.fields.read(config)[0])
        per_group = sizes["num_attention_heads"] // sizes["num_key_value_heads"]
        rows, tp = self.ranks[0].tensors(), self.topology.tp
        embedding = rows.get("embedding.word_embeddings.weight")
        merged = next((info for key, info in rows.items() if key.endswith("self_attention.linear_qkv.weight")), None)
        if embedding is not None and len(embedding.shape) == 2:
            config["vocab_size"] = embedding.shape[0] * tp
        if merged is not None and len(merged.shape) == 2:
            groups = max(1, merged.shape[0] * tp // ((per_group + 2) * sizes["head_dim"]))
            config |= {"num_key_value_heads": groups, "num_attention_heads": groups * per_group}
        biased = bool(config.get("attention_bias") or config.get("mlp_bias"))
        config |= {"head_dim": sizes["head_dim"], "attention_bias": biased, "mlp_bias": biased}
        left = {name: what for rank in self.ranks for name, what in rank.left_alone.items()}
        tensors = RankTensors(root, family.plan(column, column, config), self.ranks, left)
        tensors.check_copies()
        return tensors


def rank_folders(folder: Path) -> list[Path]:
    """The folders of ranks in the folder of an iteration.

    Raises:
        CheckpointError: One is a link out of that folder.
    """
    found = sorted(path for path in folder.glob("mp_rank_*") if path.is_dir())
    for path in found:
        check_inside(path, folder)
    return found


def open_ranks(folder: Path) -> Legacy:
    """The legacy checkpoint in the folder of an iteration.

    Raises:
        CheckpointError: Files that are missing or cannot be read, ranks that do not form a mesh, experts, or the names
            that Megatron-LM gave tensors before Megatron-Core; all that is wrong.
    """
    files = _files(folder)
    identities = {file: Identity.of(file) for file in files.values()}  # before they are read
    found = {
        place: megatron_state.state_of(megatron_state.read_mapped(file), str(file)) for place, file in files.items()
    }
    first = files[min(files)]
    args = megatron_state.args_of(found[min(files)], str(first))
    _check_experts(folder, files, args)
    topology = _topology(folder, files, found, args)
    ranks: list[RankFiles] = []
    problems: list[str] = []
    for (tp, pp), file in sorted(files.items()):
        left = {name: why for name, why in NOT_WEIGHTS.items() if name in found[tp, pp]}
        left |= {path.name: "not weights" for path in sorted(file.parent.iterdir()) if path.name not in NAMES}
        for chunk in range(topology.vpp):
            name = "model" if topology.vpp == 1 else f"model{chunk}"
            mesh = Mesh(topology, Coord(tp=tp, etp=tp, pp=pp, chunk=chunk))
            infos, places, held = _tensors(found[tp, pp].get(name), f"{file}: {name}", file, problems)
            which = {file.absolute(): identities[file]}
            ranks.append(
                RankFiles(
                    root=file.parent,
                    mesh=mesh,
                    infos=infos,
                    places=places,
                    identities=which,
                    left_alone=left,
                    held=held,
                )
            )
    if problems:
        raise CheckpointError(listing(f"{folder}: files of ranks that cannot be read", problems))
    return Legacy(ranks=tuple(ranks), args=args, where=str(first), state=found[min(files)])


def _files(folder: Path) -> dict[tuple[int, int], Path]:
    """The file of each rank by its place (tp, pp)."""
    out: dict[tuple[int, int], Path] = {}
    problems: list[str] = []
    for path in rank_folders(folder):
        match = RANK.fullmatch(path.name)
        held = [path / name for name in NAMES if (path / name).is_file()]
        if match is None:
            problems.append(f"{path.name}: expected mp_rank_TP or mp_rank_TP_PP")
        elif match[3] is not None:
            problems.append(f"{path.name}: the third number is that of experts, which no family here has")
        elif len(held) != 1:
            problems.append(f"{path.name}: expected one of {' and '.join(NAMES)}, found {len(held)}")
        else:
            place = int(match[1]), int(match[2] or 0)
            if place in out:
                problems.append(f"{path.name}: the same rank as {out[place].parent.name}")
            out[place] = held[0]
    tp, pp = (1 + max((place[i] for place in out), default=0) for i in (0, 1))
    if not problems:
        problems += [
            f"the file of tp={t} pp={p} is missing (others are there up to tp={tp - 1} pp={pp - 1})"
            for t in range(tp)
            for p in range(pp)
            if (t, p) not in out
        ][:64]
    if problems:
        raise CheckpointError(listing(f"{folder}: an unfinished or damaged checkpoint of ranks", problems))
    return out


def _check_experts(folder: Path, files: Iterable[tuple[int, int]], args: Mapping[str, Any] | None) -> None:
    """Without pipeline stages the second number is that of experts."""
    experts = (args or {}).get("expert_model_parallel_size")
    if isinstance(experts, int) and experts > 1:
        raise CheckpointError(
            f"{folder}: written with expert_model_parallel_size={experts}; no family here has experts"
        )


def _topology(
    folder: Path,
    files: Iterable[tuple[int, int]],
    found: Mapping[tuple[int, int], Mapping[str, Any]],
    args: Mapping[str, Any] | None,
) -> Topology:
    """The mesh that the files form, held against the arguments."""
    places = list(files)
    tp, pp = (1 + max(place[i] for place in places) for i in (0, 1))
    chunks = {
        place: sum(1 for name in state if re.fullmatch(r"model[0-9]{0,3}", str(name))) for place, state in found.items()
    }
    vpp = chunks[0, 0]
    problems = [
        f"tp={t} pp={p}: {count} model chunks, where tp=0 pp=0 has {vpp}"
        for (t, p), count in chunks.items()
        if count != vpp
    ]
    if not vpp:
        problems.append("no file has a 'model' in it")
    said = args or {}
    sizes = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp if vpp > 1 else None,
    }
    for name, size in sizes.items():
        if said.get(name, size) not in (size, size or 1):
            problems.append(f"its arguments say {name}={shown(said[name])}, its files say {size}")
    if problems:
        raise CheckpointError(listing(f"{folder}: files of ranks that do not form a mesh", problems))
    try:
        return Topology(
            tp=tp,
            pp=pp,
            vpp=vpp,
            first_stage_layers=_count(said, "decoder_first_pipeline_num_layers"),
            last_stage_layers=_count(said, "decoder_last_pipeline_num_layers"),
            count_embedding=said.get("account_for_embedding_in_pipeline_split") is True,
            count_loss=said.get("account_for_loss_in_pipeline_split") is True,
        )
    except TopologyError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _count(args: Mapping[str, Any], name: str) -> int | None:
    found = args.get(name)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _tensors(
    model: Any, where: str, file: Path, problems: list[str]
) -> tuple[dict[str, TensorInfo], dict[str, Extent], list[Record]]:
    """The weights in the state of a module, where they are, and in which records of the file."""
    infos: dict[str, TensorInfo] = {}
    places: dict[str, Extent] = {}
    held: list[Record] = []
    if type(model) is not dict:
        problems.append(f"{where}: expected a dict of tensors, found a {type(model).__name__}")
        return infos, places, held
    older = [name for name in OLDER if name in model or any(str(key).startswith(f"{name}.") for key in model)]
    if older:
        problems.append(
            f"{where}: the names of Megatron-LM before Megatron-Core ({older[0]}...); convert it once with "
            "tools/checkpoint/convert.py of Megatron-LM core_v0.16 (--model-type GPT --loader legacy --saver core)"
        )
        return infos, places, held
    for key, value in model.items():
        if type(key) is str and key.endswith("_extra_state"):
            continue  # of FP8, or nothing: no weight
        if type(key) is not str or type(value) is not Stored:
            problems.append(f"{where}: {shown(key)} is a {type(value).__name__}, expected a tensor")
        elif value.pending:
            problems.append(f"{where}: {shown(key)} {torch_archive.not_its_values(value)}")
        elif value.info.dtype.startswith(QUANTIZED):
            problems.append(f"{where}: {shown(key)} is quantised ({value.info.dtype}) and needs its scales")
        elif not value.contiguous:
            problems.append(f"{where}: {shown(key)} is not contiguous (strides {list(value.strides)})")
        else:
            infos[key] = value.info
            places[key] = Extent(file.absolute(), value.offset, (0,) * len(value.info.shape), value.info.shape)
            held.append(Record(key, file.absolute(), *value.record, value.crc))
    return infos, places, held
