"""What runs inside ranks for the suite: build, load, observe, export. Everything here is called through a zygote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from converters.errors import ConversionError
from converters.topology import Coord, Topology
from parity import coded
from parity.causes import Cause
from parity.converter import Converter, Settings
from parity.diagnosis.pullback import Pullback
from parity.diagnosis.verdicts import Trace
from parity.difference_map import Pair, worst
from parity.folders import Found, compare_folders, differences, read
from parity.statement.config import Facts, answered
from parity.statement.ledgers import set_fields
from parity.statement.live import beside

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def loaded(converter: Converter, folder: Path, settings: Settings) -> list[Any]:
    """This rank's chunks of the model in `folder`, by the converter under test."""
    _prepare(settings)
    chunks = list(converter.to_megatron(folder, settings))
    wanted = settings.topology.vpp
    if len(chunks) != wanted or not all(isinstance(chunk, torch.nn.Module) for chunk in chunks):
        found = ", ".join(type(chunk).__name__ for chunk in chunks) or "nothing"
        raise ConversionError(
            f"to_megatron returned {found} on rank {dist.get_rank()} of {settings.topology}, expected {wanted} "
            f"GPTModel{'s, one for each model chunk' * (wanted > 1)}"
        )
    return chunks


def _prepare(settings: Settings) -> None:
    """The device of this rank, and Megatron-Core's parallel state."""
    from converters.megatron import parallel, runtime

    if not torch.cuda.is_available():
        runtime.install()
    else:
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    parallel.initialize(settings.topology)


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What one rank says of an import.

    Args:
        found: Parameters compared, what differs, and, from rank 0, what explains it.
        traces: What this rank lacks or holds besides; to be merged over ranks.
        parameters: Names of what it holds.
        facts: What each of its models computes with (`parity.statement.config`).
        fields: Fields of Megatron's config that are not at their default.
    """

    found: Found
    traces: tuple[Trace, ...]
    parameters: tuple[str, ...]
    facts: tuple[Facts, ...]
    fields: Mapping[str, str]


def imported(converter: Converter, folder: Path, settings: Settings, scratch: Path) -> Imported:
    """Import a coded checkpoint, and compare each parameter with an independent statement.

    Args:
        converter: Under test.
        folder: The coded checkpoint.
        settings: What the model is built for.
        scratch: An empty folder that all ranks see.
    """
    chunks = loaded(converter, folder, settings)
    table, config, topology = _table(folder), _config(folder), settings.topology
    pulled = Pullback(scratch, table, tied=bool(config["tie_word_embeddings"]))
    if dist.get_rank() == 0:
        pulled.create()
    dist.barrier()
    lines: list[str] = []
    traces: list[Trace] = []
    causes: list[Cause] = []
    count, names, facts = 0, list[str](), list[Facts]()
    wrong: dict[str, Pair] = {}
    for chunk in beside(unwrapped(chunks), read(folder), config, topology):
        place, held, stated = chunk.place, chunk.held, chunk.stated
        if misplaced := _misplaced(chunk.model, topology, place):
            lines += misplaced
            causes.append(Cause(kind="layers moved", detail=misplaced[0]))
        count += len(stated)
        names += held
        facts.append(answered(chunk.model))
        lines += [f"{place}: {name} is not held" for name in sorted(set(stated) - set(held))]
        lines += [f"{place}: {name} should not be held" for name in sorted(set(held) - set(stated))]
        for name in sorted(set(held) & set(stated)):
            found = differences(name, held[name].data.cpu(), stated[name], table)
            lines += [f"{place}: {line}" for line in found]
            if found:
                wrong[f"{name} ({place})"] = (held[name].data.cpu(), stated[name])
        traces += pulled.keep(chunk, config, topology)
    dist.barrier()
    if dist.get_rank() == 0:
        source = {key: tensor.to(DTYPES[settings.precision]) for key, tensor in read(folder).items()}
        causes += pulled.causes(source, config, topology, is_coded=settings.precision == "fp32")
    return Imported(
        found=Found(count=count, differing=tuple(lines), causes=tuple(causes), worst=worst(wrong, is_coded=True)),
        traces=tuple(traces),
        parameters=tuple(names),
        facts=tuple(facts),
        fields=set_fields(unwrapped(chunks)[0].config),
    )


def exported(converter: Converter, folder: Path, blank: Path, settings: Settings, target: Path) -> Found:
    """Export a model whose parameters are set by the independent statement, and compare with the coded checkpoint.

    Args:
        converter: The converter under test.
        folder: The coded checkpoint.
        blank: What the converter is told that the model stems from: without the weights, which are the model's to give.
        settings: What the model is built for.
        target: The folder to make.

    Returns:
        What was found; only rank 0 compares.
    """
    # The converter's own choice of padding and layers, whose values are then all replaced.
    chunks = loaded(converter, blank, settings)
    for chunk in beside(unwrapped(chunks), read(folder), _config(folder), settings.topology):
        for name, parameter in chunk.held.items():
            parameter.data.copy_(chunk.stated[name])
    converter.to_hf(chunks, blank, target)
    return _compared(folder, target, settings, _table(folder))


def round_trip(converter: Converter, folder: Path, settings: Settings, target: Path) -> Found:
    """Import, export to files, and compare the folders: keys, shapes, dtypes, bits, and every other file.

    Returns:
        What was found; only rank 0 compares.
    """
    chunks = loaded(converter, folder, settings)
    converter.to_hf(chunks, folder, target)
    return _compared(folder, target, settings, None)


def _compared(folder: Path, target: Path, settings: Settings, table: coded.Table | None) -> Found:
    dist.barrier()  # whichever rank writes what, all of it is there
    if dist.get_rank() != 0:
        return Found(count=0)
    return compare_folders(folder, target, DTYPES[settings.precision], settings.topology, table=table)


def unwrapped(chunks: Sequence[Any]) -> list[Any]:
    """The bare models in their wrappers."""
    from converters.megatron.provider import unwrap

    return [unwrap(chunk) for chunk in chunks]


def _misplaced(model: Any, topology: Topology, place: Coord) -> list[str]:
    """Where Megatron numbers the layers of a chunk otherwise than the placement, which the statement shares."""
    numbers = [layer.layer_number - 1 for layer in model.decoder.layers]
    runs = topology.placement(model.config.num_layers)
    placed = [n for run in runs if (run.pp, run.chunk) == (place.pp, place.chunk) for n in range(run.start, run.stop)]
    return [] if numbers == placed else [f"{place}: Megatron holds the layers {numbers}, the placement says {placed}"]


def _config(folder: Path) -> dict[str, Any]:
    """The config with transformers' defaults filled in."""
    from converters.models import family_of

    config = json.loads((folder / "config.json").read_text())
    ledger = family_of(config).fields.to_megatron(config)
    return {**config, **{name: ledger.hf[name] for name in ledger.defaulted}}


def _table(folder: Path) -> coded.Table:
    from parity.seeded import key_table

    return key_table(json.loads((folder / "config.json").read_text()))
