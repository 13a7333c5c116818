"""What each rank states of its tensors before weights move, and what the statements of all of them say together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from converters.errors import CheckpointError
from converters.execute import info_of
from converters.plan import Plan
from converters.sync.messages import Dtypes, Names, Tensors
from converters.sync.resharding import Exchange, Place
from converters.sync.ties import Label
from converters.tensors import FLOATS, check_tensors

Chunk = torch.nn.Module | Mapping[str, torch.Tensor]
"""A model chunk, wrapped or bare, or its tensors by name."""


@dataclass(kw_only=True)
class Stated:
    """What one rank states; it travels to all others.

    Attributes:
        arguments: What it was called with.
        faults: What is wrong with its tensors.
        names: The dtypes of its tensors, by side and chunk.
        devices: Where they are.
        checksums: Of the boxes that are held twice.
    """

    arguments: dict[str, str]
    faults: list[str] = field(default_factory=list)
    names: dict[tuple[str, int], Names] = field(default_factory=dict)
    devices: set[str] = field(default_factory=set)
    checksums: dict[tuple[Label, str], int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What a rank goes on with.

    Attributes:
        read: Its tensors on the source side.
        written: Its tensors on the target side.
        dtypes: Of all ranks' tensors.
        devices: Where all ranks' tensors are.
    """

    read: Mapping[Place, Tensors]
    written: Mapping[Place, Tensors]
    dtypes: Dtypes
    devices: set[str]


def held(
    places: Sequence[Place], chunks: Sequence[Chunk], part_of: Callable[[Place], Plan], side: str, own: Stated
) -> dict[Place, dict[str, torch.Tensor]]:
    """The tensors of a rank's chunks; their dtypes and devices, and what is wrong with them, go into `own`.

    Raises:
        CheckpointError: Another number of chunks than places.
    """
    if len(places) != len(chunks):
        raise CheckpointError(
            f"expected {len(places)} chunks of the {side} ({', '.join(str(at) for _, at in places) or 'not of it'}), "
            f"found {len(chunks)}"
        )
    out = {}
    for place, chunk in zip(places, chunks, strict=True):
        tensors = out[place] = dict(_tensors(chunk))
        part, where = part_of(place), f"the {side} at {place[1]}"
        own.faults += [f"{where}: {name} is {problem}" for name, t in tensors.items() if (problem := _unfit(t))]
        try:
            infos = {name: info_of(tensor) for name, tensor in tensors.items()}
            check_tensors(part.source_tensors if side == "source" else part.target_tensors, infos, where)
        except CheckpointError as error:
            own.faults.append(str(error))
        own.names[side, place[1].chunk] = Names.of({name: info.dtype for name, info in infos.items()})
        own.devices |= {tensor.device.type for tensor in tensors.values()}
    return out


def _tensors(chunk: Chunk) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of the model inside its wrappers, or the tensors of a mapping."""
    if not isinstance(chunk, torch.nn.Module):
        yield from chunk.items()
        return
    while isinstance(inner := getattr(chunk, "module", None), torch.nn.Module):
        chunk = inner
    yield from ((name, parameter.data) for name, parameter in chunk.named_parameters())


def _unfit(tensor: torch.Tensor) -> str:
    """Why a tensor's memory cannot be read and written as it is, or an empty string."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}, expected a plain tensor: pass a mapping with its local or dequantised part"
    if tensor.device.type == "meta":
        return "on the meta device, expected memory"
    return "" if tensor.is_contiguous() else "not contiguous"


def shared(read: Mapping[Place, Tensors], written: Mapping[Place, Tensors]) -> list[str]:
    """Target tensors in the memory of source tensors, which would be written before it is read."""
    sources = {t.untyped_storage().data_ptr(): name for tensors in read.values() for name, t in tensors.items()}
    return [
        f"{name} of the target lies in the memory of {sources[address]} of the source"
        for tensors in written.values()
        for name, tensor in tensors.items()
        if (address := tensor.untyped_storage().data_ptr()) in sources and tensor.numel()
    ]


def arguments_that_differ(found: Mapping[int, Stated]) -> list[str]:
    """The arguments in which a rank's call differs from the first one's."""
    first, *others = found
    return [
        f"{name} is {found[first].arguments[name]} on rank {first} and {value} on rank {rank}"
        for rank in others
        for name, value in found[rank].arguments.items()
        if found[first].arguments[name] != value
    ]


def made_dtypes(
    exchange: Exchange, read: Mapping[Place, Names], dtype: str | None
) -> tuple[dict[Place, Names], list[str]]:
    """The dtypes of tensors that are to be made, `dtype` or those of what they are made of, and what is wrong."""
    usual = dtype or next(iter(read.values())).usual
    if dtype or all(names == Names(usual) for names in read.values()):
        return {place: Names(usual) for place in exchange.target.places()}, []
    made: dict[Place, dict[str, str]] = {place: {} for place in exchange.target.places()}
    faults = []
    for move in exchange.moves:
        key, found = move.copy.target.key, read[move.sender][move.copy.source.key]
        if made[move.receiver].setdefault(key, found) != found:
            faults.append(f"{key} is made of {made[move.receiver][key]} and {found}: say which dtype it is to have")
    return {place: Names(usual, names) for place, names in made.items()}, faults


def cast_faults(exchange: Exchange, dtypes: Dtypes, *, cast: bool) -> list[str]:
    """The dtype changes that are no roundings, and, unless `cast`, those that are."""
    if dtypes.only:
        return []
    faults = []
    for move in exchange.moves:
        source, target = move.copy.source.key, move.copy.target.key
        read, written = dtypes.read[move.sender][source], dtypes.written[move.receiver][target]
        if (read in FLOATS) != (written in FLOATS):
            faults.append(f"{target}: {read} -> {written}, and a cast rounds floats to floats only")
        elif read != written and not cast:
            faults.append(f"{target}: {read} -> {written}, and a cast must be asked for (cast=True)")
    return faults
