"""Weights between a live model on Transformer Engine layers and a live Megatron-Core model, through the table.

Each rank moves its own: it stands at the same tensor-parallel place in both, so what it writes is what it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from converters import collective, execute
from converters.errors import ConfigError, TopologyError
from converters.execute import Transfer
from converters.models import family_of
from converters.plan import Plan
from converters.stores.modules import ModuleStore
from converters.te.stores import TeStore
from converters.topology import Mesh

if TYPE_CHECKING:
    from converters.te.modeling import NVLlamaForCausalLM


def te_to_megatron(
    model_te: NVLlamaForCausalLM, chunks: Sequence[torch.nn.Module], *, cast: bool = False
) -> list[Transfer]:
    """Write this rank's weights of a TE model into this rank's chunks of a Megatron-Core model.

    Args:
        model_te: Is read, not changed.
        chunks: Megatron's model chunks of this rank, any pipeline stage: a TE model has all layers on every rank.
        cast: Allow rounding to the dtype of `chunks`.

    Raises:
        TopologyError: Another tp, or another padding of vocabulary or groups.
        ConfigError: Another model.
        CheckpointError: Tensors that do not fit, a constant that is not what it must be, a dtype change not asked for.
    """
    plan, here, places = _matched(model_te, chunks)
    out = []
    for chunk, place in places:
        part = plan.restrict(source=here, target=place)
        out.append(execute.run(part, TeStore(model_te), ModuleStore(chunk), cast=cast, where="the TE model"))
    return out


def megatron_to_te(
    chunks: Sequence[torch.nn.Module], model_te: NVLlamaForCausalLM, *, cast: bool = False
) -> list[Transfer]:
    """Write this rank's weights of a Megatron-Core model into this rank's part of a TE model.

    Args:
        chunks: The one chunk that holds this rank's part of every layer. Is read, not changed.
        model_te: Is written.
        cast: Allow rounding to the dtype of `model_te`.

    Raises:
        TopologyError: Another tp, pipeline stages, or another padding of vocabulary or groups.
        ConfigError: Another model.
        CheckpointError: As `te_to_megatron`.
    """
    plan, here, places = _matched(model_te, chunks)
    topology = places[0][1].topology
    if topology.pp > 1:
        raise TopologyError(
            f"the Megatron model is spread over pp={topology.pp} stages, and a TE model holds all layers on each rank: "
            "export it with AutoBridge.save_hf_pretrained, and load that with converters.te.convert.load"
        )
    ((chunk, place),) = places
    part = plan.inverse().restrict(source=place, target=here)
    with TeStore(model_te, write=True) as store:
        return [execute.run(part, ModuleStore(chunk), store, cast=cast, where="the Megatron model")]


Places = list[tuple[torch.nn.Module, Mesh]]


def _matched(model_te: NVLlamaForCausalLM, chunks: Sequence[torch.nn.Module]) -> tuple[Plan, Mesh, Places]:
    """The whole plan from TE to Megatron, this rank's place in TE's mesh, and its chunks with their places."""
    from converters.megatron import specs
    from converters.megatron.provider import GPTModelProvider, unwrap
    from converters.megatron.translate import fields_of
    from converters.te.convert import hf_config, parallel_of, sizes_of

    bare = [unwrap(chunk) for chunk in chunks]
    provider = bare[0].config
    if not isinstance(provider, GPTModelProvider):
        raise ConfigError(f"the Megatron model's config is a {type(provider).__name__}, expected a GPTModelProvider")
    parallel, topology = parallel_of(model_te), provider.topology
    place = topology.coord(collective.rank())
    sizes = sizes_of(model_te)
    theirs = {"padded_vocab_size": provider.padded_vocab_size, "padded_query_groups": provider.num_query_groups}
    faults = [f"tp={parallel.tp_size} of the TE model, tp={topology.tp} of Megatron's"] * (
        (parallel.tp_size, parallel.tp_rank) != (topology.tp, place.tp)
    )
    faults += [
        f"{name}={sizes[name]} of the TE model, {theirs[name]} of Megatron's"
        for name in sizes
        if sizes[name] != theirs[name]
    ]
    if faults:
        raise TopologyError(
            "; ".join(faults) + ": they must be equal for each rank to move its own. Build the Megatron model so "
            "(make_vocab_size_divisible_by=1), or go by way of a folder"
        )
    config = hf_config(model_te.config)
    family = family_of(config)
    wanted, found = family.fields.read(config)[0], family.fields.to_hf(*fields_of(provider)).hf
    other = _differences(wanted, found)
    if other:
        raise ConfigError("not the same model: " + "; ".join(other))
    column = "megatron_local" if specs.resolve(provider.layer_spec) == "local" else "megatron"
    features = frozenset({"layernorm_zero_centered_gamma"} if provider.layernorm_zero_centered_gamma else ())
    plan = family.plan("te", column, config, features=features, **sizes)
    return (
        plan,
        Mesh(parallel.topology, parallel.coord),
        [(chunk, Mesh(topology, at)) for chunk, at in zip(bare, topology.chunks_of(place), strict=True)],
    )


def _differences(te: Any, megatron: Any) -> list[str]:
    """The fields in which two models differ that compute otherwise; the dtype is the caller's to say."""
    return [
        f"{name} is {te[name]!r} in the TE model and {value!r} in Megatron's"
        for name, value in megatron.items()
        if name != "dtype" and te[name] != value
    ]
