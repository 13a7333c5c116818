"""What ranks do with Megatron-Core's own `dist_checkpointing`. Every function here is called in a rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from bridged import build, held, unlike

from converters.topology import Topology


def sharded(provider: Any, chunks: list[Any]) -> dict[str, Any]:
    """What this rank asks of a checkpoint, or gives to it."""
    from converters.megatron.provider import unwrap

    metadata = {"dp_cp_group": dist.group.WORLD} if provider.context_parallel_size > 1 else None
    names = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    return {
        name: unwrap(chunk).sharded_state_dict(prefix="", metadata=metadata)
        for name, chunk in zip(names, chunks, strict=True)
    }


def load(source: Path, topology: Topology, checkpoint: Path, **fields: Any) -> list[str]:
    """Load a checkpoint under the strictest setting; the parameters that are not what `AutoBridge` loads."""
    from megatron.core import dist_checkpointing

    from converters.megatron.provider import unwrap

    bridge, provider, chunks = build(source, topology, **fields)
    found = dist_checkpointing.load(sharded(provider, chunks), str(checkpoint), strict="raise_all")
    for chunk, name in zip(chunks, sharded(provider, chunks), strict=True):
        wrong = unwrap(chunk).load_state_dict(found[name], strict=False)
        missing = [key for key in wrong.missing_keys if not key.endswith("_extra_state")]
        assert not missing
    loaded = [{name: tensor.clone() for name, tensor in each.items()} for each in held(chunks)]
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    bridge.load_hf_weights(chunks)
    return [name for actual, expected in zip(loaded, held(chunks), strict=True) for name in unlike(actual, expected)]


def save(source: Path, topology: Topology, checkpoint: Path, optimizer: bool = False, **fields: Any) -> None:
    """Load a model by `AutoBridge`, and have Megatron-Core save it, with the state of an optimizer if asked."""
    from megatron.core import dist_checkpointing

    bridge, provider, chunks = build(source, topology, **fields)
    bridge.load_hf_weights(chunks)
    state = sharded(provider, chunks)
    if optimizer:
        state["optimizer"] = _optimizer_state(chunks, state)
    state["iteration"] = 7
    checkpoint.mkdir(exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(state, str(checkpoint))


def _optimizer_state(chunks: list[Any], state: dict[str, Any]) -> Any:
    """Of Adam before its first step. The distributed optimizer cannot be made without a GPU: it asks for CUDA types."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    (chunk,) = chunks
    wrapped = DistributedDataParallel(chunk.config, DistributedDataParallelConfig(), chunk)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3), [wrapped])
    return optimizer.sharded_state_dict(state["model"], is_loading=True)


def save_cut(checkpoint: Path, mesh: tuple[int, ...]) -> None:
    """Save tensors that are cut over a mesh of ranks, unevenly, as FSDP and its like cut them."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    ranks = init_device_mesh("cpu", mesh)
    state = {
        "rows": distribute_tensor(whole(7, 5), ranks, [Shard(0)] + [Replicate()] * (len(mesh) - 1)),
        "box": distribute_tensor(whole(7, 5).bfloat16(), ranks, [Shard(dim) for dim in range(len(mesh))]),
        "few": distribute_tensor(whole(1), ranks, [Shard(0)] * len(mesh)),
    }
    dcp.save({"model": state}, checkpoint_id=checkpoint)


def whole(*shape: int) -> Any:
    """A tensor whose elements count up."""
    import torch

    return torch.arange(float(torch.Size(shape).numel())).view(shape)
