"""Taps of Megatron-Core and of transformers hold the same activations, in every layout."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_llama
import torch
from tiny_llama import Tiny

from converters.topology import Topology
from parity.observation.activations import LOGITS, Floats, blocks, merged, reached, tap_names
from parity.observation.observe import hf_model
from parity.probes import Probe
from parity.ranks import Zygote

# 13 tokens divide over nothing, and three rows not over two stages.
LENGTH = 13
CASES = [
    ("biased", Topology()),
    ("biased", Topology(tp=2)),
    ("untied", Topology(tp=2, sp=True)),
    ("tied", Topology(pp=2, vpp=2)),
    ("untied", Topology(tp=2, cp=2, sp=True)),
]


def asked(tiny: Tiny) -> Probe:
    tokens, labels = tiny_llama.probe(tiny, length=LENGTH)
    return Probe(name="random ids", tokens=tokens.numpy(), labels=labels.numpy())


def tapped(tiny: Tiny, topology: Topology, probe: Probe) -> dict[str, Floats]:
    """In a rank: every tap that it has whole."""
    from parity.observation.megatron import taps
    from parity.observation.megatron.observe import megatron_observation

    chunks, provider = tiny_llama.build(tiny, topology)
    hooked = [module for chunk in chunks for module in chunk.modules()]
    with taps.megatron_taps(chunks) as recorded:
        megatron_observation(chunks, probe, topology=topology, vocab_size=provider.vocab_size)
    assert not any(module._forward_hooks for module in hooked)
    return taps.whole(recorded, topology, *probe.tokens.shape)


@pytest.mark.parametrize(("name", "topology"), CASES, ids=str)
def test_every_tap_agrees_with_transformers(
    name: str, topology: Topology, models: dict[str, Tiny], zygote: Zygote
) -> None:
    from parity.observation import taps

    tiny = models[name]
    probe = asked(tiny)
    sticks = taps.yardsticks(hf_model(tiny.folder), probe, "fp32")
    ranks = zygote.run(tapped, tiny, topology, probe, world=topology.world_size, coords=topology.coords(), timeout=120)
    actual = merged(ranks)
    assert list(actual) == tap_names(4)
    assert list(sticks) == [*tap_names(4), LOGITS]
    assert {array.shape for array in actual.values()} == {(3, LENGTH, 80)}
    # A stage has its own layers, on one rank.
    own = [set(rank) for rank in ranks if rank]
    assert len(own) == topology.pp
    assert sum(map(len, own)) == len(actual)
    found = reached(sticks, actual, precision="fp32", tp=topology.tp)
    assert not [(reach.tap, reach.share) for reach in found if not reach.within]


def test_a_block_adds_attention_and_mlp_to_what_enters_it(models: dict[str, Tiny], zygote: Zygote) -> None:
    """Which the taps are of the right places for, biases included, and copies that nothing changes afterwards."""
    tiny = models["biased"]
    (seen,) = zygote.run(tapped, tiny, Topology(), asked(tiny), timeout=120)
    for layer in range(4):
        enters = seen["embedding" if layer == 0 else f"layers.{layer - 1}"]
        attention, mlp = (seen[f"layers.{layer}.{part}"] for part in ("attention", "mlp"))
        np.testing.assert_array_equal(enters + attention + mlp, seen[f"layers.{layer}"])
        norm = torch.nn.RMSNorm(80, eps=tiny.config["rms_norm_eps"])
        norm.weight.data.copy_(tiny.weights()[f"model.layers.{layer}.post_attention_layernorm.weight"])
        again = norm(torch.from_numpy(enters + attention)).detach().numpy()
        np.testing.assert_array_equal(again, seen[f"layers.{layer}.post_norm"])


def test_blocks_are_what_leaves_them() -> None:
    assert list(filter(blocks, tap_names(2))) == ["embedding", "layers.0", "layers.1", "final_norm"]
