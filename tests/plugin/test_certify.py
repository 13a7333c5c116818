"""`parity certify`: a card only for what passes, and a card that sees every later change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parity import certificate
from parity.seeded import write_checkpoint
from parity.tiny import odd_config, with_layers

ROOT = Path(__file__).parents[2]


def parity(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "parity", *arguments],
        cwd=ROOT,
        # What a shell or an ini file may leave set is not to leave checks out.
        env={**os.environ, "COLUMNS": "300", "PYTEST_ADDOPTS": "-k metadata"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its card; and beside it, what a self-test of a few faults wrote."""
    here = tmp_path_factory.mktemp("certified")
    folder = write_checkpoint(with_layers(odd_config(), 1), here / "model", shards=2)
    (folder / "generation_config.json").write_text('{"eos_token_id": [505, 501]}')
    status, said = parity("self-test", "--fault=files:a stale*", "--seeds=1", f"--json={here / 'self-test.json'}")
    assert status == 0, said
    status, said = parity("certify", str(folder), f"--self-test={here / 'self-test.json'}", "--tp=1")
    assert status == 0, said
    return folder


def test_the_card(certified: Path) -> None:
    card = certificate.read(certified / "parity-certificate.json")
    assert card["layouts"] == ["model-tp1-pp1-fp32-megatron"]
    assert {"import, coded", "export, coded", "round trip"} <= {one["check"] for one in card["checks"]}
    assert all(one["passed"] for one in card["checks"])
    names = {file["name"] for file in card["files"]}
    assert names == {path.name for path in certified.iterdir()} - {"parity-certificate.json", "parity-certificate.md"}
    assert card["self_test"]["survivors"] == 0
    assert card["coverage"]["tensors"]["exact"] > 0
    text = (certified / "parity-certificate.md").read_text()
    assert "all passed" in text
    assert card["digest"] in text


def test_verified_without_running(certified: Path) -> None:
    status, said = parity("certify", "--verify", str(certified))
    assert status == 0, said
    assert "model is what was certified" in said


def test_every_change_is_seen(certified: Path) -> None:
    kept = {path: path.read_bytes() for path in certified.iterdir()}
    shard, config = certified / "model-00001-of-00002.safetensors", certified / "config.json"
    flipped = bytearray(kept[shard])
    flipped[-1] ^= 1
    shard.write_bytes(flipped)
    config.write_bytes(kept[config] + b"\n")
    (certified / "generation_config.json").unlink()
    (certified / "added.json").write_text("{}")
    status, said = parity("certify", "--verify", str(certified))
    (certified / "added.json").unlink()
    for path, content in kept.items():
        path.write_bytes(content)
    assert status == 1, said
    for line in (
        "model-00001-of-00002.safetensors: other content",
        "config.json: ",
        "generation_config.json: gone",
        "added.json: not on the certificate",
    ):
        assert line in said


def test_an_edited_card(certified: Path, tmp_path: Path) -> None:
    card = json.loads((certified / "parity-certificate.json").read_text())
    card["checks"][0]["measured"] = 0.5
    (tmp_path / "parity-certificate.json").write_text(json.dumps(card))
    status, said = parity("certify", "--verify", str(certified), f"--output={tmp_path}")
    assert status == 1, said
    assert "was changed after it was made" in said


def test_no_card_for_what_fails(certified: Path, tmp_path: Path) -> None:
    status, said = parity(
        "certify", str(certified), "--self-test=off", "--max-floors=0.0001", f"--output={tmp_path / 'card'}"
    )
    assert status == 1, said
    assert "gets no certificate" in said
    assert list((tmp_path / "card").iterdir()) == []


def test_no_checkpoint(tmp_path: Path) -> None:
    status, said = parity("certify", str(tmp_path))
    assert status == 2
    assert "found no config.json" in said
