"""Weights from a training layout to a serving layout: bytes against the floor, and rate against a plain exchange.

    python ci/bench/sync.py                                 # SmolLM2-135M's sizes, tp2pp2 to tp4
    python ci/bench/sync.py --model meta-llama/Llama-3.2-1B --source tp2pp2 --target tp1dp4 --repeat 3

Random weights in bfloat16, one process a rank on this machine, over gloo. The floor is what ranks need and do not hold.
The plain exchange is one `all_to_all_single` of buffers as large as what each pair of ranks sends; the two take turns.
What stands between them is packing and unpacking, and messages of a bucket each. Peak memory is above the two models.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist

from converters.topology import Topology
from parity.ranks import Zygote

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def measure(config: dict[str, Any], source: Topology, target: Topology, bucket: int, repeat: int) -> dict[str, Any]:
    """What this rank takes, in seconds a run, and what travels."""
    from converters.models import family_of
    from converters.sync.columns import between
    from converters.sync.weights import WeightSync

    def plan_for(mesh: Topology) -> Any:
        groups, heads = config["num_key_value_heads"], config["num_attention_heads"]
        return family_of(config).plan(
            "hf",
            "megatron",
            config,
            padded_vocab_size=-(-config["vocab_size"] // mesh.tp) * mesh.tp,
            padded_query_groups=mesh.query_groups(groups, heads // groups),
        )

    rank, world = dist.get_rank(), dist.get_world_size()
    began = time.perf_counter()
    sync = WeightSync(between(plan_for(source), plan_for(target)), source=source, target=target, bucket_bytes=bucket)
    schedule = sync.schedule()
    planned = time.perf_counter() - began
    drawn = torch.Generator().manual_seed(1)
    read = [
        {key: _values(shape, drawn) for key, shape in sync.exchange.reads(place).source_tensors.items()}
        for place in sync.exchange.source.of(rank)
    ]
    written = [
        {
            key: torch.zeros(shape, dtype=torch.bfloat16)
            for key, shape in sync.exchange.writes(place).target_tensors.items()
        }
        for place in sync.exchange.target.of(rank)
    ]
    for tensors in read:  # a tied head must be equal to its embedding, and padding zero
        for key in tensors:
            if "embedding" in key or "output" in key or padded(config, source):
                tensors[key].zero_()
    out = [schedule.pairs.get((rank, other), 0) for other in range(world)]
    into = [schedule.pairs.get((other, rank), 0) for other in range(world)]
    sent, received = (torch.ones(sum(sizes), dtype=torch.uint8) for sizes in (out, into))
    times: dict[str, list[float]] = {"sync": [], "plain": []}
    for turn in range(repeat + 1):
        for name in times:
            dist.barrier()
            began = time.perf_counter()
            if name == "sync":
                sync.run(read, written)
            else:
                dist.all_to_all_single(received, sent, into, out)
            dist.barrier()
            if turn:
                times[name].append(time.perf_counter() - began)
            elif name == "sync":
                del sent, received
                before = _peak(reset=True)
                sync.run(read, written)
                peak = _peak() - before
                sent, received = (torch.ones(sum(sizes), dtype=torch.uint8) for sizes in (out, into))
    return {
        "ranks": world,
        "bytes": schedule.bytes,
        "pairs": len(schedule.pairs),
        "floor": floor(sync.exchange) * 2,
        "stays": sum(schedule.local.values()),
        "planning": planned,
        "peak": peak,
        **{name: statistics.median(taken) for name, taken in times.items()},
    }


def padded(config: dict[str, Any], mesh: Topology) -> bool:
    """Whether a mesh has groups of zeros, which random values are not."""
    groups = config["num_key_value_heads"]
    return mesh.query_groups(groups, config["num_attention_heads"] // groups) != groups


def floor(exchange: Any) -> int:
    """Elements that ranks need, less the constants and what they hold themselves: from plans, not from messages."""
    count = 0
    for place in exchange.target.places():
        needed = exchange.writes(place)
        count += sum(copy.elements for copy in needed.copies if copy.kind != "verify")
        own: dict[Any, int] = {}
        for held in exchange.source.of(place[0]):
            part = exchange.plan.restrict(source=exchange.source.mesh(held), target=exchange.target.mesh(place))
            own |= {(copy.target, copy.shape): copy.elements for copy in part.copies if copy.kind != "verify"}
        count -= sum(own.values())
    return count


def _values(shape: tuple[int, ...], drawn: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=drawn, dtype=torch.float32).bfloat16()


def _peak(*, reset: bool = False) -> int:
    """The most resident bytes of this process so far, or since it was reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def mesh_of(text: str) -> Topology:
    """`tp2pp2` as a topology."""
    return Topology(**{name: int(size) for name, size in re.findall(r"([a-z]+)(\d+)", text)})


def main() -> None:
    """Print a table, and write it as JSON where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model whose config is packaged; by default SmolLM2-135M")
    parser.add_argument("--source", default="tp2pp2")
    parser.add_argument("--target", default="tp4")
    parser.add_argument("--bucket", type=int, default=4, help="MiB of one message")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config: dict[str, Any] = SMOLLM2
    if options.model:
        from converters.sources import read_config

        config = read_config(options.model)
    source, target = mesh_of(options.source), mesh_of(options.target)
    world = max(source.world_size, target.world_size)
    with Zygote() as zygote:
        ranks = zygote.run(
            measure, config, source, target, options.bucket << 20, options.repeat, world=world, timeout=1200
        )
    found = {
        **ranks[0],
        "peak": max(rank["peak"] for rank in ranks),
        **{name: max(rank[name] for rank in ranks) for name in ("sync", "plain", "planning")},
    }
    rate = {name: found["bytes"] / found[name] / 1e9 for name in ("sync", "plain")}
    print(
        f"{source} -> {target}, {world} ranks, bfloat16, messages of {options.bucket} MiB\n"
        f"  travels  {found['bytes']:,} bytes between {found['pairs']} pairs (floor {found['floor']:,}); "
        f"{found['stays']:,} stay on their rank\n"
        f"  sync     {found['sync']:.3f} s, {rate['sync']:.2f} GB/s\n"
        f"  plain    {found['plain']:.3f} s, {rate['plain']:.2f} GB/s all_to_all_single of the same bytes\n"
        f"  ratio    {rate['sync'] / rate['plain']:.2f}\n"
        f"  planning {found['planning']:.2f} s, once; peak {found['peak'] / 2**20:.0f} MiB above the models"
    )
    if options.json:
        options.json.write_text(json.dumps({**found, "source": str(source), "target": str(target)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
