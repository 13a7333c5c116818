"""Models of Megatron-Core: built by the converter under test, and read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from converters.errors import ConversionError
from converters.topology import Coord, Topology
from parity.converter import Converter, Settings
from parity.statement import ledgers
from parity.statement.config import answered
from parity.statement.live import beside

__all__ = ["answered", "bare", "beside", "built", "misplaced", "saved", "set_fields"]


def built(converter: Converter, folder: Path, settings: Settings) -> list[Any]:
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


def saved(converter: Converter, models: Sequence[Any], source: Path, target: Path) -> None:
    """Have the converter under test write the chunks as a Hugging Face folder."""
    converter.to_hf(models, source, target)


def _prepare(settings: Settings) -> None:
    """The device of this rank, and Megatron-Core's parallel state."""
    from converters.megatron import parallel, runtime

    if not torch.cuda.is_available():
        runtime.install()
    else:
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    parallel.initialize(settings.topology)


def bare(models: Sequence[Any]) -> list[Any]:
    """The models in their wrappers."""
    from converters.megatron.provider import unwrap

    return [unwrap(chunk) for chunk in models]


def set_fields(model: Any) -> Mapping[str, str]:
    """Fields of Megatron-Core's config that are not at their default."""
    return ledgers.set_fields(model.config)


def misplaced(model: Any, topology: Topology, place: Coord) -> list[str]:
    """Where Megatron numbers the layers of a chunk otherwise than the placement, which the statement shares."""
    numbers = [layer.layer_number - 1 for layer in model.decoder.layers]
    runs = topology.placement(model.config.num_layers)
    placed = [n for run in runs if (run.pp, run.chunk) == (place.pp, place.chunk) for n in range(run.start, run.stop)]
    return [] if numbers == placed else [f"{place}: Megatron holds the layers {numbers}, the placement says {placed}"]
