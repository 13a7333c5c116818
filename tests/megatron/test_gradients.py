"""Megatron-Core's gradients of every parameter against transformers': the runtime trains what it says it trains."""

from __future__ import annotations

import pytest
import tiny_llama
from tiny_llama import Tiny

from converters.topology import Topology
from parity.ranks import Zygote

CASES = [
    ("biased", Topology()),
    ("biased", Topology(dp=2)),
    ("untied", Topology(tp=2)),
    ("biased", Topology(tp=4)),  # more ranks than key-value groups
    ("biased", Topology(tp=2, sp=True)),
    ("untied", Topology(pp=2)),
    ("untied", Topology(pp=2, vpp=2)),
    ("untied", Topology(cp=2)),
    ("tied", Topology(tp=2, cp=2, sp=True)),
    ("tied", Topology(tp=2, pp=2)),
    ("tied", Topology(pp=4)),
]


@pytest.mark.parametrize(("name", "topology"), CASES, ids=lambda value: str(value))
def test_gradients(name: str, topology: Topology, models: dict[str, Tiny], zygote: Zygote) -> None:
    worst = zygote.run(
        tiny_llama.backward, models[name], topology, world=topology.world_size, coords=topology.coords(), timeout=60
    )
    assert max(worst) < 1e-4  # of the parameter's largest gradient; 1e-5 is what other orders of summation make
