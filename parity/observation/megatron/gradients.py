"""The part of a Megatron-Core model's gradients that this rank has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from converters import execute
from converters.tensors import check_tensors
from converters.topology import Mesh, Topology
from parity.observation.gradients import Held

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def held(chunks: Sequence[Any], config: Mapping[str, Any], topology: Topology) -> list[Held]:
    """Each model chunk of this rank with its part of the plan. Collective.

    How far the vocabulary and the groups are padded, and whose norms a layer has, is the converter's to choose: that
    is read from the model.

    Raises:
        CheckpointError: Parameters are not those that the plan knows, by name and shape.
    """
    from converters.megatron.provider import unwrap
    from converters.models import family_of

    models = [unwrap(chunk) for chunk in chunks]
    names = [dict(model.named_parameters()) for model in models]
    rows = max((found[name].size(0) for found in names for name in VOCABULARY if name in found), default=0)
    counted = torch.tensor([rows], device=torch.cuda.current_device())
    dist.all_reduce(counted, op=dist.ReduceOp.MAX)
    fused = any(name.endswith("linear_fc1.layer_norm_weight") for found in names for name in found)
    plan = family_of(config).plan(
        "hf",
        "megatron" if fused else "megatron_local",
        config,
        padded_vocab_size=int(counted) * topology.tp,
        padded_query_groups=models[0].config.num_query_groups,
    )
    whole = plan.inverse()
    out = []
    for model, found, place in zip(models, names, topology.chunks_of(topology.coord(dist.get_rank())), strict=True):
        part = whole.restrict(source=Mesh(topology, place))
        infos = {name: execute.info_of(parameter) for name, parameter in found.items()}
        check_tensors(part.source_tensors, infos, f"the model at {place}")
        out.append(Held(model=model, place=place, whole=whole, part=part, kept_as="main_grad"))
    return out
