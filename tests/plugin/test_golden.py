"""Golden values: the file, and every way in which a run, a person or a machine can disagree with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import parity
import parity.__main__
from parity.golden import file as golden
from parity.golden.file import NAME, PENDING, Golden, GoldenError, Quantity
from parity.golden.values import compare, from_logits, noise, signs, top
from parity.probes import Probe

ROOT = Path(parity.__file__).parents[1]
SLUG = "llama-3.2-1b-tiny"
SHIPPED = {SLUG, "llama-3.1-8b-tiny", "llama-2-7b-hf-tiny", "smollm2-135m-tiny", "smollm2-135m"}
MODEL = ("--model", "Llama-3.2-1B", "--size", "tiny", "-k", "golden")


@pytest.fixture(autouse=True)
def _by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)


@pytest.fixture
def made() -> Golden:
    ids = np.arange(6).reshape(2, 3)
    values = np.array([[1e-45, 0.1, 16777217], [-0.0, 3e38, 1 / 3]], dtype=np.float32)
    return Golden(
        header={"format": 1, "regenerate": "pytest --model M --regen-golden", "versions": {"torch": "2"}},
        probe=Probe(name="ids", tokens=ids, labels=ids + 1),
        places=ids[..., None],
        quantities={
            "loss": Quantity(values=values, axes=("sequence", "token"), floor=1 / 3),
            "norms": Quantity(values=np.array([1 / 3, 1e-300]), axes=("key",), alike=1, names=("a", "b")),
        },
    )


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A copy of one shipped golden."""
    shutil.copytree(ROOT / "golden" / SLUG, tmp_path / "kept" / SLUG)
    return tmp_path / "kept"


