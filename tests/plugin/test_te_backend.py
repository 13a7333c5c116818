"""`--backend te`: its cases; that a right model passes every check, and that a wrong one fails the right one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from te_converters import CONFIG, Broken, Exporting, OneWay

from converters.topology import Topology
from parity.backends import BACKENDS, QUANTISED
from parity.case import Case, matrix
from parity.checks import activations, decoding, forward, metadata, training, weights
from parity.checks.bench import Bench, Check, NotApplicable, Shared
from parity.converter import Converter, Own, without_te
from parity.findings import Measurement
from parity.options import resolve
from parity.ranks import Zygote
from parity.seeded import write_checkpoint
from parity.subjects import Subject, config_of

ONE, TP, CP, SP = Topology(), Topology(tp=2), Topology(cp=2), Topology(tp=2, sp=True)
EVERY = (
    metadata.plan,
    metadata.config,
    weights.imported,
    weights.config_in_the_model,
    weights.coverage,
    weights.exported,
    weights.round_trip,
    forward.logits_and_loss,
    training.steps,
    decoding.with_cache,
    activations.every_block,
)


def asked(**options: str) -> tuple[list[str], dict[str, str]]:
    cases, left_out = matrix(resolve({"model": "Llama-3.2-1B", "size": "tiny", **options}), config_of)
    return [case.id for case in cases], dict(left_out)


def test_cases() -> None:
    cases, left_out = asked(backend="megatron,te", tp="1,2", precision="fp32,fp8-block")
    assert cases == [
        "llama-3.2-1b-tiny-tp1-pp1-fp32-megatron",
        "llama-3.2-1b-tiny-tp1-pp1-fp32-te",
        "llama-3.2-1b-tiny-aligned-tp1-pp1-fp8-block-te",
        "llama-3.2-1b-tiny-tp2-pp1-fp32-megatron",
        "llama-3.2-1b-tiny-tp2-pp1-fp32-te",
        "llama-3.2-1b-tiny-aligned-tp2-pp1-fp8-block-te",
    ]
    assert all(
        "fp8-block is a recipe of Transformer Engine's layers: add --backend te" in why for why in left_out.values()
    )
    assert len(left_out) == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pp": "2"}, "no pipeline"),
        ({"dp": "2"}, "know nothing of data parallelism"),
        ({"tp": "3"}, "a feed-forward width of 88 does not divide over tp=3"),
        (
            {"tp": "4", "precision": "mxfp8"},
            "mxfp8 takes sizes of linear layers that are multiples of 32: feed-forward 112",
        ),
    ],
)
def test_what_cannot_be_is_left_out(options: dict[str, str], reason: str) -> None:
    cases, left_out = asked(backend="te", **options)
    assert not cases
    (why,) = left_out.values()
    assert reason in why


def test_a_converter_that_cannot() -> None:
    assert without_te(OneWay()) == "the converter has no to_te and no te_to_hf, which --backend te calls"
    assert not without_te(Own())


@pytest.mark.parametrize("precision", QUANTISED)
def test_decoding_is_checked_below_bfloat16_too(precision: str) -> None:
    assert not BACKENDS["te"].without_cache(ONE, precision)


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    with Zygote() as zygote:
        made = Shared(zygote=zygote)
        yield made
        made.close()


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = write_checkpoint(CONFIG, tmp_path_factory.mktemp("right") / "model")
    config = json.loads((folder / "config.json").read_text())
    return Subject(name="tiny", slug="tiny", folder=Path(folder), config=config, weights="seeded", origin="folder")


On = Callable[..., list[Measurement]]


@pytest.fixture
def on(shared: Shared, subject: Subject) -> On:
    """What a check measures of a converter in a layout."""

    def run(
        check: Check, topology: Topology = ONE, precision: str = "fp32", converter: Converter | None = None
    ) -> list[Measurement]:
        case = Case(model="tiny", slug="tiny", topology=topology, precision=precision, backend="te", rank_timeout=120)
        bench = Bench(case=case, subject=subject, shared=shared, converter=converter or Own())
        return [one for one in check(bench) if isinstance(one, Measurement)]

    return run


def failed(found: list[Measurement]) -> list[str]:
    return [one.check for one in found if not one.passed]


@pytest.mark.parametrize(
    ("topology", "precision"),
    [(TP, "fp32"), (CP, "fp32"), (SP, "fp32"), (ONE, "bf16"), (ONE, "fp8-block"), (ONE, "nvfp4")],
    ids=str,
)
def test_a_right_model(topology: Topology, precision: str, on: On) -> None:
    wrong, names = [], set()
    for check in EVERY:
        try:
            found = on(check, topology, precision)
        except NotApplicable:
            assert check is decoding.with_cache
            assert topology in (CP, SP) or precision in QUANTISED
            continue
        wrong += failed(found)
        names |= {one.check for one in found}
    assert not wrong
    assert ("logits, quantised at all" in names) == (precision in QUANTISED)
    assert ({"beam search", "decode with cache of pages"} <= names) == (topology == TP and precision == "fp32")


@pytest.mark.parametrize(
    ("how", "check", "name"),
    [
        ("k and v", weights.imported, "import, coded"),
        ("k and v", forward.logits_and_loss, "logits, random ids"),
        ("gate and up", training.steps, "gradients"),
        ("eps", weights.config_in_the_model, "config, in the model"),
        ("frequencies", weights.config_in_the_model, "config, in the model"),
        ("beams", decoding.with_cache, "beam search"),
    ],
)
def test_a_wrong_model(how: str, check: Check, name: str, on: On) -> None:
    assert name in failed(on(check, converter=Broken(how)))


def test_a_wrong_export(on: On) -> None:
    assert failed(on(weights.exported, TP, converter=Exporting("gate and up"))) == ["export, coded"]
    assert failed(on(weights.round_trip, converter=Exporting("k and v"))) == ["round trip"]


def test_a_cause_is_named(on: On) -> None:
    (found,) = on(weights.imported, TP, converter=Broken("k and v"))
    assert found.causes[0]["kind"] == "keys exchanged"
    first = next(one for one in on(forward.logits_and_loss, converter=Broken("eps")) if not one.passed)
    assert first.causes[0]["what"] == ["rms_norm_eps"]


@pytest.mark.parametrize("precision", ["fp8-current", "mxfp8"])
def test_a_recipe_that_is_forgotten(precision: str, on: On) -> None:
    assert failed(on(forward.logits_and_loss, ONE, precision, Broken("quantisation"))) == ["logits, quantised at all"]


def test_a_fault_below_bfloat16(on: On) -> None:
    assert "logits, random ids" in failed(on(forward.logits_and_loss, ONE, "fp8-current", Broken("k and v")))


def test_a_converter_to_megatron_alone_leaves_te_out(
    run: Callable[..., pytest.RunResult], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    result = run(f"--model={model}", "--backend=te", "--converter=te_converters:OneWay")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*the converter has no to_te and no te_to_hf, which --backend te calls*"])
