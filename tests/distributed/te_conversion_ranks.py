"""What ranks do with models on Transformer Engine's layers and their folders. Called in a rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from bridged import build, source, unlike

from converters.topology import Topology


def whole(folder: Path) -> dict[str, Any]:
    """The checkpoint's config with transformers' defaults."""
    from converters.models import family_of
    from converters.sources import read_config

    config = read_config(str(folder))
    return {**config, **family_of(config).fields.read(config)[1]}


def load_and_save(folder: Path, topology: Topology, te: Path, out: Path) -> list[str]:
    """Load from both columns, against the independent statement, and write both again."""
    from converters.te import convert
    from parity.statement.te_weights import expected_shard

    faults = []
    place = topology.coord(dist.get_rank())
    config = whole(folder)
    groups = topology.whole_query_groups(config["num_key_value_heads"])
    wanted = expected_shard(source(folder), config, topology, place, padded_query_groups=groups)
    for of in (folder, te):
        model = convert.load(of, topology=topology, device="cpu")
        held = {name: parameter.data for name, parameter in model.named_parameters()}
        faults += [f"{of.name}: {name}" for name in unlike(held, wanted)]
    for column, like in (("hf", folder), ("te", te)):
        convert.save(model, folder, out / column, column=column)
        dist.barrier()
        faults += [f"saved as {column}: {name}" for name in unlike(source(out / column), source(like))]
        faults += [
            f"saved as {column}: {file}"
            for file in ("config.json", "tokenizer.json")
            if (out / column / file).read_bytes() != (like / file).read_bytes()
        ]
    if len(list(out.iterdir())) != 2:
        faults.append(f"left behind: {sorted(path.name for path in out.iterdir())}")
    return faults


def to_megatron_and_back(folder: Path, topology: Topology, **fields: Any) -> list[str]:
    """Each rank moves its own part between two live models, against what each loads from the checkpoint by itself."""
    import torch

    from converters.te import convert
    from converters.te.parallel import Parallel

    bridge, _, chunks = build(folder, topology, **fields)
    bridge.load_hf_weights(chunks)
    wanted = [{name: p.data.clone() for name, p in chunk.named_parameters()} for chunk in chunks]
    flat = Topology(tp=topology.tp, dp=topology.pp * topology.dp)
    model = convert.load(folder, parallel=Parallel.of(flat), device="cpu")
    held = {name: p.data.clone() for name, p in model.named_parameters()}
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    convert.te_to_megatron(model, chunks)
    faults = [
        f"in Megatron: {name}"
        for chunk, expected in zip(chunks, wanted, strict=True)
        for name in unlike({name: p.data for name, p in chunk.named_parameters()}, expected)
    ]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    convert.megatron_to_te(chunks, model)
    back = {name: p.data for name, p in model.named_parameters()}
    return faults + [f"in TE: {name}" for name in unlike(back, held)]


def refused(folder: Path, topology: Topology, te_tp: int, **fields: Any) -> str:
    """What is said of two models that do not stand alike."""
    from converters.errors import ConversionError
    from converters.te import convert
    from converters.te.parallel import Parallel

    _, _, chunks = build(folder, topology, **fields)
    model = convert.load(
        folder, parallel=Parallel.of(Topology(tp=te_tp, dp=topology.world_size // te_tp)), device="cpu"
    )
    try:
        convert.megatron_to_te(chunks, model)
    except ConversionError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
