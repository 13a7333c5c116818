"""What runs inside ranks for the suite: build, load, observe, export. Everything here is called through a zygote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from parity import coded
from parity.causes import Cause
from parity.converter import Converter, Settings
from parity.diagnosis.pullback import Pullback
from parity.diagnosis.verdicts import Trace
from parity.difference_map import Pair, worst
from parity.folders import Found, compare_folders, differences, read
from parity.observation import backend
from parity.observation.observe import DTYPES
from parity.statement.config import Facts


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What one rank says of an import.

    Args:
        found: Parameters compared, what differs, and, from rank 0, what explains it.
        traces: What this rank lacks or holds besides; to be merged over ranks.
        parameters: Names of what it holds.
        facts: What each of its models computes with (`parity.statement.config`).
        fields: Fields of the backend's config that are not at their default.
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
    side = backend.of(settings)
    models = side.built(converter, folder, settings)
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
    for chunk in side.beside(side.bare(models), read(folder), config, topology):
        place, held, stated = chunk.place, chunk.held, chunk.stated
        if misplaced := side.misplaced(chunk.model, topology, place):
            lines += misplaced
            causes.append(Cause(kind="layers moved", detail=misplaced[0]))
        count += len(stated)
        names += held
        facts.append(side.answered(chunk.model))
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
        fields=side.set_fields(side.bare(models)[0]),
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
    side = backend.of(settings)
    models = side.built(converter, blank, settings)
    for chunk in side.beside(side.bare(models), read(folder), _config(folder), settings.topology):
        for name, parameter in chunk.held.items():
            parameter.data.copy_(chunk.stated[name])
    side.saved(converter, models, blank, target)
    return _compared(folder, target, settings, _table(folder))


def round_trip(converter: Converter, folder: Path, settings: Settings, target: Path) -> Found:
    """Import, export to files, and compare the folders: keys, shapes, dtypes, bits, and every other file.

    Returns:
        What was found; only rank 0 compares.
    """
    side = backend.of(settings)
    side.saved(converter, side.built(converter, folder, settings), folder, target)
    return _compared(folder, target, settings, None)


def _compared(folder: Path, target: Path, settings: Settings, table: coded.Table | None) -> Found:
    dist.barrier()  # whichever rank writes what, all of it is there
    if dist.get_rank() != 0:
        return Found(count=0)
    return compare_folders(folder, target, DTYPES[settings.precision], settings.topology, table=table)


def _config(folder: Path) -> dict[str, Any]:
    """The config with transformers' defaults filled in."""
    from converters.models import family_of

    config = json.loads((folder / "config.json").read_text())
    ledger = family_of(config).fields.to_megatron(config)
    return {**config, **{name: ledger.hf[name] for name in ledger.defaulted}}


def _table(folder: Path) -> coded.Table:
    from parity.seeded import key_table

    return key_table(json.loads((folder / "config.json").read_text()))
