"""Collectives of tensor and sequence parallelism, each with its gradient.

Transformer Engine's linears communicate at four places, in pairs that are each other's gradient: a column-parallel
linear takes the whole input (`copy`, or `gather` where the sequence is cut), a row-parallel one adds the ranks' outputs
(`reduce`, or `reduce_scatter`). The sequence is the first dimension of a tensor, whatever its format. Without a group,
or in a group of one, all of them are the identity.

Source: TransformerEngine 2.20.2, transformer_engine/pytorch/distributed.py, `gather_along_first_dim`,
`reduce_scatter_along_first_dim`, `allreduce`, and their places in module/linear.py and module/layernorm_mlp.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from converters.errors import ConversionError

Group = dist.ProcessGroup


def world_size(group: Group | None) -> int:
    """Ranks in `group`; 1 without a group."""
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: Group | None) -> int:
    """This process's place in `group`; 0 without a group."""
    return 0 if group is None else dist.get_rank(group)


def copy(x: Tensor, group: Group | None) -> Tensor:
    """`x` itself; its gradient is the sum of the ranks' gradients."""
    return x if world_size(group) == 1 else _apply(_Copy, x, group)


def reduce(x: Tensor, group: Group | None) -> Tensor:
    """The sum over ranks; its gradient is passed on as it is."""
    return x if world_size(group) == 1 else _apply(_Reduce, x, group)


def gather(x: Tensor, group: Group | None) -> Tensor:
    """`[s/tp ...]` to `[s ...]`; the gradient is summed over ranks and cut again."""
    return x if world_size(group) == 1 else _apply(_Gather, x, group)


def reduce_scatter(x: Tensor, group: Group | None) -> Tensor:
    """`[s ...]` to this rank's part `[s/tp ...]` of the sum over ranks; the gradient is gathered."""
    return x if world_size(group) == 1 else _apply(_ReduceScatter, x, group)


def split(x: Tensor, group: Group | None) -> Tensor:
    """This rank's part along dim 0 of what every rank holds whole; the gradient is gathered."""
    return x if world_size(group) == 1 else _apply(_Split, x, group)


def join(x: Tensor, group: Group | None, dim: int = 0) -> Tensor:
    """The ranks' parts along `dim`, for a use that every rank repeats: the gradient, equal on all, is cut again."""
    if world_size(group) == 1:
        return x
    return _apply(_Join, x.movedim(dim, 0), group).movedim(0, dim)


def require_group(owner: str, group: Group | None, size: int) -> None:
    """Refuse to run a tensor-parallel layer that has not been given its group.

    Raises:
        ConversionError: `size` is above one and there is no group, or one of another size.
    """
    if size > 1 and group is None:
        raise ConversionError(
            f"{owner}: built for tp_size {size} without a group; call set_tensor_parallel_group(group) first"
        )
    if world_size(group) != size:
        raise ConversionError(f"{owner}: expected a group of {size} ranks, found one of {world_size(group)}")


def _apply(function: type[torch.autograd.Function], x: Tensor, group: Group | None) -> Tensor:
    result: Tensor = function.apply(x, group)
    return result


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def _all_gather(x: Tensor, group: Group) -> Tensor:
    whole = x.new_empty(x.shape[0] * dist.get_world_size(group), *x.shape[1:])
    dist.all_gather(list(whole.chunk(dist.get_world_size(group))), x.contiguous(), group=group)
    return whole


def _scatter_sum(x: Tensor, group: Group) -> Tensor:
    ranks = dist.get_world_size(group)
    if x.shape[0] % ranks:
        raise ConversionError(
            f"sequence parallelism cuts the first dimension: expected its size to divide by {ranks} ranks, found "
            f"{x.shape[0]} (shape {tuple(x.shape)}); pad the sequence"
        )
    part = x.new_empty(x.shape[0] // ranks, *x.shape[1:])
    dist.reduce_scatter(part, list(x.contiguous().chunk(ranks)), group=group)
    return part


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(gradient, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _scatter_sum(gradient, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _scatter_sum(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_gather(gradient, ctx.group), None


def _part(x: Tensor, group: Group) -> Tensor:
    return x.chunk(dist.get_world_size(group))[dist.get_rank(group)].contiguous()


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _part(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_gather(gradient, ctx.group), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _part(gradient, ctx.group), None
