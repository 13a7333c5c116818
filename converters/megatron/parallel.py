"""Megatron-Core's parallel state, set up from a `Topology` and checked against it rank by rank."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)

from converters.errors import TopologyError
from converters.megatron import runtime
from converters.topology import Coord, Topology


def initialize(topology: Topology, *, seed: int = 1234, timeout_minutes: int = 30) -> Coord:
    """Create Megatron-Core's process groups for `topology`, seed its generators, and return this rank's place.

    Collective: every rank of the default process group calls it.

    Args:
        topology: The mesh; its size is the world size.
        seed: The seed of the run; Megatron-Core derives each rank's from it.
        timeout_minutes: How long a collective in these groups may take.

    Raises:
        TopologyError: No process group, another world size than the mesh has, or Megatron-Core orders the ranks
            differently than `topology` does.
        RuntimeUnavailableError: No GPU, and the CPU runtime is not installed.
    """
    runtime.require()
    if not torch.distributed.is_initialized():
        raise TopologyError(
            f"{topology} needs a process group of {topology.world_size} ranks, and torch.distributed is not "
            "initialised: call torch.distributed.init_process_group first"
        )
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    if world != topology.world_size:
        raise TopologyError(f"{topology} is a mesh of {topology.world_size} ranks, and this process group has {world}")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=topology.tp,
        pipeline_model_parallel_size=topology.pp,
        virtual_pipeline_model_parallel_size=topology.vpp if topology.vpp > 1 else None,
        context_parallel_size=topology.cp,
        expert_model_parallel_size=topology.ep,
        expert_tensor_parallel_size=topology.expert_tp,
        distributed_timeout_minutes=timeout_minutes,
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    expected, actual = topology.coord(rank), current_coord()
    if expected != actual:
        raise TopologyError(
            f"rank {rank} of {topology} should be at {expected!r}, and Megatron-Core puts it at {actual!r}: "
            "its rank order is not the one that this package knows (tp-cp-ep-dp-pp)"
        )
    return expected


def current_coord() -> Coord:
    """This rank's place as Megatron-Core's parallel state has it (model chunk 0)."""
    return Coord(
        tp=parallel_state.get_tensor_model_parallel_rank(),
        pp=parallel_state.get_pipeline_model_parallel_rank(),
        cp=parallel_state.get_context_parallel_rank(),
        dp=parallel_state.get_data_parallel_rank(),
        ep=parallel_state.get_expert_model_parallel_rank(),
        etp=parallel_state.get_expert_tensor_parallel_rank(),
        edp=parallel_state.get_expert_data_parallel_rank(),
    )


def mark_cuts(model: torch.nn.Module) -> None:
    """Mark the weights that are cut over tensor parallelism, where Megatron-Core did not.

    Its 0.16 marks a weight only where it also initialises it. Unmarked, the weights of every rank but the first count
    as copies: the norm of all gradients, and with it how far they are clipped, comes out wrong.

    Source: NVIDIA/Megatron-LM core_v0.16.1, megatron/core/tensor_parallel/layers.py `_initialize_affine_weight_gpu` and
        `param_is_not_tensor_parallel_duplicate`; core_v0.19.2 marks in either case.
    """
    dims = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module) in dims and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, True, dims[type(module)], 1)


def shutdown() -> None:
    """Destroy Megatron-Core's process groups, so that another topology can be initialised. Collective."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.destroy_global_memory_buffer()
