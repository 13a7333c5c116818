"""What runs inside ranks for the suite: build, load, observe, export. Everything here is called through a zygote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open

from converters.execute import bits
from converters.topology import Coord, Topology
from parity import coded, observe
from parity.converter import Converter, Settings, built
from parity.probes import Probe
from parity.statement import expected_shard

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
NOT_COMPARED = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".py"}
"""Suffixes of weights in any format, of pickles, and of code, which only a trusted model carries over."""


@dataclass(frozen=True, kw_only=True)
class References:
    """transformers on one probe: evaluations that are equal in exact arithmetic, and an oracle below float32.

    Attributes:
        eager: Plain attention.
        others: The same model evaluated otherwise: fused attention, and one sequence at a time.
        oracle: In float32 with the weights of the reduced precision; `None` in float32.
    """

    eager: observe.Observation
    others: tuple[observe.Observation, ...]
    oracle: observe.Observation | None = None


def references(folder: Path, probe: Probe, precision: str) -> References:
    """Ask transformers. In one rank, without Megatron's runtime."""
    tokens, labels = torch.from_numpy(probe.tokens), torch.from_numpy(probe.labels)
    options: dict[str, Any] = {"labels": labels, "dtype": precision}
    eager = observe.hf_logits(folder, tokens, attention="eager", **options)
    fused = observe.hf_logits(folder, tokens, attention="sdpa", **options)
    alone = [
        observe.hf_logits(folder, tokens[row : row + 1], labels=labels[row : row + 1], dtype=precision)  # type: ignore[arg-type]
        for row in range(len(tokens))
    ]
    losses = [one.loss for one in alone if one.loss is not None]
    single = observe.Observation(logits=np.concatenate([one.logits for one in alone]), loss=np.concatenate(losses))
    oracle = observe.hf_logits(folder, tokens, oracle=True, **options) if precision != "fp32" else None
    return References(eager=eager, others=(fused, single), oracle=oracle)


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


def forward(converter: Converter, folder: Path, settings: Settings, probe: Probe) -> observe.Observation | None:
    """Logits and loss of the imported model; on the rank that has them."""
    chunks = loaded(converter, folder, settings)
    return observe.megatron_logits(
        chunks,
        torch.from_numpy(probe.tokens),
        labels=torch.from_numpy(probe.labels),
        topology=settings.topology,
        vocab_size=_config(folder)["vocab_size"],
    )


def imported(converter: Converter, folder: Path, settings: Settings) -> tuple[int, list[str]]:
    """Import a coded checkpoint, and compare each parameter with an independent statement.

    Returns:
        The number of parameters compared on this rank, and what differs: parameter, element, what it should be and is.
    """
    chunks = loaded(converter, folder, settings)
    table = _table(folder)
    differing: list[str] = []
    count = 0
    for place, held, stated in _stated(chunks, folder, settings):
        differing += _misplaced(held.model, settings.topology, place)
        count += len(stated)
        differing += [f"{place}: {name} is not held" for name in sorted(set(stated) - set(held.parameters))]
        differing += [f"{place}: {name} should not be held" for name in sorted(set(held.parameters) - set(stated))]
        for name in sorted(set(held.parameters) & set(stated)):
            actual = held.parameters[name].data.cpu()
            differing += [f"{place}: {line}" for line in _differences(name, actual, stated[name], table)]
    return count, differing


def exported(converter: Converter, folder: Path, settings: Settings, target: Path) -> tuple[int, list[str]]:
    """Export a model whose parameters are set by the independent statement, and compare with the coded checkpoint.

    Returns:
        Tensors and files compared, and what differs; only rank 0 compares.
    """
    from converters.bridge import AutoBridge

    _prepare(settings)
    # A model of the right shape: this side of the check is the harness's own.
    chunks = built(AutoBridge.from_hf_pretrained(folder).to_megatron_provider(load_weights=False), settings)
    for _, held, stated in _stated(chunks, folder, settings):
        for name, parameter in held.parameters.items():
            parameter.data.copy_(stated[name])
    converter.to_hf(chunks, folder, target)
    return _compared(folder, target, settings, _table(folder))


def round_trip(converter: Converter, folder: Path, settings: Settings, target: Path) -> tuple[int, list[str]]:
    """Import, export to files, and compare the folders: keys, shapes, dtypes, bits, and every other file.

    Returns:
        Tensors and files compared, and what differs; only rank 0 compares.
    """
    chunks = loaded(converter, folder, settings)
    converter.to_hf(chunks, folder, target)
    return _compared(folder, target, settings, None)


def _compared(folder: Path, target: Path, settings: Settings, table: coded.Table | None) -> tuple[int, list[str]]:
    dist.barrier()  # whichever rank writes what, all of it is there
    if dist.get_rank() != 0:
        return 0, []
    return compare_folders(folder, target, DTYPES[settings.precision], table)


@dataclass(frozen=True)
class _Held:
    """One model chunk of this rank: the bare `GPTModel`, and its parameters by name."""

    model: Any
    parameters: Mapping[str, torch.nn.Parameter]


