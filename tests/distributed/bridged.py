"""What ranks do with `AutoBridge`. Every function here is called in a rank."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from converters.errors import ConversionError
from converters.topology import Topology

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(folder: Path, topology: Topology, precision: str = "fp32", **fields: Any) -> tuple[Any, Any, list[Any]]:
    """Bridge, provider and this rank's chunks, every parameter NaN: nothing is right before it is loaded."""
    from converters.bridge import AutoBridge

    return of_bridge(AutoBridge.from_hf_pretrained(folder), topology, precision, **fields)


def of_bridge(bridge: Any, topology: Topology, precision: str = "fp32", **fields: Any) -> tuple[Any, Any, list[Any]]:
    from converters.megatron import runtime

    runtime.install()
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.topology = topology
    provider.params_dtype = PRECISIONS[precision]
    for name, value in fields.items():
        setattr(provider, name, value)
    if "num_query_groups" not in fields:
        provider.pad_query_groups()
    chunks = provider.provide_distributed_model(wrap_with_ddp=False)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    return bridge, provider, chunks


def source(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def unlike(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> list[str]:
    """The names under which two sets of tensors do not hold the same bits, in the same shape and dtype."""
    from converters.execute import bits

    return [
        name
        for name in sorted({*actual, *expected})
        if name not in actual
        or name not in expected
        or (actual[name].shape, actual[name].dtype) != (expected[name].shape, expected[name].dtype)
        or not torch.equal(bits(actual[name]), bits(expected[name]))
    ]


def stated(bridge: Any, provider: Any, topology: Topology, folder: Path) -> list[dict[str, torch.Tensor]]:
    """What each chunk of this rank must hold, by the independent statement."""
    from parity.statement.weights import expected_shard

    config = {**bridge.source.config, **{name: bridge.ledger.hf[name] for name in bridge.ledger.defaulted}}
    return [
        expected_shard(
            source(folder),
            config,
            topology,
            place,
            make_vocab_size_divisible_by=provider.make_vocab_size_divisible_by,
            padded_query_groups=provider.num_query_groups,
        )
        for place in topology.chunks_of(topology.coord(dist.get_rank()))
    ]


def held(chunks: list[Any]) -> list[dict[str, torch.Tensor]]:
    from converters.megatron.provider import unwrap

    return [{name: parameter.data for name, parameter in unwrap(chunk).named_parameters()} for chunk in chunks]


def there_and_back(folder: Path, topology: Topology, target: Path, **fields: Any) -> dict[str, list[str]]:
    """Load, stream out, save. What differs on this rank, and the order in which tensors were streamed."""
    bridge, provider, chunks = build(folder, topology, **fields)
    bridge.load_hf_weights(chunks)
    expected = stated(bridge, provider, topology, folder)
    imported = [name for actual, shard in zip(held(chunks), expected, strict=True) for name in unlike(actual, shard)]
    exported = dict(bridge.export_hf_weights(chunks))
    bridge.save_hf_pretrained(chunks, target)
    return {"imported": imported, "exported": unlike(exported, source(folder)), "keys": list(exported)}


def loaded_by_provider(folder: Path, topology: Topology) -> list[str]:
    """The other way in: the provider loads while it builds."""
    from converters.bridge import AutoBridge
    from converters.megatron import runtime

    runtime.install()
    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = topology.tp
    chunks = provider.provide_distributed_model(wrap_with_ddp=False)
    (expected,) = stated(bridge, provider, topology, folder)
    return unlike(held(chunks)[0], expected)


def said(step: Callable[[], Any]) -> str:
    """The message of the error that `step` raises, or `no error`."""
    try:
        step()
    except ConversionError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def load(folder: Path, topology: Topology, precision: str = "fp32") -> tuple[str, bool]:
    """What loading says, and whether it left every parameter alone."""
    bridge, _, chunks = build(folder, topology, precision)
    message = said(lambda: bridge.load_hf_weights(chunks))
    return message, all(bool(tensor.isnan().all()) for chunk in held(chunks) for tensor in chunk.values())


def load_rounded(folder: Path, topology: Topology) -> tuple[list[str], list[str]]:
    """Load float32 into bfloat16 with leave to round; what differs from torch's rounding, here and after an export."""
    bridge, provider, chunks = build(folder, topology, "bf16")
    bridge.load_hf_weights(chunks, cast=True)
    rounded = [
        {name: tensor.bfloat16() for name, tensor in shard.items()}
        for shard in stated(bridge, provider, topology, folder)
    ]
    inside = [name for actual, shard in zip(held(chunks), rounded, strict=True) for name in unlike(actual, shard)]
    exported = dict(bridge.export_hf_weights(chunks))
    return inside, unlike(exported, {key: tensor.bfloat16() for key, tensor in source(folder).items()})


def save(folder: Path, topology: Topology, target: Path, **arguments: Any) -> str:
    """Load and save; what saving says."""
    bridge, _, chunks = build(folder, topology)
    bridge.load_hf_weights(chunks)
    return said(lambda: bridge.save_hf_pretrained(chunks, target, **arguments))


def save_altered(
    folder: Path, topology: Topology, target: Path, rank: int, parameter: str, row: int
) -> tuple[str, str, str]:
    """Load, change a row of a parameter on one rank; what saving, streaming, and saving without padding then say."""
    bridge, _, chunks = build(folder, topology)
    bridge.load_hf_weights(chunks)
    if dist.get_rank() == rank:
        held(chunks)[-1][parameter][row] += 1.0
    return (
        said(lambda: bridge.save_hf_pretrained(chunks, target)),
        said(lambda: list(bridge.export_hf_weights(chunks))),
        said(lambda: bridge.save_hf_pretrained(chunks, target, padding="drop")),
    )


def reasons(folder: Path, topology: Topology, target: Path) -> dict[str, str]:
    """Load and save a checkpoint that stores more than weights; what was dropped and why."""
    bridge, provider, chunks = build(folder, topology)
    bridge.load_hf_weights(chunks)
    bridge.save_hf_pretrained(chunks, target)
    drops: dict[str, str] = bridge.plan(provider).drops
    return drops


def save_with(folder: Path, topology: Topology, target: Path, **fields: Any) -> None:
    """Save a model that computes something else than its source."""
    bridge, provider, chunks = build(folder, topology)
    bridge.load_hf_weights(chunks)
    for name, value in fields.items():
        setattr(provider, name, value)
    bridge.save_hf_pretrained(chunks, target)


def from_config(config: Any, topology: Topology, target: Path) -> tuple[str, list[str]]:
    """A model of a config alone: what loading says, and the tensors that are not what was saved."""
    from converters.bridge import AutoBridge

    bridge, _, chunks = of_bridge(AutoBridge.from_hf_config(config), topology)
    message = said(lambda: bridge.load_hf_weights(chunks))
    for chunk in held(chunks):
        for tensor in chunk.values():
            tensor.normal_(generator=torch.Generator().manual_seed(tensor.numel()))  # a tied head as the embedding
    exported = dict(bridge.export_hf_weights(chunks))
    bridge.save_hf_pretrained(chunks, target)
    return message, unlike(exported, source(target))


def transformers_loads(folder: Path) -> dict[str, list[str]]:
    """What transformers finds wrong with a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (folder / "tokenizer.json").is_file():
        AutoTokenizer.from_pretrained(folder)
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    own = {name: parameter.data for name, parameter in model.named_parameters()}
    wrong = {key: sorted(map(str, value)) for key, value in found.items() if value}
    differing = unlike(own, {key: t for key, t in source(folder).items() if key in own})
    return wrong | ({"differing": differing} if differing else {})


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
