"""What runs inside ranks for the suite: build, load, observe, export. Everything here is called through a zygote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from converters.topology import Coord, Topology
from parity import coded
from parity.causes import Cause
from parity.converter import Converter, Settings, built
from parity.diagnosis.pullback import Pullback
from parity.diagnosis.verdicts import Trace
from parity.folders import Found, compare_folders, differences, read
from parity.statement.config import Facts, answered
from parity.statement.ledgers import set_fields
from parity.statement.weights import expected_shard

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def loaded(converter: Converter, folder: Path, settings: Settings) -> list[Any]:
    """This rank's chunks of the model in `folder`, by the converter under test."""
    _prepare(settings)
    return list(converter.to_megatron(folder, settings))


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
    for place, held, stated in _stated(chunks, folder, settings):
        if misplaced := _misplaced(held.model, topology, place):
            lines += misplaced
            causes.append(Cause(kind="layers moved", detail=misplaced[0]))
        count += len(stated)
        names += held.parameters
        facts.append(answered(held.model))
        lines += [f"{place}: {name} is not held" for name in sorted(set(stated) - set(held.parameters))]
        lines += [f"{place}: {name} should not be held" for name in sorted(set(held.parameters) - set(stated))]
        traces += [
            Trace(keys=(name,), kind="extra tensors", elements=held.parameters[name].numel())
            for name in sorted(set(held.parameters) - set(stated))
        ]
        wrong: dict[str, torch.Tensor | None] = dict.fromkeys(sorted(set(stated) - set(held.parameters)))
        for name in sorted(set(held.parameters) & set(stated)):
            actual = held.parameters[name].data.cpu()
            found = differences(name, actual, stated[name], table)
            lines += [f"{place}: {line}" for line in found]
            if found:
                wrong[name] = actual
        if wrong:
            numbers = pulled.numbers(config, topology, place, **held.choices)
            for name, tensor in wrong.items():
                traces += _pulled(pulled, name, numbers[name], tensor, stated[name])
    dist.barrier()
    if dist.get_rank() == 0:
        source = {key: tensor.to(DTYPES[settings.precision]) for key, tensor in read(folder).items()}
        causes += pulled.causes(source, config, topology, is_coded=settings.precision == "fp32")
    return Imported(
        found=Found(count=count, differing=tuple(lines), causes=tuple(causes)),
        traces=tuple(traces),
        parameters=tuple(names),
        facts=tuple(facts),
        fields=set_fields(unwrapped(chunks)[0].config),
    )


def _pulled(
    pulled: Pullback, name: str, numbers: torch.Tensor, actual: torch.Tensor | None, stated: torch.Tensor
) -> list[Trace]:
    """One wrong parameter, put in its places; or why it has none."""
    keys = tuple(pulled.keys(name, numbers))
    if actual is None:
        return [Trace(keys=keys, kind="missing tensors", elements=stated.numel())]
    if actual.shape != stated.shape:
        detail = f"{name}: expected {list(stated.shape)}, found {list(actual.shape)}"
        return [Trace(keys=keys, kind="shape", elements=stated.numel(), detail=detail)]
    if actual.dtype != stated.dtype:
        found = str(actual.dtype).removeprefix("torch.")
        return [Trace(keys=keys, kind="dtype", elements=stated.numel(), detail=f"found {found}")]
    return pulled.put(name, numbers, actual, stated)


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
    from converters.bridge import AutoBridge

    _prepare(settings)
    # A model of the right shape: this side of the check is the harness's own.
    chunks = built(AutoBridge.from_hf_pretrained(folder).to_megatron_provider(load_weights=False), settings)
    for _, held, stated in _stated(chunks, folder, settings):
        for name, parameter in held.parameters.items():
            parameter.data.copy_(stated[name])
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


@dataclass(frozen=True)
class _Held:
    """One model chunk of this rank: the bare `GPTModel`, its parameters by name, and what its converter chose."""

    model: Any
    parameters: Mapping[str, torch.nn.Parameter]
    choices: Mapping[str, Any]


def _stated(
    chunks: Sequence[Any], folder: Path, settings: Settings
) -> Iterator[tuple[Coord, _Held, dict[str, torch.Tensor]]]:
    """For each chunk of this rank: its place, what it holds, and what the independent statement says it must hold.

    How far the vocabulary and the groups are padded, and whose norms a layer has, is the converter's to choose: that
    is read from the model.
    """
    topology, source, config = settings.topology, read(folder), _config(folder)
    for model, place in zip(unwrapped(chunks), topology.chunks_of(topology.coord(dist.get_rank())), strict=True):
        parameters = dict(model.named_parameters())
        rows = [parameters[name].size(0) for name in VOCABULARY if name in parameters]
        choices = {
            "make_vocab_size_divisible_by": rows[0] if rows else 1,
            "padded_query_groups": model.config.num_query_groups,
            "spec": "te" if any(name.endswith("linear_fc1.layer_norm_weight") for name in parameters) else "local",
        }
        yield place, _Held(model, parameters, choices), expected_shard(source, config, topology, place, **choices)


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