def run(folder: Path, *arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    """The shipped golden check on a tiny model, started in `folder`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "parity.plugin", "-p", "no:cacheprovider", "-q", "-rs", *MODEL]
        + [str(argument) for argument in arguments],
        cwd=folder,
        env={**clean, "PYTHONPATH": str(ROOT), "COLUMNS": "120", **environ},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_text_holds_every_bit(made: Golden) -> None:
    text = golden.to_text(made)
    back = golden.from_text(text, "here")
    for name, quantity in made.quantities.items():
        assert back.quantities[name].values.tobytes() == quantity.values.tobytes()
        assert (back.quantities[name].floor, back.quantities[name].names) == (quantity.floor, quantity.names)
    assert golden.to_text(back) == text


@pytest.mark.parametrize(("old", "new"), [("0.1", "0.2"), ('"ids"', '"dis"'), ("\n}}\n", "\n}}\n\n")])
def test_an_edit_by_hand_is_noticed(made: Golden, old: str, new: str) -> None:
    text = golden.to_text(made)
    assert old in text
    with pytest.raises(GoldenError, match=r"(?s)edited by hand.*pytest --model M --regen-golden"):
        golden.from_text(text.replace(old, new, 1), "here")


def test_a_part_of_a_file_is_no_golden(made: Golden) -> None:
    with pytest.raises(GoldenError, match="only a part of one"):
        golden.from_text(golden.to_text(made)[:-40], "here")


def test_values_that_are_no_numbers_are_not_kept(made: Golden, tmp_path: Path) -> None:
    broken = replace(made.quantities["norms"], values=np.array([1.0, np.nan]))
    with pytest.raises(GoldenError, match="norms holds values that are no numbers"):
        golden.write(tmp_path / "m", replace(made, quantities={"norms": broken}))
    assert not (tmp_path / "m").exists() or not any((tmp_path / "m").iterdir())


def test_an_interrupted_write_leaves_what_was_there(
    made: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden.write(tmp_path, made)
    before = (tmp_path / NAME).read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    for put in (golden.write, golden.leave_pending):
        with pytest.raises(KeyboardInterrupt):
            put(tmp_path, replace(made, quantities={}))
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert (tmp_path / NAME).read_bytes() == before


def test_pending_is_decided_by_a_person(made: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GoldenError, match="nothing is pending"):
        golden.accept(tmp_path)
    path = golden.leave_pending(tmp_path, made)
    monkeypatch.setenv("CI", "true")
    for change in (golden.accept, lambda folder: golden.write(folder, made)):
        with pytest.raises(GoldenError, match="refused under CI"):
            change(tmp_path)
    monkeypatch.delenv("CI")
    whole = path.read_text()
    path.write_text(whole.replace("0.1", "0.2"))
    with pytest.raises(GoldenError, match="edited by hand"):
        golden.accept(tmp_path)
    path.write_text(whole)
    golden.accept(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_signs_never_change() -> None:
    assert signs("logits 0", 8).tolist() == signs("logits 0", 99)[:8].tolist()
    assert set(signs("x", 1000).tolist()) == {-1, 1}
    assert abs(int(signs("x", 1000).sum())) < 120


def test_any_logit_is_seen() -> None:
    logits = np.random.default_rng(0).normal(size=(1, 2, 257)).astype(np.float32)
    loss, places = np.zeros((1, 2), np.float32), top(logits)
    before = from_logits(logits, loss, places)
    least = int(logits[0, 1].argmin())
    logits[0, 1, least] -= 0.5  # far from the largest
    after = from_logits(logits, loss, places)
    assert np.abs(after["logits, signed sums"] - before["logits, signed sums"])[0, 1] == pytest.approx([0.5] * 4)


def test_each_is_held_to_its_own_size() -> None:
    values = np.array([[1e6, 1e6], [1e-6, 1e-6]])
    expected = Quantity(values=values, axes=("key", "n"), alike=1, names=("big", "small"), floor=1e-6)
    moved = expected.values * [[1.0, 1.0], [1.0, 1.001]]
    found = compare("norms", expected, moved, 1e-6, 10)
    assert not found.passed
    assert found.where == "small, n 1"
    assert found.ratio == pytest.approx(100, rel=0.01)
    assert not compare("norms", expected, np.full_like(moved, np.nan), 1.0, 10).passed
    assert not compare("norms", expected, moved[:1], 1.0, 10).passed


def kept(floor: float) -> Quantity:
    return Quantity(values=np.ones((2, 3)), axes=("sequence", "token"), floor=floor)


@pytest.mark.parametrize(("then", "now"), [(1e-6, 1e-4), (1e-4, 1e-6)])
def test_a_floor_that_is_high_on_one_side_does_not_widen_the_gate_alone(then: float, now: float) -> None:
    """Drift of five of the higher floors, which alone would let it pass: the lower one tightens the gate."""
    moved = np.ones((2, 3)) + np.array([[0, 0, 5e-4], [0, 0, 0]])
    found = compare("loss", kept(then), moved, now, 10)
    assert not found.passed
    assert found.bound == pytest.approx(1e-4)
    assert compare("loss", kept(1e-4), moved, 1e-4, 10).passed


@pytest.mark.parametrize("ratio", [0.1, 0.3, 1, 3, 10])
def test_two_honest_floors_leave_room_for_both(ratio: float) -> None:
    """Each machine is a floor away from what is exact, and the candidate two of its own."""
    then, now = 1e-5, 1e-5 * ratio
    assert compare("loss", kept(then), np.ones((2, 3)) + then + 2 * now, now, 10).passed


def test_a_floor_that_grew_is_itself_found() -> None:
    golden_ones = {"loss": kept(1e-7), "norms": kept(0.0)}
    same = noise(golden_ones, {"loss": kept(9e-7), "norms": kept(0.0), "new": kept(1.0)})
    assert same is not None
    assert (same.name, same.growth, same.unmet) == ("loss", pytest.approx(9), [])
    coarse = noise(golden_ones, {"loss": kept(1e-3), "norms": kept(1e-7)})
    assert coarse is not None
    assert "loss: the noise floor is 1.00e-03 and was 1.00e-07" in coarse.unmet[0]
    exact = noise(golden_ones, {"loss": kept(1e-7), "norms": kept(1e-6)})
    assert exact is not None
    assert (exact.name, exact.growth) == ("norms", pytest.approx(1e-6 * 2**24))
    nan = noise(golden_ones, {"loss": kept(float("nan")), "norms": kept(1.0)})
    assert nan is not None
    assert nan.unmet
    assert noise(golden_ones, {}) is None


def test_shipped_goldens_are_whole() -> None:
    kept = {path.name for path in (ROOT / "golden").iterdir() if path.is_dir()}
    assert kept == SHIPPED
    for slug in kept:
        assert golden.strays(ROOT / "golden" / slug) == []
        found = golden.read(ROOT / "golden" / slug / NAME)
        assert (ROOT / "golden" / slug / NAME).stat().st_size < 300_000
        assert set(found.quantities) >= {"loss", "gradients", "loss curve", "activations"}
    assert "dequantised" in golden.read(ROOT / "golden" / "smollm2-135m" / NAME).header["weights"]


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "workers"])
def test_without_a_golden_every_report_says_so_with_the_command(workers: tuple[str, ...], tmp_path: Path) -> None:
    if workers:
        pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    done = run(tmp_path, "--parity-report", "run.json,run.md,run.html", "-k", "golden or plan", *workers)
    assert done.returncode == 0, done.stdout
    reason = f"no golden for {SLUG}: make one with pytest --model Llama-3.2-1B --size tiny --regen-golden -k golden"
    assert workers or reason in done.stdout
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["left_out"] == [{"id": f"{SLUG}-tp1-pp1-fp32-megatron, golden", "reason": reason}]
    assert record["summary"]["line"].endswith("; 1 left out")
    assert reason in (tmp_path / "run.md").read_text()
    assert reason in (tmp_path / "run.html").read_text()


def test_missing_and_edited_by_hand_fail(shelf: Path, tmp_path: Path) -> None:
    path = shelf / SLUG / NAME
    path.write_text(path.read_text().replace('"date": "20', '"date": "19'))
    done = run(tmp_path, "--golden", "kept", "--model", "Llama-3.2-1B,Llama-3.1-8B")
    assert done.returncode == 1
    assert f"kept/{SLUG}/{NAME} was edited by hand" in done.stdout
    assert f"kept/llama-3.1-8b-tiny/{NAME} is missing: make it with" in done.stdout


def test_regeneration_under_ci_fails_at_once(tmp_path: Path) -> None:
    done = run(tmp_path, "--regen-golden", CI="true")
    assert done.returncode == 4
    assert "--regen-golden: making goldens anew is refused under CI (CI=true)" in done.stdout + done.stderr
    assert not any(tmp_path.iterdir())


def test_a_mismatch_waits_for_a_person(shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a golden with one wrong loss and one quantity too many to an accepted one."""
    home = shelf / SLUG
    right = golden.read(home / NAME)
    values = right.quantities["loss"].values.copy()
    values[1, 7] += 0.01
    wrong = {**right.quantities, "loss": replace(right.quantities["loss"], values=values)}
    wrong["perplexity"] = right.quantities["loss curve"]
    wrong["layers"] = replace(right.quantities["layers"], floor=1e-8)
    golden.write(home, replace(right, quantities=wrong))
    before = (home / NAME).read_bytes()

    done = run(tmp_path, "--golden", "kept")
    assert done.returncode == 1
    assert "perplexity: unused: the golden has it and nothing measures it" in done.stdout
    assert "sequence 1, token 7" in done.stdout
    assert "layers: the noise floor is" in done.stdout
    assert "golden, noise floors" in done.stdout
    assert "transformers itself moved, on the same weights" in done.stdout
    assert f"parity golden diff {SLUG}" in done.stdout
    assert (home / NAME).read_bytes() == before

    command = parity.__main__.main
    assert command(["golden", "diff", SLUG, "--golden", str(shelf)]) == 1
    printed = capsys.readouterr().out
    assert "sequence 1, token 7" in printed
    assert "1 of 8 quantities beyond their bounds" in printed
    assert command(["golden", "list", "--golden", str(shelf)]) == 0
    assert f"{PENDING}: pending" in capsys.readouterr().out
    assert command(["golden", "accept", SLUG, "--golden", str(shelf)]) == 0
    now = golden.read(home / NAME)
    assert set(now.quantities) == set(right.quantities)
    assert not (home / PENDING).exists()


def test_verify_finds_what_is_unused(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = parity.__main__.main
    (shelf / SLUG / "notes.bin").write_bytes(b"")
    (shelf / "gone").mkdir()
    (shelf / "loose.json").write_text("{}")
    assert command(["golden", "verify", "--golden", str(shelf)]) == 1
    printed = capsys.readouterr().out
    assert "notes.bin: unused" in printed
    assert "loose.json: unused" in printed
    assert "there is no" in printed  # the folder `gone` has no golden
    assert command(["golden", "verify", "another", "--golden", str(shelf)]) == 1
    assert "another is missing" in capsys.readouterr().out
