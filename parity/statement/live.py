"""The chunks of a live model beside the statement: what this rank holds, and what it must hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from converters.topology import Coord, Topology
from parity.statement.weights import expected_shard

Statement = Callable[..., dict[str, torch.Tensor]]
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One model chunk of this rank.

    Args:
        place: The rank, and which of its chunks.
        model: The bare model.
        held: Its parameters by name.
        stated: What the statement says it must hold.
        choices: What its converter was free to choose, as `statement` takes it: read from the model.
        statement: What says what it must hold, of the tensors of a checkpoint.
    """

    place: Coord
    model: Any
    held: Mapping[str, torch.nn.Parameter]
    stated: Mapping[str, torch.Tensor]
    choices: Mapping[str, Any]
    statement: Statement = expected_shard


def beside(
    models: Sequence[Any], source: Mapping[str, torch.Tensor], config: Mapping[str, Any], topology: Topology
) -> Iterator[Chunk]:
    """This rank's chunks, each beside what it must hold. In a rank.

    Args:
        models: The bare models.
        source: The tensors of the checkpoint.
        config: Its config, transformers' defaults filled in.
        topology: The layout.
    """
    for model, place in zip(models, topology.chunks_of(topology.coord(torch.distributed.get_rank())), strict=True):
        held = dict(model.named_parameters())
        rows = [held[name].size(0) for name in VOCABULARY if name in held]
        choices = {
            "make_vocab_size_divisible_by": rows[0] if rows else 1,
            "padded_query_groups": model.config.num_query_groups,
            "spec": "te" if any(name.endswith("linear_fc1.layer_norm_weight") for name in held) else "local",
        }
        stated = expected_shard(source, config, topology, place, **choices)
        yield Chunk(place=place, model=model, held=held, stated=stated, choices=choices)
