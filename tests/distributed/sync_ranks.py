"""What ranks do when weights go from one live model to another. Every function here is called in a rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bridged import build, held, said, source, unlike

from converters.topology import Topology

NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class Side:
    """A model to build, and the ranks of it that take part.

    Attributes:
        topology: The mesh over all ranks of the run; Megatron-Core knows no other.
        part: The mesh of the ranks that take part, where it is another.
        ranks: Those ranks.
        te: A model on Transformer Engine's layers.
        fields: Of the provider.
        precision: Of the model.
    """

    topology: Topology
    part: Topology | None = None
    ranks: tuple[int, ...] | None = None
    te: bool = False
    fields: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"

    @property
    def mesh(self) -> Topology:
        return self.part or self.topology

    def here(self) -> bool:
        return dist.get_rank() in (self.ranks or range(self.mesh.world_size))


def made(folder: Path, side: Side, *, cast: bool = False) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """The whole plan from Hugging Face's column, and this rank's chunks as the folder fills them."""
    from converters.bridge import AutoBridge
    from converters.megatron import parallel
    from converters.models import family_of

    if side.te:
        from converters.te import convert

        model = convert.load(folder, topology=side.topology, device="cpu")
        config = AutoBridge.from_hf_pretrained(folder).source.config
        plan = family_of(config).plan("hf", "te", config, **convert.sizes_of(model))
        return plan, [{name: parameter.data for name, parameter in model.named_parameters()}]
    parallel.shutdown()
    bridge, provider, chunks = build(folder, side.topology, side.precision, **side.fields)
    bridge.load_hf_weights(chunks, cast=cast)
    return bridge.plan(provider), held(chunks)


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes and messages that this rank hands to the process group, and the most at a time.

    And how often something lands where something else of this round or the one before may still be.
    """
    count = {"bytes": 0, "messages": 0, "largest": 0, "clashes": 0}
    real = dist.batch_isend_irecv
    landing: list[list[tuple[int, int]]] = [[]]

    def counting(operations: list[Any]) -> Any:
        landing.append([])
        for one in operations:
            if one.op is dist.irecv:
                start, stop = one.tensor.data_ptr(), one.tensor.data_ptr() + one.tensor.numel()
                count["clashes"] += sum(first < stop and start < last for first, last in landing[-1] + landing[-2])
                landing[-1].append((start, stop))
        for one in operations:
            if one.op is dist.isend:
                nbytes = one.tensor.numel() * one.tensor.element_size()
                count["bytes"] += nbytes
                count["messages"] += 1
                count["largest"] = max(count["largest"], nbytes)
        return real(operations)

    dist.batch_isend_irecv = counting
    try:
        yield count
    finally:
        dist.batch_isend_irecv = real


def moved(folder: Path, topology: Topology, here: Side, there: Side, bucket: int, cast: bool = False) -> dict[str, Any]:
    """Load two models from a folder, empty the second, move the first into it; what then differs, and the traffic."""
    from converters.sync.columns import between
    from converters.sync.weights import WeightSync

    first, chunks = made(folder, here)
    second, serving = made(folder, there, cast=cast)
    wanted = [{name: tensor.clone() for name, tensor in chunk.items()} for chunk in serving]
    before = [{name: tensor.clone() for name, tensor in chunk.items()} for chunk in chunks]
    for chunk in serving:
        for tensor in chunk.values():
            tensor.fill_(NAN)
    sync = WeightSync(
        between(first, second),
        source=here.mesh,
        target=there.mesh,
        source_ranks=here.ranks,
        target_ranks=there.ranks,
        bucket_bytes=bucket,
    )
    with counted() as count:
        done = sync.run(chunks if here.here() else (), serving if there.here() else (), cast=cast)
    faults = [name for old, new in zip(before, chunks, strict=True) for name in unlike(new, old)]
    if there.here():
        faults += [name for new, old in zip(serving, wanted, strict=True) for name in unlike(new, old)]
    else:
        faults += [name for chunk in serving for name, tensor in chunk.items() if not bool(tensor.isnan().all())]
    sent = sum(n for (sender, _), n in done.pairs.items() if sender == dist.get_rank())
    return {"faults": faults, "count": count, "sent": sent, "bytes": done.bytes, "proof": sync.prove().faults}


