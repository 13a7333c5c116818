"""Folders of Megatron checkpoints, and what real ranks do with them. Functions that take a topology run in ranks."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from converters.files import megatron_folder, settings
from converters.files.extents import Extent, FolderLayout, TensorFiles
from converters.files.safetensors import SafetensorsFiles
from converters.models import FAMILIES
from converters.tensors import TensorInfo
from converters.topology import Topology

LLAMA = FAMILIES[0]


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def fields_of(folder: Path) -> dict[str, Any]:
    """The Megatron fields of a Hugging Face model."""
    return dict(LLAMA.fields.to_megatron(config_of(folder)).megatron)


def imported(
    source: Path, target: Path, *, stacked: bool = True, padding: dict[str, int] | None = None, **options: Any
) -> Path:
    """A Megatron checkpoint of a Hugging Face model."""
    from converters.files.stream import stream

    files = SafetensorsFiles(source)
    plan = LLAMA.plan("hf", "megatron_dist" if stacked else "megatron", config_of(source), **(padding or {}))
    dtype = next(iter(files.tensors().values())).dtype
    infos = {key: TensorInfo(shape, dtype) for key, shape in plan.target_tensors.items()}
    artefacts = {Path("config.json"): (source / "config.json").read_bytes()}
    layout = megatron_folder.lay_out(
        infos, settings=fields_of(source) | (padding or {}), stacked=stacked, hf_artefacts=artefacts, **options
    )
    prepare(target, layout)
    written = list(stream([(plan, files)], layout.chunks, target))
    assert {chunk.key for chunk in layout.chunks} == {each.key for each in written}
    return target


def prepare(target: Path, layout: FolderLayout) -> None:
    """All that a layout says but its chunks."""
    for path, size in layout.sizes.items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        with (target / path).open("wb") as file:
            file.truncate(size)
            for offset, content in layout.fixed[path]:
                file.seek(offset)
                file.write(content)
    for path, content in layout.small.items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_bytes(content)


def tensors_of(files: TensorFiles) -> dict[str, torch.Tensor]:
    """Every tensor, put together of its extents."""
    out = {}
    for key, info in files.tensors().items():
        whole = torch.zeros(info.shape, dtype=getattr(torch, info.dtype))
        seen = torch.zeros(info.shape, dtype=torch.int8)
        for extent in files.extents(key):
            place = tuple(slice(s, s + n) for s, n in zip(extent.starts, extent.shape, strict=True))
            whole[place] = _read(extent, whole.dtype)
            seen[place] += 1
        assert (seen == 1).all(), key
        out[key] = whole
    return out


def _read(extent: Extent, dtype: torch.dtype) -> torch.Tensor:
    count = torch.Size(extent.shape).numel()
    with extent.file.open("rb") as file:
        file.seek(extent.offset)
        content = bytearray(file.read(count * dtype.itemsize))
    return torch.frombuffer(content, dtype=dtype).reshape(extent.shape)


def _built(source: Path, topology: Topology, *, load: bool, **fields: Any) -> tuple[Any, list[Any]]:
    from converters.bridge import AutoBridge
    from converters.megatron import runtime
    from converters.megatron.provider import unwrap

    runtime.install()
    bridge = AutoBridge.from_hf_pretrained(source)
    provider = bridge.to_megatron_provider(load_weights=load)
    provider.topology = topology
    for name, value in fields.items():
        setattr(provider, name, value)
    provider.pad_query_groups()
    chunks = [unwrap(chunk) for chunk in provider.provide_distributed_model(wrap_with_ddp=False)]
    if not load:
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data.fill_(float("nan"))
    return provider, chunks


def loaded(source: Path, topology: Topology, checkpoint: Path, *, stacked: bool = True) -> dict[str, Any]:
    """Load a checkpoint by Megatron-Core under its strictest setting.

    Returns:
        The parameters that differ from those of the Hugging Face model, loaded without a Megatron file, and the
        common state.
    """
    from megatron.core import dist_checkpointing

    _, right = _built(source, topology, load=True, hetereogenous_dist_checkpoint=not stacked)
    _, chunks = _built(source, topology, load=False, hetereogenous_dist_checkpoint=not stacked)
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    wanted = {name: chunk.sharded_state_dict() for name, chunk in zip(names, chunks, strict=True)}
    state = dist_checkpointing.load(wanted, str(checkpoint), strict="raise_all")
    differ = []
    for name, chunk, other in zip(names, chunks, right, strict=True):
        chunk.load_state_dict(state.pop(name), strict=True)
        held = dict(chunk.named_parameters())
        differ += [key for key, tensor in other.named_parameters() if not torch.equal(tensor, held[key])]
    return {"differ": differ, "common": {key: state[key] for key in ("iteration", "checkpoint_version", "args")}}


def saved_by_ranks(source: Path, topology: Topology, folder: Path, args: Mapping[str, Any]) -> None:
    """Save a model as Megatron-LM's legacy format does: each rank its own state."""
    _, chunks = _built(source, topology, load=True)
    place = topology.coord(dist.get_rank())
    name = f"mp_rank_{place.tp:02}" + (f"_{place.pp:03}" if topology.pp > 1 else "")
    states = [chunk.state_dict_for_save_checkpoint() for chunk in chunks]
    names = ["model"] if len(states) == 1 else [f"model{index}" for index in range(len(states))]
    (folder / name).mkdir(parents=True, exist_ok=True)
    state = {
        "args": Namespace(**args),
        "checkpoint_version": 3.0,
        "iteration": 30,
        **dict(zip(names, states, strict=True)),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3, 4)}}, "param_groups": [{"lr": 0.1}]},
        "rng_state": [{"torch_rng_state": torch.get_rng_state()}],
    }
    torch.save(state, folder / name / "model_optim_rng.pt")


def megatron_lm_args(source: Path, topology: Topology, **changes: Any) -> dict[str, Any]:
    """Arguments as Megatron-LM keeps them, some of no use to a model."""
    from megatron.core.transformer.enums import AttnBackend

    args = settings.to_args(fields_of(source), iteration=30)
    return {
        **args,
        "params_dtype": torch.float32,
        "attention_backend": AttnBackend.auto,
        "save": Path("/checkpoints"),
        "padded_vocab_size": None,
        "tensor_model_parallel_size": topology.tp,
        "pipeline_model_parallel_size": topology.pp,
        "virtual_pipeline_model_parallel_size": topology.vpp if topology.vpp > 1 else None,
        **changes,
    }


def listing(folder: Path) -> Iterable[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
