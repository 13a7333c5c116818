"""A failing forward names what is to blame: converters with one fault each, in several layouts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_converters import CONFIG, Mutated, Patched, with_fields, with_tensors

from converters.topology import Topology
from parity.case import Case
from parity.causes import Cause
from parity.checks import activations, forward
from parity.checks.bench import Bench, Shared
from parity.converter import Converter, Own
from parity.diagnosis.localise import Localised, localise
from parity.findings import Lines, Measurement
from parity.ranks import Zygote
from parity.seeded import write_checkpoint
from parity.subjects import Subject

ONE, TP, PP = Topology(), Topology(tp=2), Topology(pp=2)
SP, CP, VPP = Topology(tp=2, sp=True), Topology(cp=2), Topology(pp=2, vpp=2)
K, V = (f"model.layers.2.self_attn.{name}_proj.weight" for name in "kv")
GATE, UP = (f"model.layers.3.mlp.{name}_proj.weight" for name in ("gate", "up"))
FAILING = [Measurement.within("logits, random ids", measured=2, bound=1, unit="")]

Tensors = dict[str, Any]
Build = Callable[[Path, Path], Converter]


def exchanged(one: str, other: str) -> Build:
    def change(tensors: Tensors) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return lambda source, target: Mutated(with_tensors(source, target, change))


def rows_exchanged(tensors: Tensors) -> None:
    rows = tensors["model.embed_tokens.weight"]
    rows[[5, 9]] = rows[[9, 5]]


def ones(tensors: Tensors) -> None:
    tensors["model.norm.weight"].fill_(1)


def tensors(change: Callable[[Tensors], None]) -> Build:
    return lambda source, target: Mutated(with_tensors(source, target, change))


def fields(**changes: Any) -> Build:
    return lambda source, target: Mutated(with_fields(source, target, **changes))


def patched(how: str) -> Build:
    return lambda source, target: Patched(how)


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    with Zygote() as zygote:
        made = Shared(zygote=zygote)
        yield made
        made.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CONFIG, tmp_path_factory.mktemp("right") / "model")


@pytest.fixture
def on(shared: Shared, folder: Path) -> Callable[..., Bench]:
    """A bench with a converter in a layout."""
    subject = Subject(
        name="tiny",
        slug="tiny",
        folder=folder,
        config=json.loads((folder / "config.json").read_text()),
        weights="seeded",
        origin="folder",
    )

    def make(converter: Converter, topology: Topology = ONE, precision: str = "fp32") -> Bench:
        case = Case(model="tiny", slug="tiny", topology=topology, precision=precision, rank_timeout=120)
        return Bench(case=case, subject=subject, shared=shared, converter=converter)

    return make


def named(found: Localised) -> list[tuple[str, tuple[str, ...]]]:
    return [(cause.kind, cause.what) for cause in found.causes]


WEIGHTS = [
    ("k and v of one layer", exchanged(K, V), TP, ("keys exchanged", ("k_proj", "v_proj")), "layers.2.attention"),
    (
        "gate and up of one layer",
        exchanged(GATE, UP),
        VPP,
        ("keys exchanged", ("gate_proj", "up_proj")),
        "layers.3.mlp",
    ),
    ("final norm at one", tensors(ones), PP, ("ones", ("norm",)), "final_norm"),
    ("two embedding rows", tensors(rows_exchanged), TP, ("rows exchanged", ("embed_tokens",)), "embedding"),
]


@pytest.mark.parametrize(
    ("build", "topology", "cause", "first"), [row[1:] for row in WEIGHTS], ids=[row[0] for row in WEIGHTS]
)
def test_weights(
    build: Build,
    topology: Topology,
    cause: tuple[str, tuple[str, ...]],
    first: str,
    on: Callable[..., Bench],
    folder: Path,
    tmp_path: Path,
) -> None:
    found = localise(on(build(folder, tmp_path / "wrong"), topology), FAILING)
    assert named(found)[0] == cause
    assert not any(kind in ("config", "computation") for kind, _ in named(found))
    assert found.text.startswith(f"first wrong: {first} (sequence")
    assert "transformers with that computes what the model does" in found.text


CHANGED = [
    ({"rms_norm_eps": 1e-5}, SP, "rms_norm_eps", "layers.0.input_norm", "demanded 0.0003, the model has 1e-05"),
    ({"rope_theta": 10000.0}, ONE, "rope_theta", "layers.0.attention", "rope_theta 10000 for 5000"),
    ({"factor": 8.0}, CP, "rope_scaling.factor", "layers.0.attention", "factor 8 for 32"),
    ({"rope_scaling": None}, PP, "rope_scaling", "layers.0.attention", "rope_type 'default' for 'llama3'"),
    ({"hidden_act": "gelu"}, ONE, "hidden_act", "layers.0.mlp", "hidden_act: gelu for silu"),
]


@pytest.mark.parametrize(
    ("changes", "topology", "field", "first", "words"), CHANGED, ids=[str(*row[0]) for row in CHANGED]
)
def test_config(
    changes: dict[str, Any],
    topology: Topology,
    field: str,
    first: str,
    words: str,
    on: Callable[..., Bench],
    folder: Path,
    tmp_path: Path,
) -> None:
    found = localise(on(fields(**changes)(folder, tmp_path / "wrong"), topology), FAILING)
    assert named(found) == [("config", (field,))]
    assert found.text.startswith(f"first wrong: {first} (sequence")
    assert words in next(line for line in found.text.splitlines() if line.startswith("config: "))
    assert "weights: equal to the bit" in found.text


@pytest.mark.parametrize(
    ("how", "topology", "part", "first", "words"),
    [
        ("frequencies in bfloat16", TP, "rope", "layers.0.attention", "rounded to bfloat16"),
        ("frequencies of Megatron's own", ONE, None, "layers.0.attention", "original_max_position_embeddings 8192 for"),
        ("interleaved", ONE, "rope", "layers.0.attention", "neighbouring channels rotate against each other"),
        ("eps outside of the root", SP, "norm", "layers.0.input_norm", "weights: equal to the bit"),
        ("an MLP scaled", CP, "mlp", "layers.2.mlp", "weights: equal to the bit"),
        ("logits scaled", PP, "head", "logits", "weights: equal to the bit"),
    ],
)
def test_computation(
    how: str, topology: Topology, part: str | None, first: str, words: str, on: Callable[..., Bench]
) -> None:
    found = localise(on(Patched(how), topology), FAILING)
    if part is None:  # what a config can say is config, though the config of the model says otherwise
        assert [(kind, len(names)) for kind, names in named(found)] == [("config", 3)]
    else:
        assert named(found) == [("computation", (part,))]
    assert found.text.startswith(f"first wrong: {first} (sequence")
    assert words in found.text


@pytest.mark.parametrize("topology", [ONE, Topology(tp=2, cp=2, sp=True)], ids=str)
def test_nothing_is_to_blame_in_a_clean_model(topology: Topology, on: Callable[..., Bench]) -> None:
    found = localise(on(Own(), topology), FAILING)
    assert found == Localised(text="every tap is within its bound")


def test_two_faults_are_both_named(on: Callable[..., Bench], folder: Path, tmp_path: Path) -> None:
    wrong = exchanged(K, V)(with_fields(folder, tmp_path / "fields", rms_norm_eps=1e-5), tmp_path / "both")
    assert set(named(localise(on(wrong, TP), FAILING))) == {
        ("keys exchanged", ("k_proj", "v_proj")),
        ("config", ("rms_norm_eps",)),
    }


def test_a_computation_beside_other_faults(on: Callable[..., Bench], folder: Path, tmp_path: Path) -> None:
    """The MLP of layer 2 is beyond weights and config: transformers with both still computes otherwise there."""
    wrong = Patched("an MLP scaled", with_fields(folder, tmp_path / "wrong", rms_norm_eps=1e-5))
    found = localise(on(wrong), FAILING)
    assert named(found) == [("config", ("rms_norm_eps",)), ("computation", ("mlp",))]
    assert "still computes otherwise, first at layers.2.mlp" in found.text


def test_bfloat16_is_held_against_the_oracle(on: Callable[..., Bench], folder: Path, tmp_path: Path) -> None:
    wrong = exchanged(GATE, UP)(folder, tmp_path / "wrong")
    assert named(localise(on(wrong, TP, "bf16"), FAILING))[0] == ("keys exchanged", ("gate_proj", "up_proj"))
    assert not localise(on(Own(), TP, "bf16"), FAILING).causes


@pytest.mark.parametrize(
    ("check", "cause"),
    [
        ("logits, packed", Cause(kind="computation", what=("mask",))),
        ("logits, left padding", Cause(kind="computation", what=("mask",))),
        ("greedy generation, logits", Cause(kind="computation", what=("cache",))),
        ("gradients", Cause(kind="computation", what=("gradients",))),
        ("reference", Cause(kind="reference")),
    ],
)
def test_what_only_one_kind_of_check_sees(check: str, cause: Cause, on: Callable[..., Bench]) -> None:
    """Known from which checks fail: no rank is asked."""
    failed = [Measurement.within(check, measured=2, bound=1, unit="")]
    (found,) = localise(on(Own()), failed).causes
    assert found.names(cause)


def test_a_loss_that_disagrees_with_right_logits(on: Callable[..., Bench]) -> None:
    failed = [Measurement.within("loss, random ids", measured=2, bound=1, unit="")]
    assert named(localise(on(Own()), failed)) == [("computation", ("loss",))]


def test_the_forward_check_says_why_it_fails(on: Callable[..., Bench]) -> None:
    found = [one for one in forward.logits_and_loss(on(Patched("mask ignored"))) if isinstance(one, Measurement)]
    failed = [one for one in found if not one.passed]
    assert {one.check.partition(", ")[2] for one in failed} == {"left padding", "packed"}
    assert [Cause.from_json(cause).what for cause in failed[0].causes] == [("mask",)]
    assert "only sequences behind padding or beside others are wrong" in failed[0].detail


def test_activations_of_a_wrong_model(on: Callable[..., Bench], folder: Path, tmp_path: Path) -> None:
    """The picture climbs where the fault is; blocks before it stay within their bounds."""
    measurement, picture = activations.every_block(on(exchanged(K, V)(folder, tmp_path / "wrong"), PP))
    assert isinstance(measurement, Measurement)
    assert isinstance(picture, Lines)
    assert not measurement.passed
    assert measurement.detail.startswith("layers.2: ")
    assert list(picture.ticks) == ["embedding", "0", "1", "2", "3", "final_norm"]
    over = [
        name
        for name, value, bound in zip(picture.ticks, picture.curves["measured"], picture.curves["bound"], strict=True)
        if value > bound
    ]
    assert over == ["2", "3", "final_norm"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_of_a_right_model(precision: str, on: Callable[..., Bench]) -> None:
    measurement, _ = activations.every_block(on(Own(), TP, precision))
    assert isinstance(measurement, Measurement)
    assert measurement.passed, measurement.detail