def streamed(folder: Path, topology: Topology, here: Side, ranks: tuple[int, ...], bucket: int) -> dict[str, Any]:
    """Stream a model out under Hugging Face's names; what differs from the folder, and what was held at a time."""
    from converters.execute import bits
    from converters.sync.weights import WeightSync

    plan, chunks = made(folder, here)
    sync = WeightSync(
        plan.inverse(),
        source=here.mesh,
        target=Topology(dp=len(ranks)),
        source_ranks=here.ranks,
        target_ranks=ranks,
        bucket_bytes=bucket,
    )
    expected = source(folder)
    names, faults = [], []
    with counted() as count:
        for name, tensor in sync.stream(chunks if here.here() else ()):
            names.append(name)
            if name not in expected or unlike({name: tensor}, {name: expected[name]}):
                faults.append(name)
        rounded = dict(sync.stream(chunks if here.here() else (), dtype="bfloat16"))
    wanted = {name: tensor.bfloat16() for name, tensor in expected.items()} if names else {}
    faults += [f"rounded: {name}" for name in unlike(rounded, wanted)]
    assert all(bits(tensor).dtype == torch.int16 for tensor in rounded.values())
    return {"faults": faults, "names": names, "sent": count["bytes"], "schedule": sync.schedule("float32").bytes}


def refused(folder: Path, topology: Topology) -> dict[str, tuple[str, int, bool]]:
    """Sabotage one thing after another; what `run` says, the bytes that travelled, whether the target is as before.

    From tp2 pp2 to tp4, with more padding on the one side than on the other.
    """
    from converters.sync.columns import between
    from converters.sync.weights import WeightSync

    rank = dist.get_rank()
    first, chunks = made(folder, Side(topology=topology, fields={"make_vocab_size_divisible_by": 64}))
    second, serving = made(folder, Side(topology=Topology(tp=4)))
    sync = WeightSync(between(first, second), source=topology, target=Topology(tp=4))
    small = WeightSync(between(first, second), source=topology, target=Topology(tp=4), bucket_bytes=4096)
    (own,), (into,) = chunks, serving
    for tensor in into.values():
        tensor.fill_(NAN)
    found = {}

    def attempt(name: str, one: Any = None, given: Any = None, taken: Any = None, **arguments: Any) -> None:
        read, written = ([own] if given is None else given), ([into] if taken is None else taken)
        with counted() as count:
            message = said(lambda: (one or sync).run(read, written, **arguments))
        found[name] = message, count["bytes"], all(bool(tensor.isnan().all()) for tensor in into.values())

    lost = dict(own)
    if rank == 2:
        del lost["decoder.layers.1.mlp.linear_fc2.weight"]
    attempt("missing", given=[lost])
    bent = dict(into)
    if rank == 3:
        bent["decoder.final_layernorm.weight"] = torch.zeros(2, 3)
    attempt("shape", taken=[bent])
    attempt("dtype", taken=[{name: tensor.bfloat16() for name, tensor in into.items()}])
    attempt("integers", taken=[{name: tensor.int() for name, tensor in into.items()}], cast=True)
    attempt("strided", taken=[{n: torch.zeros(2 * len(t))[::2] if t.dim() == 1 else t for n, t in into.items()}])
    attempt("chunks", given=[own, own] if rank == 1 else None)
    attempt("bucket", one=small if rank == 1 else sync)
    attempt("padding", padding="verify" if rank else "drop")
    attempt("anything", given=[None] if rank == 0 else None)
    if rank == 3:
        own["output_layer.weight"][3] += 1.0
    attempt("tie")
    return found


