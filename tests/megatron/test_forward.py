"""Megatron-Core's forward, as loaded by the plain statement, against transformers: every token, every layout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny_llama
import torch
from tiny_llama import Tiny, difference

from converters.topology import Topology
from parity.observation.observe import Observation, hf_model, hf_observation, hf_observation_apart
from parity.probes import IGNORED, Probe
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


def observed(tiny: Tiny, topology: Topology, probe: Probe) -> Observation | None:
    """In a rank: what Megatron-Core says."""
    from parity.observation.megatron.observe import megatron_observation

    chunks, provider = tiny_llama.build(tiny, topology)
    return megatron_observation(chunks, probe, topology=topology, vocab_size=provider.vocab_size)


def only(observations: list[Observation | None]) -> Observation:
    (found,) = [observation for observation in observations if observation is not None]
    return found


@pytest.fixture(scope="module")
def reference(models: dict[str, Tiny]) -> dict[str, tuple[Observation, Observation]]:
    """Of transformers, with eager and with SDPA attention: the second tells how far equals may be apart."""
    out = {}
    for name, tiny in models.items():
        probe = tiny_llama.asked(tiny)
        out[name] = (hf_observation(tiny.folder, probe), hf_observation(tiny.folder, probe, attention="sdpa"))
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
        observed,
        models[name],
        topology,
        tiny_llama.asked(models[name]),
        world=topology.world_size,
        coords=topology.coords(),
        timeout=60,
    )
    actual = only(results)
    assert results.index(actual) == topology.coords().index(
        topology.coord(topology.world_size - topology.tp * topology.cp)
    )
    assert actual.logits.dtype == actual.loss.dtype == np.float32
    assert difference(actual.logits, expected.logits) <= 10 * difference(again.logits, expected.logits)
    assert difference(actual.loss, expected.loss) <= 10 * difference(again.loss, expected.loss)


@pytest.mark.parametrize("name", ["untied", "tied", "biased"])
def test_one_rank_is_equal_to_eager_attention_to_the_last_bit(
    name: str, models: dict[str, Tiny], reference: dict[str, tuple[Observation, Observation]], zygote: Zygote
) -> None:
    (actual,) = zygote.run(observed, models[name], ONE, tiny_llama.asked(models[name]), timeout=60)
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
    probe = tiny_llama.asked(tiny, 13, positions)
    expected = hf_observation(tiny.folder, probe)
    straight = hf_observation(tiny.folder, tiny_llama.asked(tiny, 13))
    assert difference(expected.logits, straight.logits) > 1  # else positions would prove nothing
    actual = only(zygote.run(observed, tiny, topology, probe, world=topology.world_size, timeout=60))
    assert difference(actual.logits, expected.logits) <= 2e-4
    assert difference(actual.loss, expected.loss) <= 2e-4


SEGMENTS = {
    "left padding": ["0001111111111", "1111111111111", "0000000000001"],
    "packing": ["1111222334444", "1222222222222", "1111111111112"],
    "packing and padding": ["0111122203330", "1110000000002", "0000001020300"],
}


def segmented(tiny: Tiny, rows: list[str]) -> Probe:
    """The tiny probe with segments by their digits."""
    segments = np.array([[int(digit) for digit in row] for row in rows])
    plain = tiny_llama.asked(tiny, segments.shape[1])
    positions = np.zeros_like(segments)
    labels = plain.labels.copy()
    for row, numbers in enumerate(segments):
        for number in set(numbers.tolist()):
            (at,) = np.nonzero(numbers == number)
            positions[row, at] = np.arange(len(at)) * (number > 0)
            labels[row, at[-1]] = IGNORED
        labels[row, numbers == 0] = IGNORED
    return Probe(name="segments", tokens=plain.tokens, labels=labels, positions=positions, segments=segments)


@pytest.mark.parametrize("kind", SEGMENTS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers_keeps_segments_apart(kind: str, attention: str, models: dict[str, Tiny]) -> None:
    """Asked at once, as its users do, each sequence is answered as if it were alone."""
    tiny = models["untied"]
    probe = segmented(tiny, SEGMENTS[kind])
    at_once = hf_observation(tiny.folder, probe, attention=attention)
    apart = hf_observation_apart(hf_model(tiny.folder), probe)
    seen = probe.compared
    assert difference(at_once.logits[seen], apart.logits[seen]) <= 2e-4
    assert difference(at_once.loss, apart.loss) <= 2e-4
    assert np.isfinite(at_once.logits).all()
    leaking = replace(probe, segments=None)
    assert difference(hf_observation(tiny.folder, leaking).logits[seen], apart.logits[seen]) > 1


@pytest.mark.parametrize("kind", SEGMENTS)
@pytest.mark.parametrize(
    "topology", [ONE, Topology(tp=2, sp=True), Topology(tp=2, cp=2, sp=True), Topology(pp=2, vpp=2)], ids=str
)
def test_segments_are_kept_apart(kind: str, topology: Topology, models: dict[str, Tiny], zygote: Zygote) -> None:
    tiny = models["untied"]
    probe = segmented(tiny, SEGMENTS[kind])
    expected = hf_observation_apart(hf_model(tiny.folder), probe)
    actual = only(zygote.run(observed, tiny, topology, probe, world=topology.world_size, timeout=60))
    assert np.isfinite(actual.logits).all()
    assert difference(actual.logits[probe.compared], expected.logits[probe.compared]) <= 2e-4
    assert difference(actual.loss, expected.loss) <= 2e-4


def observed_twice(tiny: Tiny, probe: Probe, plain: Probe) -> list[Observation | None]:
    """In a rank: a probe with segments and positions, then one without: what the first needed must be undone."""
    from parity.observation.megatron.observe import megatron_observation

    chunks, provider = tiny_llama.build(tiny, ONE)
    return [megatron_observation(chunks, one, topology=ONE, vocab_size=provider.vocab_size) for one in (probe, plain)]


def test_a_probe_leaves_nothing_behind(models: dict[str, Tiny], zygote: Zygote) -> None:
    tiny = models["untied"]
    plain = tiny_llama.asked(tiny)
    ((_, after),) = zygote.run(observed_twice, tiny, segmented(tiny, SEGMENTS["packing"]), plain, timeout=60)
    assert after is not None
    np.testing.assert_array_equal(after.logits, hf_observation(tiny.folder, plain).logits)


def observed_bf16(tiny: Tiny, topology: Topology) -> Observation | None:
    """In a rank: what Megatron-Core says in bf16."""
    from parity.observation.megatron.observe import megatron_observation

    chunks, provider = tiny_llama.build(tiny, topology, bf16=True)
    assert {parameter.dtype for chunk in chunks for parameter in chunk.parameters()} == {torch.bfloat16}
    return megatron_observation(chunks, tiny_llama.asked(tiny), topology=topology, vocab_size=provider.vocab_size)


@pytest.mark.parametrize("topology", [ONE, Topology(tp=2, sp=True), Topology(tp=2, cp=2), Topology(pp=2)], ids=str)
def test_bf16_is_as_near_to_float32_as_transformers_in_bf16(
    topology: Topology,
    models: dict[str, Tiny],
    reference: dict[str, tuple[Observation, Observation]],
    zygote: Zygote,
) -> None:
    tiny, oracle = models["untied"], reference["untied"][0]
    bf16 = hf_observation(tiny.folder, tiny_llama.asked(tiny), dtype="bf16")
    actual = only(zygote.run(observed_bf16, tiny, topology, world=topology.world_size, timeout=60))
    rms = [float(np.sqrt(np.mean((seen.logits - oracle.logits) ** 2))) for seen in (actual, bf16)]
    assert rms[0] <= 1.5 * rms[1]
