"""`parity self-test`: real faults through real ranks, and what it says when a check is blind or cries wolf."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from parity.__main__ import main
from parity.checks.bench import Bench
from parity.commands import self_test
from parity.faults.inject import Faulty
from parity.findings import Measurement
from parity.rank_failure import RankFailure
from parity.selftest import models as selftest_models
from parity.selftest import run as selftest
from parity.selftest.models import packaged

NAME = "rope permutation missing"
"""A fault of files, on one backend."""


@dataclass(frozen=True, kw_only=True)
class Stub(selftest.Check):
    """A check that always says the same, of a faulty converter or of any, and asks no rank."""

    differing: tuple[str, ...] = ()
    of_any: bool = True

    def load(self) -> Callable[..., Iterable[Any]]:
        def check(bench: Bench) -> Iterator[Measurement]:
            told = self.of_any or isinstance(bench.converter, Faulty)
            yield Measurement.equal("stub", count=1, unit="things", differing=self.differing if told else ())

        return check


def run(*options: str) -> int:
    return main(["self-test", *options])


def test_faults_are_caught_and_a_clean_run_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = tmp_path / "found.json"
    cheap = tuple(check for check in selftest.CHECKS if not check.dear)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(selftest, "CHECKS", cheap)
        assert run("--fault", f"layout:{NAME}", "--seeds", "1", "--json", str(at)) == 0
    found = json.loads(at.read_text())
    assert found["schema"] == "llama-parity/self-test/1"
    assert {"passed": True, "faults": 1, "variants": 6, "survivors": 0, "false_alarms": 0}.items() <= found[
        "summary"
    ].items()
    assert set(found) == {
        "schema",
        "summary",
        "converter",
        "checks",
        "faults",
        "variants",
        "not_applicable",
        "beds",
        "versions",
    }
    verdicts = {(one["at"], bool(one["layers"])): one["verdicts"] for one in found["variants"]}
    assert verdicts["import", False] == {
        "import": "caught",
        "config": "passed",
        "round trip": "caught",
        "logits": "caught",
    }
    assert verdicts["export", True] == {"export": "caught", "round trip": "caught"}
    # Wrong in both directions, the round trip is clean: which is why each is checked by itself.
    cancelled = {"import": "caught", "config": "passed", "export": "caught", "round trip": "passed"}
    assert verdicts["cancel", True] == cancelled
    assert set(verdicts[None, False].values()) == {"passed"}
    said = capsys.readouterr().out
    assert "1 faults, 6 variants: 6 caught" in said
    assert "0 survive; 1 clean runs, 0 false alarms" in said


def test_a_fault_of_quantised_products_is_caught_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = tmp_path / "found.json"
    few = tuple(check for check in selftest.CHECKS if check.name in ("products", "state"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(selftest, "CHECKS", few)
        assert run("--fault", "quantisation:products: gradients in E4M3", "--seeds", "0", "--json", str(at)) == 0
    wrong, clean = json.loads(at.read_text())["variants"]
    assert wrong["verdicts"] == {"products": "caught"}
    assert wrong["named"] is True
    assert clean["verdicts"] == {"products": "passed", "state": "not applicable"}
    assert clean["bed"] == "aligned-tp2-pp1-fp8-current-te"
    assert "products, backward" in wrong["said"]["products"]


def test_ranks_that_fail_and_faults_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = tmp_path / "found.json"
    cheap = tuple(check for check in selftest.CHECKS if check.name == "import")
    wanted = {"ranks: a rank raises": "crashed", "ranks: a rank dies": "crashed", "down_proj lost": "refused"}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(selftest, "CHECKS", (*cheap, Stub(name="round trip", function="", reads=("import",))))
        faults = [fault for fault in selftest.all_faults() if fault.name in wanted]
        patched.setattr(selftest, "all_faults", lambda: [_at_import(fault) for fault in faults])
        assert run("--seeds", "0", "--json", str(at)) == 0
    found = {one["fault"]: one["verdicts"]["import"] for one in json.loads(at.read_text())["variants"]}
    assert found == {**wanted, None: "passed"}


def _at_import(fault: Any) -> Any:
    from dataclasses import replace

    return replace(fault, at=("import",), checks=("import",))


def test_a_blind_check_lets_faults_survive(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(selftest, "CHECKS", (Stub(name="import", function="", reads=("import",)),))
    assert run("--fault", NAME, "--seeds", "1") == 1
    said = capsys.readouterr().out
    assert f"survives: {NAME} [import] tied-tp2-pp1 (import had to see it and passed)" in said
    assert "0 caught" in said
    assert "4 survive" in said  # on export alone, no check of this run has a say


def test_a_false_alarm_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wolf = Stub(name="import", function="", reads=("import",), differing=("everything",))
    monkeypatch.setattr(selftest, "CHECKS", (wolf,))
    assert run("--fault", NAME, "--seeds", "2") == 1
    said = capsys.readouterr().out
    assert "false alarm: clean tied-tp2-pp1" in said
    assert "2 clean runs, 2 false alarms" in said


@pytest.mark.parametrize("fault", [NAME, "no fault, clean runs alone"])
def test_a_check_that_breaks_is_no_catch(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(Stub):
        def load(self) -> Callable[..., Iterable[Any]]:
            def check(bench: Any) -> Iterator[Measurement]:
                if fault == NAME or not isinstance(bench.converter, Faulty):
                    raise KeyError("of the harness")
                yield Measurement.equal("stub", count=1, unit="things", differing=("everything",))

            return check

    monkeypatch.setattr(selftest, "CHECKS", (Broken(name="import", function="", reads=("import",)),))
    assert run("--fault", NAME, "--seeds", "1") == 1
    said = capsys.readouterr().out
    assert "broken: clean tied-tp2-pp1: KeyError: 'of the harness'" in said
    assert (f"broken: {NAME} [import]" in said) == (fault == NAME)


def test_a_slow_machine_catches_nothing() -> None:
    late = RankFailure("rank 1 did not answer", 1, "tp=1", "timeout", "")
    (fault, hangs) = (selftest.selected(name)[0] for name in (NAME, selftest.HANGS))
    for one, verdict in ((fault, "broken"), (hangs, "hung")):
        variant = selftest.Variant(fault=one, bed=packaged().beds[0])
        job = selftest._Job(check=selftest.CHECKS[0], variants=[variant], bench=None, alone=False)  # type: ignore[arg-type]
        job._failed(late)
        assert job.verdict == verdict


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--fault", "no such fault") == 2
    assert run("--converter", "nowhere") == 2
    assert run("--seeds", "-1") == 2
    assert run("--model", "nobody/no-such-model-here", "--size", "full") == 2
    said = capsys.readouterr().err
    assert "selects nothing" in said
    assert "no converter 'nowhere'" in said


def test_diagnosis_is_required_of_many_or_where_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = Stub(name="import", function="", reads=("import",), differing=("everything",), of_any=False)
    monkeypatch.setattr(selftest, "CHECKS", (seen,))
    assert run("--fault", NAME, "--seeds", "0") == 0
    assert run("--fault", NAME, "--seeds", "0", "--require-diagnosis", "0.5") == 1
    monkeypatch.setattr(self_test, "ENOUGH", 4)  # as many as there are here
    assert run("--fault", NAME, "--seeds", "0") == 1
    assert "0.0% named rightly, 90% asked for" in capsys.readouterr().err


def test_selection_by_glob() -> None:
    names = [fault.name for fault in selftest.selected("layout:*norm*")]
    assert names == []
    assert all(fault.family == "dtype" for fault in selftest.selected("dtype:*"))
    assert [fault.name for fault in selftest.selected("gate and up *")] == ["gate and up exchanged"]


def test_equivalent_faults_are_few_and_say_why() -> None:
    found = [fault for fault in selftest.selected("*") if fault.equivalent]
    assert [fault.name for fault in found] == [
        "equivalent: norms by way of float16",
        "equivalent: positions moved",
        "equivalent: padding rows can be chosen",
    ]


def test_clean_runs_go_over_every_bed() -> None:
    stock = selftest_models.packaged()
    clean = selftest.variants("no fault", stock=stock, seeds=50)
    assert [one.bed for one in clean[: len(stock.beds)]] == list(stock.beds)
    assert len({(one.bed.model, one.seed) for one in clean[len(stock.beds) :]}) == 50 - len(stock.beds)
    layouts = {one.bed.topology for one in clean}
    assert {*selftest_models.LAYOUTS, *(bed.topology for bed in stock.beds)} == layouts
    assert {one.bed.model for one in clean} == set(stock.configs)
