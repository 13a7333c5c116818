"""Where the worst of some tensors is wrong, as a picture: blocks of rows by blocks of columns."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from converters.execute import bits
from parity.findings import Map

BLOCKS = 64
"""A picture has at most so many blocks each way."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""What a tensor holds, and what it must hold."""


@dataclass(frozen=True, kw_only=True)
class Worst:
    """The tensor with the most wrong elements.

    Args:
        elements: How many are wrong.
        picture: Where.
    """

    elements: int
    picture: Map


def worst(pairs: Mapping[str, Pair], *, is_coded: bool) -> Worst | None:
    """The worst of `pairs`, those of another shape or dtype left out; `None` if no element of any is wrong.

    Args:
        pairs: By the name that the picture shall have.
        is_coded: The elements are codes: how far one is from another says nothing, so the share of wrong ones is shown;
            of weights, the largest difference.
    """
    counts = {
        name: int((bits(actual.contiguous()) != bits(expected.contiguous())).sum())
        for name, (actual, expected) in pairs.items()
        if actual.shape == expected.shape and actual.dtype == expected.dtype
    }
    name = max(counts, key=lambda one: counts[one], default="")
    if not counts.get(name):
        return None
    return Worst(elements=counts[name], picture=difference_map(name, *pairs[name], is_coded=is_coded))


def difference_map(name: str, actual: torch.Tensor, expected: torch.Tensor, *, is_coded: bool) -> Map:
    """A matrix in at most `BLOCKS` by `BLOCKS` blocks; a vector is a matrix of one row."""
    found, right = (tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1) for tensor in (actual, expected))
    rows, columns = (_edges(size) for size in found.shape)
    values = []
    for start, stop in itertools.pairwise(rows):
        here, there = found[start:stop], right[start:stop]
        if is_coded:
            line = (bits(here.contiguous()) != bits(there.contiguous())).double().mean(dim=0)
        else:
            line = (here.double() - there.double()).abs().amax(dim=0)
        parts = (line[left:end] for left, end in itertools.pairwise(columns))
        values.append([float(part.mean() if is_coded else part.amax()) for part in parts])
    return Map(
        title=f"{name} {list(actual.shape)}: {'where it is wrong' if is_coded else 'how far it is off'}",
        x="column",
        y="row",
        values=values,
        unit="of a block differ" if is_coded else "max |Δ|",
        rows=_names(rows),
        columns=_names(columns),
        log=not is_coded,
    )


def _edges(size: int) -> list[int]:
    count = min(size, BLOCKS)
    return [index * size // count for index in range(count + 1)]


def _names(edges: list[int]) -> list[str]:
    return [str(start) if stop - start == 1 else f"{start}-{stop - 1}" for start, stop in itertools.pairwise(edges)]
