"""Megatron-Core's forward, as loaded by the plain statement, against transformers: every token, every layout."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_llama
import torch
from tiny_llama import Tiny, difference

from converters.topology import Topology
from parity.observe import Observation, hf_logits
from parity.ranks import Zygote

ONE = Topology()
CASES = [
    ("biased", ONE),
    ("untied", Topology(tp=2)),
    ("biased", Topology(tp=2)),
    ("untied", Topology(tp=4)),  # more ranks than key-value groups
    ("untied", Topology(tp=2, sp=True)),
    ("untied", Topology(pp=2)),
    ("untied", Topology(pp=2, vpp=2)),
    ("untied", Topology(cp=2)),
    ("untied", Topology(tp=2, cp=2, sp=True)),
    ("tied", ONE),
    ("tied", Topology(pp=2)),
    ("tied", Topology(tp=2, pp=2)),
    ("attention-biased", Topology(tp=2)),
    ("mlp-biased", Topology(tp=2)),
]


def observed(tiny: Tiny, topology: Topology, length: int, positions: torch.Tensor | None) -> Observation | None:
    """In a rank: what Megatron-Core says."""
    from parity.observe import megatron_logits

    chunks, provider = tiny_llama.build(tiny, topology)
    tokens, labels = tiny_llama.probe(tiny, length=length)
    return megatron_logits(
        chunks, tokens, positions=positions, labels=labels, topology=topology, vocab_size=provider.vocab_size
    )


def only(observations: list[Observation | None]) -> Observation:
    (found,) = [observation for observation in observations if observation is not None]
    return found


@pytest.fixture(scope="module")
def reference(models: dict[str, Tiny]) -> dict[str, tuple[Observation, Observation]]:
    """Of transformers, with eager and with SDPA attention: the second tells how far equals may be apart."""
    out = {}
    for name, tiny in models.items():
        tokens, labels = tiny_llama.probe(tiny)
        out[name] = (
            hf_logits(tiny.folder, tokens, labels=labels),
            hf_logits(tiny.folder, tokens, labels=labels, attention="sdpa"),
        )
    return out


@pytest.mark.parametrize(("name", "topology"), CASES, ids=lambda value: str(value))
def test_logits_and_loss_of_every_token(
    name: str,
    topology: Topology,
    models: dict[str, Tiny],
    reference: dict[str, tuple[Observation, Observation]],
    zygote: Zygote,
) -> None:
    expected, again = reference[name]
    results = zygote.run(
        observed, models[name], topology, 16, None, world=topology.world_size, coords=topology.coords(), timeout=60
    )
    actual = only(results)
    assert results.index(actual) == topology.coords().index(
        topology.coord(topology.world_size - topology.tp * topology.cp)
    )
    assert actual.loss is not None
    assert expected.loss is not None
    assert again.loss is not None
    assert actual.logits.dtype == actual.loss.dtype == np.float32
    assert difference(actual.logits, expected.logits) <= 10 * difference(again.logits, expected.logits)
    assert difference(actual.loss, expected.loss) <= 10 * difference(again.loss, expected.loss)


@pytest.mark.parametrize("name", ["untied", "tied", "biased"])
def test_one_rank_is_equal_to_eager_attention_to_the_last_bit(
    name: str, models: dict[str, Tiny], reference: dict[str, tuple[Observation, Observation]], zygote: Zygote
) -> None:
    (actual,) = zygote.run(observed, models[name], ONE, 16, None, timeout=60)
    assert actual is not None
    np.testing.assert_array_equal(actual.logits, reference[name][0].logits)


@pytest.mark.parametrize(
    "topology",
    [ONE, Topology(tp=2, sp=True), Topology(tp=2, cp=2, sp=True), Topology(pp=2, vpp=2), Topology(cp=2)],
    ids=str,
)
def test_any_length_and_positions_that_jump(topology: Topology, models: dict[str, Tiny], zygote: Zygote) -> None:
    """13 tokens divide over nothing, and neither do 3 rows; positions reach where the RoPE scaling differs."""
    tiny = models["untied"]
    positions = torch.arange(13) * torch.tensor([[1], [3], [7]]) + torch.tensor([[4], [0], [9]])
    tokens, labels = tiny_llama.probe(tiny, length=13)
    expected = hf_logits(tiny.folder, tokens, positions=positions, labels=labels)
    assert difference(expected.logits, hf_logits(tiny.folder, tokens).logits) > 1  # else positions would prove nothing
    actual = only(zygote.run(observed, tiny, topology, 13, positions, world=topology.world_size, timeout=60))
    assert actual.loss is not None
    assert expected.loss is not None
    assert difference(actual.logits, expected.logits) <= 2e-4
    assert difference(actual.loss, expected.loss) <= 2e-4


def observed_bf16(tiny: Tiny, topology: Topology) -> Observation | None:
    """In a rank: what Megatron-Core says in bf16, without labels."""
    from parity.observe import megatron_logits

    chunks, provider = tiny_llama.build(tiny, topology, bf16=True)
    assert {parameter.dtype for chunk in chunks for parameter in chunk.parameters()} == {torch.bfloat16}
    return megatron_logits(chunks, tiny_llama.probe(tiny)[0], topology=topology, vocab_size=provider.vocab_size)


@pytest.mark.parametrize("topology", [ONE, Topology(tp=2, sp=True), Topology(tp=2, cp=2), Topology(pp=2)], ids=str)
def test_bf16_is_as_near_to_float32_as_transformers_in_bf16(
    topology: Topology,
    models: dict[str, Tiny],
    reference: dict[str, tuple[Observation, Observation]],
    zygote: Zygote,
) -> None:
    tiny, oracle = models["untied"], reference["untied"][0]
    bf16 = hf_logits(tiny.folder, tiny_llama.probe(tiny)[0], dtype="bf16")
    actual = only(zygote.run(observed_bf16, tiny, topology, world=topology.world_size, timeout=60))
    assert actual.loss is None
    rms = [float(np.sqrt(np.mean((seen.logits - oracle.logits) ** 2))) for seen in (actual, bf16)]
    assert rms[0] <= 1.5 * rms[1]
