"""The check of training passes what is right and fails what is wrong, each in the measurement that it concerns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sabotage import FAULTS, Sabotaged

from converters.sources import read_config
from converters.topology import Topology
from parity.case import Case
from parity.checks import training
from parity.checks.bench import Bench, NotApplicable, Shared
from parity.converter import Own
from parity.findings import Measurement
from parity.observation.lessons import LENGTH, STEPS, Deal, lessons
from parity.probes import IGNORED
from parity.ranks import Zygote
from parity.seeded import write_checkpoint
from parity.tiny import odd_config, shrink, with_layers

GRADIENTS, REPLICAS, PADDING = "gradients", "gradients, replicas", "gradients, padding"
LOSS, NORM, CURVE = "training loss", "gradient norm", "loss curve, 5 steps"


@pytest.fixture(scope="module")
def shared(zygote: Zygote) -> Iterator[Shared]:
    made = Shared(zygote=zygote)
    yield made
    made.close()


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("trained")
    configs = {
        "tied": with_layers(shrink(read_config("Llama-3.2-1B")), 4),
        "biased": with_layers(odd_config(), 2),
        "mlp-biased": with_layers({**odd_config(), "attention_bias": False}, 2),
    }
    return {
        name: SimpleNamespace(config=config, folder=write_checkpoint(config, folder / name), weights="seeded")
        for name, config in configs.items()
    }


def bench(shared: Shared, subjects: dict[str, Any], name: str, topology: Topology, **changes: Any) -> Bench:
    case = Case(model=name, slug=name, topology=topology, device="cpu", precision=changes.pop("precision", "fp32"))
    return Bench(case=case, subject=subjects[name], shared=shared, **changes)


def measured(on: Bench) -> dict[str, Measurement]:
    return {found.check: found for found in training.steps(on) if isinstance(found, Measurement)}


def failed(found: dict[str, Measurement]) -> set[str]:
    return {name for name, one in found.items() if not one.passed}


CLEAN = [
    ("tied", Topology(tp=2, sp=True)),
    ("tied", Topology(pp=2, vpp=2)),
    ("biased", Topology(tp=3)),
    ("biased", Topology(cp=2)),
    ("mlp-biased", Topology(dp=2)),
]


@pytest.mark.parametrize(("name", "topology"), CLEAN, ids=str)
def test_what_is_right_passes(name: str, topology: Topology, shared: Shared, subjects: dict[str, Any]) -> None:
    found = measured(bench(shared, subjects, name, topology))
    assert not failed(found), [one.verdict + one.where for one in found.values()]
    assert {GRADIENTS, LOSS, NORM, CURVE, REPLICAS} <= set(found)
    assert "AdamW" in found[CURVE].detail
    assert ("linear_qkv.bias" in found[GRADIENTS].detail) == (name == "mlp-biased")  # frozen: no such tensor in HF


# What fails at least; a fault of gradients goes on to the losses.
WRONG = [
    ("local mean", Topology(cp=2), {GRADIENTS, NORM, CURVE}),
    ("local mean", Topology(dp=2), {GRADIENTS, NORM, CURVE}),
    ("default p2p", Topology(pp=2, vpp=2), {GRADIENTS}),
    ("no reduction over data parallelism", Topology(dp=2), {GRADIENTS, REPLICAS, NORM, CURVE}),
    ("no reduction of norms", Topology(tp=2, sp=True), {GRADIENTS, REPLICAS, CURVE}),
    ("no reduction of tied embeddings", Topology(pp=2), {GRADIENTS, REPLICAS, CURVE}),
    ("padding in the loss", Topology(tp=2), {GRADIENTS, PADDING, LOSS, CURVE}),
    ("k for v", Topology(), {GRADIENTS}),
    ("learning rate", Topology(), {CURVE}),
    ("beta1", Topology(), {CURVE}),
    ("beta2", Topology(), {CURVE}),
    ("eps", Topology(), {CURVE}),
    ("weight decay of norms", Topology(), {CURVE}),
]
ALONE = {"k for v", "learning rate", "beta1", "beta2", "eps", "weight decay of norms"}
"""Faults that nothing else can see."""


@pytest.mark.parametrize(
    ("fault", "topology", "red"), WRONG, ids=[f"{fault}-{topology}".replace(" ", "-") for fault, topology, _ in WRONG]
)
def test_what_is_wrong_fails(
    fault: str, topology: Topology, red: set[str], shared: Shared, subjects: dict[str, Any]
) -> None:
    found = failed(measured(bench(shared, subjects, "tied", topology, converter=Sabotaged(fault))))
    assert found == red if fault in ALONE else red <= found


def test_every_fault_is_planted() -> None:
    assert {fault for fault, _, _ in WRONG} == set(FAULTS)


def test_another_precision_is_refused(shared: Shared, subjects: dict[str, Any]) -> None:
    with pytest.raises(NotApplicable, match="fp32 only"):
        measured(bench(shared, subjects, "tied", Topology(), precision="bf16", converter=Own()))


@pytest.mark.parametrize(
    "topology",
    [Topology(), Topology(pp=2, vpp=2), Topology(pp=3), Topology(dp=2), Topology(dp=2, pp=2), Topology(dp=8)],
    ids=str,
)
def test_a_pipeline_has_a_steady_state_and_every_rank_rows(topology: Topology) -> None:
    deal = Deal.of(topology)
    assert deal.rows == topology.dp * deal.microbatches * deal.size
    assert deal.microbatches >= 1
    assert deal.microbatches % topology.pp == 0
    assert topology.pp == 1 or deal.microbatches > topology.pp


def test_lessons_differ_and_leave_out_padding_tokens() -> None:
    config = odd_config()
    made = lessons(config, Path("nowhere"), rows=8, prose=True)
    assert len(made) == STEPS
    assert all(lesson.tokens.shape == lesson.labels.shape == (8, LENGTH) for lesson in made)
    assert len({lesson.tokens.tobytes() for lesson in made}) == STEPS
    everything = np.stack([lesson.tokens for lesson in made])
    assert config["pad_token_id"] not in everything
    assert {0, config["vocab_size"] - 1} <= set(everything.flatten().tolist())
    counts = {int(count) for lesson in made for count in (lesson.labels != IGNORED).sum(axis=1)}
    assert len(counts) > 3  # a mean over part of a batch is not the mean over all
