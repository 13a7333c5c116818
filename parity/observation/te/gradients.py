"""The part of the gradients of a model on Transformer Engine's layers that this rank has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from converters import execute
from converters.tensors import check_tensors
from converters.topology import Mesh, Topology
from parity.observation.gradients import Held
from parity.observation.te.building import EMBEDDING, groups_in


def held(model: Any, config: Mapping[str, Any], topology: Topology) -> Held:
    """The model with its part of the plan.

    How far the vocabulary and the groups are padded is the converter's to choose: that is read from the model.

    Raises:
        CheckpointError: Parameters are not those that the plan knows, by name and shape.
    """
    from converters.models import family_of

    found = dict(model.named_parameters())
    family = family_of(config)
    hf, _ = family.fields.read(config)
    plan = family.plan(
        "hf",
        "te",
        config,
        padded_vocab_size=found[EMBEDDING].size(0) * topology.tp,
        padded_query_groups=groups_in(found, hf, topology),
    )
    place, whole = topology.coord(dist.get_rank()), plan.inverse()
    part = whole.restrict(source=Mesh(topology, place))
    infos = {name: execute.info_of(parameter) for name, parameter in found.items()}
    check_tensors(part.source_tensors, infos, f"the model at {place}")
    return Held(model=model, place=place, whole=whole, part=part, kept_as="main_grad")