def loosened(folder: Path, topology: Topology) -> tuple[str, list[str], str]:
    """Change rows that pad; what moving them says, what differs once they are let go of, and a target in the source."""
    from converters.sync.columns import between
    from converters.sync.weights import WeightSync

    first, (own,) = made(folder, Side(topology=topology, fields={"make_vocab_size_divisible_by": 64}))
    second, (into,) = made(folder, Side(topology=Topology(dp=2)))
    wanted = {name: tensor.clone() for name, tensor in into.items()}
    if dist.get_rank() == 1:
        own["output_layer.weight"][-1] += 1.0
    for tensor in into.values():
        tensor.fill_(NAN)
    sync = WeightSync(between(first, second), source=topology, target=Topology(dp=2))
    message = said(lambda: sync.run([own], [into]))
    sync.run([own], [into], padding="drop")
    same = WeightSync(between(first, first), source=topology, target=topology)
    return message, unlike(into, wanted), said(lambda: same.run([own], [own], padding="drop"))


def in_a_group(folder: Path, topology: Topology) -> tuple[list[str], str]:
    """Two of three ranks, in a group of their own, with the third outside; what differs, and what the third is told."""
    from converters.sync.columns import between
    from converters.sync.weights import WeightSync

    group = dist.new_group([2, 0])
    plan, (tensors,) = made(folder, Side(topology=topology))
    arguments: dict[str, Any] = {"source": Topology(), "target": Topology(), "source_ranks": [2], "target_ranks": [0]}
    if dist.get_rank() == 1:
        return [], said(lambda: WeightSync(between(plan, plan), group=group, **arguments))
    into = {name: torch.full_like(tensor, NAN) for name, tensor in tensors.items()}
    sync = WeightSync(between(plan, plan), group=group, **arguments)
    sync.run([tensors] if dist.get_rank() == 2 else [], [into] if dist.get_rank() == 0 else [])
    return unlike(into, tensors) if dist.get_rank() == 0 else [], ""


def of_tensors(config: dict[str, Any], here: Topology, there: Topology, device: str, bucket: int) -> list[str]:
    """Plain tensors on a device, matrices in bfloat16 and the rest in float32; what is not as a plan alone makes it."""
    from converters import execute
    from converters.models import family_of
    from converters.sync.columns import between
    from converters.sync.weights import WeightSync

    drawn = torch.Generator().manual_seed(7)

    def dtype(shape: tuple[int, ...]) -> torch.dtype:
        return torch.bfloat16 if len(shape) == 2 else torch.float32

    def plan_for(column: str, mesh: Topology) -> Any:
        rows = -(-config["vocab_size"] // mesh.tp) * mesh.tp
        groups = mesh.whole_query_groups(config["num_key_value_heads"])
        return family_of(config).plan("hf", column, config, padded_vocab_size=rows, padded_query_groups=groups)

    first, second = plan_for("megatron", here), plan_for("te", there)
    whole = {key: torch.randn(s, generator=drawn).to(dtype(s)) for key, s in first.source_tensors.items()}
    sync = WeightSync(between(first, second), source=here, target=there, bucket_bytes=bucket)

    def filled(plan: Any, place: Any, held: Any) -> dict[str, torch.Tensor]:
        part = plan.restrict(target=held.mesh(place))
        out = {key: torch.zeros(shape, dtype=dtype(shape)) for key, shape in part.target_tensors.items()}
        for copy in part.copies:
            execute.apply(copy, whole[copy.source.key], out[copy.target.key])
        return {key: tensor.to(device) for key, tensor in out.items()}

    rank = dist.get_rank()
    read = [filled(first, place, sync.exchange.source) for place in sync.exchange.source.of(rank)]
    wanted = [filled(second, place, sync.exchange.target) for place in sync.exchange.target.of(rank)]
    written = [{key: torch.full_like(tensor, NAN) for key, tensor in one.items()} for one in wanted]
    faults = []
    for _ in range(2):  # buffers and plans are used again
        sync.run(read, written)
        faults += [key for one, other in zip(written, wanted, strict=True) for key in unlike(one, other)]
    streamed = {key: tensor.cpu() for key, tensor in sync.stream(read)}
    return faults + unlike(streamed, {key: tensor.cpu() for one in wanted for key, tensor in one.items()})
