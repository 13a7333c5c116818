"""Models on Transformer Engine's layers: built by the converter under test, and read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from converters.errors import ConversionError
from converters.topology import Coord, Topology
from parity.converter import Converter, Settings, with_te
from parity.statement import te_weights
from parity.statement.live import Chunk
from parity.statement.te_config import answered, set_fields

__all__ = ["answered", "bare", "beside", "built", "misplaced", "saved", "set_fields"]
EMBEDDING = "model.embed_tokens.weight"
QKV = "model.layers.0.self_attention.layernorm_qkv.weight"


def built(converter: Converter, folder: Path, settings: Settings) -> list[Any]:
    """This rank's model of the checkpoint in `folder`, by the converter under test."""
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    model = with_te(converter).to_te(folder, settings)
    if not isinstance(model, torch.nn.Module):
        raise ConversionError(
            f"to_te returned {type(model).__name__} on rank {dist.get_rank()} of {settings.topology}, expected a model"
        )
    return [model]


def saved(converter: Converter, models: Sequence[Any], source: Path, target: Path) -> None:
    """Have the converter under test write the model as a Hugging Face folder."""
    (model,) = models
    with_te(converter).te_to_hf(model, source, target)


def bare(models: Sequence[Any]) -> list[Any]:
    """The model itself: nothing wraps it."""
    return list(models)


def beside(
    models: Sequence[Any], source: Mapping[str, torch.Tensor], config: Mapping[str, Any], topology: Topology
) -> Iterator[Chunk]:
    """The model beside the independent statement of what it must hold."""
    place = topology.coord(dist.get_rank())
    for model in models:
        held = dict(model.named_parameters())
        choices = {
            "vocabulary_rows": held[EMBEDDING].size(0) if EMBEDDING in held else None,
            "padded_query_groups": groups_in(held, config, topology),
        }
        stated = te_weights.expected_shard(source, config, topology, place, **choices)
        yield Chunk(
            place=place, model=model, held=held, stated=stated, choices=choices, statement=te_weights.expected_shard
        )


def groups_in(held: Mapping[str, torch.Tensor], config: Mapping[str, Any], topology: Topology) -> int:
    """Key-value groups over all ranks that the rows of the first layer are of."""
    heads = config["num_attention_heads"]
    groups: int = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rows = held[QKV].size(0) * topology.tp if QKV in held else 0
    found: int = rows // ((heads // groups + 2) * head_dim)
    return max(found, groups)


def misplaced(model: Any, topology: Topology, place: Coord) -> list[str]:
    """Where the model has other layers than all of them."""
    found, wanted = len(model.model.layers), model.config.num_hidden_layers
    return [] if found == wanted else [f"{place}: the model has {found} layers, its config says {wanted}"]
