"""What the ranks of an export do together: wait, agree on faults, let one of them act. A single process is one rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from converters.errors import CheckpointError, ConversionError, TopologyError, listing

T = TypeVar("T")


def rank() -> int:
    """This process's rank."""
    return dist.get_rank() if several() else 0


def several() -> bool:
    """Whether there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def members(group: dist.ProcessGroup | None = None) -> tuple[int, ...]:
    """The global ranks of a group, by default of all processes.

    Raises:
        TopologyError: This process is not one of them.
    """
    if not several():
        return (0,)
    found = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
    if rank() not in found:
        raise TopologyError(f"rank {rank()} is not in the process group, whose ranks are {list(found)}")
    return found


def device_of(group: dist.ProcessGroup | None, held: set[str]) -> torch.device:
    """Where what a group sends must be, for tensors on devices of the types `held`, on any of its ranks.

    The GPU where tensors are on one and the group has NCCL for it, or has nothing else; else the host, since gloo sends
    from no GPU.
    """
    if not several():
        return torch.device("cuda" if "cuda" in held else "cpu")
    backends = dict(part.split(":") for part in str(dist.get_backend_config(group)).split(","))
    if backends.get("cuda") == "nccl" and ("cuda" in held or "cpu" not in backends):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def everyone(own: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """What every rank passed, in rank order; of a group, in its order."""
    if not several():
        return [own]
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, own, group=group)
    return found


def agree(faults: list[str]) -> None:
    """Wait for every rank, and fail on all of them with the faults of any.

    Raises:
        CheckpointError: Some rank found a fault.
    """
    found = {fault for theirs in everyone(faults) for fault in theirs}
    if found:
        raise CheckpointError(listing("the model cannot be exported", found))


def on_first(step: Callable[[], T]) -> T:
    """Run `step` on rank 0, and give its result, or its error, to every rank."""
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = step()
        except (ConversionError, OSError) as error:
            outcome[1] = error
        except Exception as error:
            # Whatever it is, the others wait for word of it; and it may not be made to travel.
            outcome[1] = ConversionError(f"{type(error).__name__} on rank 0: {error}")
    if several():
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def merged_dtypes(own: Mapping[str, str]) -> dict[str, str]:
    """The dtypes that any rank knows, by tensor."""
    return {key: dtype for theirs in everyone(dict(own)) for key, dtype in theirs.items()}


def add_parts(tensor: torch.Tensor) -> None:
    """Put together a tensor of which each rank holds a part, over zeros.

    The parts are disjoint, so their sum as integers keeps every bit. Bytes, since gloo adds no int16.
    """
    if several():
        dist.all_reduce(tensor.view(-1).view(torch.uint8))
