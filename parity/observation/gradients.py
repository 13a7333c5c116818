"""Gradients of a live model, mapped to Hugging Face keys through the plan of the weights.

A gradient lies where its weight lies, so the plan that exports weights exports gradients: each element of a Hugging
Face gradient is one element of one rank's `main_grad`. Two things differ. A shift of values (zero-centred norms) has
derivative one, so the plan is asked for without it. And a second copy (a tied head on the last stage, a norm on the
next tensor-parallel rank) holds the gradient of the whole again, the sum having been made by Megatron-Core: one copy is
taken, and the others must equal it to the bit, or the copies of the weight drift apart in training.

The plan is this package's own, whichever converter is under test: a model that a converter fills wrongly has the
gradients of a wrong model, and one that it lays out in another way is refused by names and shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from converters import execute
from converters.plan import Copy, Plan
from converters.topology import Coord
from parity.bounds import largest, rms


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The gradient of one tensor beside the expected one.

    Args:
        key: Hugging Face key.
        distance: Largest absolute difference in float32; root mean square of the differences in bfloat16.
        where: Index of the largest.
    """

    key: str
    distance: float
    where: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All gradients of a model beside the expected ones.

    Args:
        tensors: One for each Hugging Face key.
        replicas: Copies of a gradient compared with the first: how many, and those that differ.
        constants: Gradients of what a conversion added (padding, groups of zeros): how many, and those that are not 0.
    """

    tensors: list[Compared]
    replicas: tuple[int, list[str]]
    constants: tuple[int, list[str]]


@dataclass(frozen=True, kw_only=True)
class Held:
    """One model chunk of this rank.

    Args:
        model: The bare model.
        place: Where it is in the mesh.
        whole: The plan, to Hugging Face.
        part: What of it starts here.
        kept_as: The attribute of a parameter that has its reduced gradient.
    """

    model: Any
    place: Coord
    whole: Plan
    part: Plan
    kept_as: str

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        found: torch.device = next(self.model.parameters()).device
        return found

    def gradient(self, name: str) -> Tensor:
        """The reduced gradient of parameter `name`."""
        found: Tensor = getattr(self.model.get_parameter(name), self.kept_as)
        return found


def freeze(parts: Sequence[Held]) -> list[str]:
    """Freeze parameters that the Hugging Face model does not have (biases of zeros); the names of all. Collective.

    Megatron-Core has one switch for all biases. Those that a model lacks are zeros there, and training would change
    them: it would train a model that has no Hugging Face form.
    """
    own = []
    for part in parts:
        known = {copy.source.key for copy in part.part.copies}
        for name, parameter in part.model.named_parameters():
            if name not in known:
                parameter.requires_grad_(False)
                own.append(f"{part.place}: {name}")
    found: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return [name for theirs in found for name in theirs]


def compare(parts: Sequence[Held], expected: Path, precision: str) -> Comparison:
    """Put each gradient together, one Hugging Face tensor at a time, and compare it on rank 0. Collective.

    Args:
        parts: This rank's chunks, after gradients were reduced.
        expected: Safetensors file with a float32 gradient for each Hugging Face key.
        precision: Of the model; says which distance is measured.
    """
    first = dist.get_rank() == 0
    apart = largest if precision == "fp32" else rms
    tensors: list[Compared] = []
    copies, differing = 0, []
    by_target = [{key: found for key, found, _ in part.part.by_target()} for part in parts]
    with safe_open(expected, framework="numpy") as reference:
        for key, shape in parts[0].whole.target_tensors.items():
            mine = [(part, copy) for part, found in zip(parts, by_target, strict=True) for copy in found.get(key, ())]
            actual = assembled(mine, shape, parts[0].device)
            for part, copy in mine:
                if copy.kind == "verify" or copy.source_replica:
                    copies += 1
                    fault = execute.tied_fault(copy, part.gradient(copy.source.key).float(), actual)
                    differing += [f"{part.place}: {key}: {fault}"] if fault else []
            if first:
                distance = apart(actual.cpu().numpy(), reference.get_tensor(key))
                tensors.append(Compared(key=key, distance=distance.value, where=distance.where))
    constants, nonzero = 0, []
    for part in parts:
        trained = [fill for fill in part.part.constants if part.model.get_parameter(fill.region.key).requires_grad]
        constants += sum(fill.elements for fill in trained)
        faults = execute.constant_faults([replace(fill, value=0.0) for fill in trained], part.gradient)
        nonzero += [f"{part.place}: {fault}" for fault in faults]
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, (copies, differing, constants, nonzero))
    return Comparison(
        tensors=tensors,
        replicas=(sum(found[0] for found in everyones), [line for found in everyones for line in found[1]]),
        constants=(sum(found[2] for found in everyones), [line for found in everyones for line in found[3]]),
    )


def assembled(mine: Sequence[tuple[Held, Copy]], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """One Hugging Face gradient, float32, whole, on every rank: the parts are disjoint, so their sum is exact."""
    out = torch.zeros(shape, dtype=torch.float32, device=device)
    for part, copy in mine:
        if copy.kind != "verify" and not copy.source_replica:
            execute.apply(copy, part.gradient(copy.source.key), out)
    dist.all_reduce(out)
    return out