def _stated(
    chunks: Sequence[Any], folder: Path, settings: Settings
) -> Iterator[tuple[Coord, _Held, dict[str, torch.Tensor]]]:
    """For each chunk of this rank: its place, what it holds, and what the independent statement says it must hold.

    How far the vocabulary and the groups are padded, and whose norms a layer has, is the converter's to choose: that
    is read from the model.
    """
    from converters.megatron.provider import unwrap

    topology, source, config = settings.topology, _read(folder), _config(folder)
    for chunk, place in zip(chunks, topology.chunks_of(topology.coord(dist.get_rank())), strict=True):
        model = unwrap(chunk)
        parameters = dict(model.named_parameters())
        rows = [parameters[name].size(0) for name in VOCABULARY if name in parameters]
        stated = expected_shard(
            source,
            config,
            topology,
            place,
            make_vocab_size_divisible_by=rows[0] if rows else 1,
            padded_query_groups=model.config.num_query_groups,
            spec="te" if any(name.endswith("linear_fc1.layer_norm_weight") for name in parameters) else "local",
        )
        yield place, _Held(model, parameters), stated


def compare_folders(
    folder: Path, target: Path, dtype: torch.dtype, table: coded.Table | None = None
) -> tuple[int, list[str]]:
    """What differs between a checkpoint and its round trip; tensors are expected in `dtype`, rounded once.

    Returns:
        Tensors and files compared, and what differs.
    """
    before, after = _read(folder), _read(target)
    differing = [f"{key}: lost" for key in sorted(set(before) - set(after))]
    differing += [f"{key}: new" for key in sorted(set(after) - set(before))]
    for key in sorted(set(before) & set(after)):
        differing += _differences(key, after[key], before[key].to(dtype), table)
    kept = all(tensor.dtype == dtype for tensor in before.values())
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [
        path
        for path in files
        if path.suffix not in NOT_COMPARED
        and not path.name.endswith(".index.json")
        and not any(part.startswith(".") or part in ("original", "onnx") for part in path.parts)
    ]
    for name in files:
        if not (target / name).is_file():
            differing.append(f"{name}: missing")
        elif (folder / name).read_bytes() == (target / name).read_bytes():
            continue
        elif str(name) != "config.json":
            differing.append(f"{name}: not the same bytes")
        else:
            differing += _config_differences(folder / name, target / name, None if kept else dtype)
    return len(before) + len(files), differing


def _config_differences(before: Path, after: Path, dtype: torch.dtype | None) -> list[str]:
    """The fields of two configs that differ; with `dtype`, the one that records it must say so."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    if dtype is not None:
        said = {new.pop(name) for name in ("dtype", "torch_dtype") if name in new}
        for name in ("dtype", "torch_dtype"):
            old.pop(name, None)
        if said != {str(dtype).removeprefix("torch.")}:
            return [f"config.json: the tensors are {dtype}, its dtype says {said or 'nothing'}"]
        if old == new:
            return []
    fields = [name for name in sorted(set(old) | set(new)) if old.get(name) != new.get(name)]
    return [f"config.json: {name} was {old.get(name)!r} and is {new.get(name)!r}" for name in fields] or [
        "config.json: not the same bytes"
    ]


def _misplaced(model: Any, topology: Topology, place: Coord) -> list[str]:
    """Where Megatron numbers the layers of a chunk otherwise than the placement, which the statement shares."""
    numbers = [layer.layer_number - 1 for layer in model.decoder.layers]
    runs = topology.placement(model.config.num_layers)
    placed = [n for run in runs if (run.pp, run.chunk) == (place.pp, place.chunk) for n in range(run.start, run.stop)]
    return [] if numbers == placed else [f"{place}: Megatron holds the layers {numbers}, the placement says {placed}"]


def _differences(name: str, actual: torch.Tensor, expected: torch.Tensor, table: coded.Table | None) -> list[str]:
    """What differs between two tensors, at most one line."""
    if actual.shape != expected.shape:
        return [f"{name}: expected shape {list(expected.shape)}, found {list(actual.shape)}"]
    if actual.dtype != expected.dtype:
        return [f"{name}: expected {expected.dtype}, found {actual.dtype}"]
    wrong = bits(actual.contiguous()) != bits(expected.contiguous())
    count = int(wrong.sum())
    if not count:
        return []
    at = tuple(int(i) for i in torch.nonzero(wrong)[0])
    left, right = float(expected[at]), float(actual[at])
    if table is not None and actual.dtype == torch.float32:
        shown = f"should be {coded.where_from(table, left)}, is {coded.where_from(table, right)}"
    else:
        shown = f"should be {left!r}, is {right!r}"
    return [f"{name}: {count:,} of {wrong.numel():,} elements differ; the first, {list(at)}, {shown}"]


def _config(folder: Path) -> dict[str, Any]:
    """The config with transformers' defaults filled in."""
    from converters.models import family_of

    config = json.loads((folder / "config.json").read_text())
    ledger = family_of(config).fields.to_megatron(config)
    return {**config, **{name: ledger.hf[name] for name in ledger.defaulted}}


def _read(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, mapped: of the files that its index names, or of its one file."""
    index = folder / "model.safetensors.index.json"
    single = ["model.safetensors"]
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else single
    out: dict[str, torch.Tensor] = {}
    for file in (folder / name for name in files):
        handle = safe_open(file, framework="pt")
        out |= {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118  # not a mapping
    return out


def _table(folder: Path) -> coded.Table:
    from parity.seeded import key_table

    return key_table(json.loads((folder / "config.json").read_text()))
