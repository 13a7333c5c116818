"""Whether the tied tensors of a mesh are still equal, though no rank holds both: by checksums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from converters.execute import view
from converters.plan import Copy, Plan, Region
from converters.sync.resharding import Exchange, Place, alike
from converters.topology import Coord
from converters.values import Tie

Label = tuple[Coord, Region, tuple[int, ...]]
"""A box of the first copy, by the first of the places that hold it."""
BLOCK = 1 << 18  # words that are multiplied at a time


class TiedCopies:
    """The boxes of the source that are held twice, on whichever ranks.

    Args:
        exchange: Whose source is looked at. The head of a model that ties it lies on the last stage of a pipeline and
            the embedding on the first: an exchange reads the embedding alone, and what strayed would be lost.
    """

    def __init__(self, exchange: Exchange) -> None:
        plan, self._held = exchange.plan, exchange.source
        # The source to itself: a `verify` then says which box must equal which.
        self._plan: Plan = replace(plan, target=plan.source, target_padding=plan.source_padding)
        chain = plan.table.resolve(plan.source)
        tied = any(isinstance(row.value, Tie) and row.value.column in chain for row in plan.rules)
        self._groups = alike(plan, plan.source, self._held) if tied else []
        self._found: dict[Place, list[tuple[Label, Region, Copy]]] = {}

    def checksums(self, read: Mapping[Place, Mapping[str, torch.Tensor]]) -> dict[tuple[Label, str], int]:
        """For each box, and each tensor of this rank that holds it, a checksum of its bits."""
        for place in read:
            if place not in self._found:
                self._found[place] = list(self._boxes(place))
        return {
            (label, f"{region.key} at {place[1]}"): checksum(view(tensors[region.key], region, copy.shape))
            for place, tensors in read.items()
            for label, region, copy in self._found[place]
        }

    def _boxes(self, place: Place) -> Iterator[tuple[Label, Region, Copy]]:
        """The boxes that `place` holds, as the second copy or as the first, of all pairs with any place."""
        own = next((members[0] for members in self._groups if place in members), None)
        for other in (members[0] for members in self._groups):
            if own is not None:
                yield from ((label, copy.source, copy) for label, copy in self._verified(own, other))
                yield from ((label, copy.target, copy) for label, copy in self._verified(other, own))

    def _verified(self, second: Place, first: Place) -> Iterator[tuple[Label, Copy]]:
        part = self._plan.restrict(source=self._held.mesh(second), target=self._held.mesh(first))
        yield from (((first[1], copy.target, copy.shape), copy) for copy in part.copies if copy.kind == "verify")


def faults(found: Sequence[Mapping[tuple[Label, str], int]]) -> list[str]:
    """From every rank's checksums: the boxes that are not the same wherever they are held."""
    held: dict[Label, dict[int, set[str]]] = {}
    for theirs in found:
        for (label, where), value in theirs.items():
            held.setdefault(label, {}).setdefault(value, set()).add(where)
    return [
        "tied tensors differ: " + " from ".join(", ".join(sorted(names)) for names in by_value.values())
        for by_value in held.values()
        if len(by_value) > 1
    ]


def checksum(tensor: torch.Tensor) -> int:
    """A number that differs where one element differs, and in all likelihood where several do, on any device.

    The sum, modulo 2^64, of all words of 8 bytes as integers, each times an odd number of its own.
    """
    flat = tensor.reshape(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    words = flat[:whole].clone().view(torch.int64) if flat.data_ptr() % 8 else flat[:whole].view(torch.int64)
    total = int.from_bytes(bytes(flat[whole:].tolist()), "little") * (2 * words.numel() + 1)
    odd = torch.arange(1, 2 * min(BLOCK, words.numel()), 2, device=flat.device)
    for start in range(0, words.numel(), BLOCK):
        block = words[start : start + BLOCK]
        total += int((block * odd[: block.numel()]).sum()) + 2 * start * int(block.sum())
    return total % 2**64
