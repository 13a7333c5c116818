"""What models are asked, and the bounds that answers are held to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.sources import read_config
from parity.bounds import nearness, rms, spread, worst
from parity.probes import IGNORED, WORK, Piece, Probe, probes
from parity.seeded import parameters
from parity.tiny import shrink

TINY = shrink(read_config("Llama-3.2-1B"))
REAL = read_config("Llama-3.2-1B")


def by_family(config: dict[str, Any]) -> dict[str, Probe]:
    """The probes by the first words of their names."""
    return {probe.name.partition(",")[0].partition(" to ")[0]: probe for probe in probes(config, Path(), prose=False)}


@pytest.mark.parametrize("config", [TINY, REAL], ids=["tiny", "real"])
def test_every_probe_is_well_formed(config: dict[str, Any]) -> None:
    found = by_family(config)
    assert list(found) == ["random ids", "vocabulary", "positions", "long", "left padding", "packed"]
    for probe in found.values():
        assert probe.tokens.dtype == probe.labels.dtype == np.int64
        assert probe.tokens.min() >= 0
        assert probe.tokens.max() < config["vocab_size"]
        assert probe.positions is None or probe.positions.max() < config["max_position_embeddings"]
        assert probe.labelled.any()


def test_a_tiny_vocabulary_is_asked_whole() -> None:
    probe = by_family(TINY)["vocabulary"]
    assert probe.name == "vocabulary, 331 of 331 rows"
    assert set(probe.tokens.flat) == set(probe.labels.flat) == set(range(331))


def test_of_a_large_vocabulary_the_name_says_how_much_is_asked() -> None:
    probe = by_family(REAL)["vocabulary"]
    asked = set(probe.tokens.flat)
    assert probe.name == f"vocabulary, {len(asked)} of 128,256 rows"
    assert asked >= {0, 64127, 64128, 128255}  # both ends, and both sides of where two ranks meet


def test_positions_reach_the_last_one_in_jumps() -> None:
    positions = by_family(TINY)["positions"].positions
    assert positions is not None
    near_then_far, spread_out, end = positions
    last = TINY["max_position_embeddings"] - 1
    assert (near_then_far[0], near_then_far[-1], spread_out[0], spread_out[-1], end[-1]) == (0, last, 0, last, last)
    assert sorted(np.diff(near_then_far))[-1] > 1000
    # RoPE sees differences only: were all rows one run, ignoring positions would go unseen.
    assert (np.diff(spread_out) > 10).all()


def test_sequences_share_rows_with_padding_and_with_each_other() -> None:
    padded, packed = (by_family(TINY)[name] for name in ("left padding", "packed"))
    assert [piece.stop - piece.start for piece in padded.pieces] == [48, 36, 16, 1]
    assert len(packed.pieces) == 8
    assert any(piece.stop - piece.start == 1 for piece in packed.pieces)
    for probe in (padded, packed):
        assert probe.positions is not None
        for piece in probe.pieces:
            assert probe.positions[piece.row, piece.start] == 0
            assert probe.labels[piece.row, piece.stop - 1] == IGNORED  # what follows is another sequence's


def test_what_is_asked_of_a_large_model_is_bounded() -> None:
    small = dict(TINY) | {"num_hidden_layers": 4000}
    tokens = sum(probe.tokens.size for probe in probes(small, Path(), prose=False))
    assert WORK / parameters(small) < 200  # more would not be a model too large for every probe at its longest
    assert tokens < 600


def test_a_probe_that_contradicts_itself_is_refused() -> None:
    ids = np.zeros((1, 4), dtype=np.int64)
    labels = np.full((1, 4), IGNORED)
    with pytest.raises(ValueError, match=r"one shape, found .*'labels': \(1, 3\)"):
        Probe(name="p", tokens=ids, labels=labels[:, :3])
    with pytest.raises(ValueError, match="give the positions too"):
        Probe(name="p", tokens=ids, labels=labels, segments=ids + 1)
    with pytest.raises(ValueError, match="must be in one part"):
        Probe(name="p", tokens=ids, labels=labels, positions=ids, segments=np.array([[1, 2, 2, 1]]))
    with pytest.raises(ValueError, match="padding has labels"):
        Probe(name="p", tokens=ids, labels=ids, positions=ids, segments=np.array([[0, 1, 1, 1]]))


def test_a_sequence_alone_keeps_its_positions() -> None:
    ids = np.arange(6).reshape(1, 6)
    probe = Probe(name="p", tokens=ids, labels=ids, positions=ids + 3, segments=np.array([[1, 1, 2, 3, 3, 3]]))
    assert probe.pieces == (Piece(0, 0, 2), Piece(0, 2, 3), Piece(0, 3, 6))
    alone = probe.alone(probe.pieces[2])
    assert alone.segments is None
    assert alone.positions is not None
    assert alone.positions.tolist() == [[6, 7, 8]]
    assert replace(probe, segments=None).pieces == (Piece(0, 0, 6),)


def test_one_bad_row_hides_in_the_whole_and_not_in_the_rows() -> None:
    random = np.random.default_rng(3)
    expected = random.normal(size=(200, 5000)).astype(np.float32)
    reference, candidate = (expected + random.normal(scale=0.01, size=expected.shape).astype("f4") for _ in range(2))
    own = spread([reference], expected)
    assert worst(candidate, expected, axis=0).value <= nearness(own.row, 1)
    candidate[:, 1234] += 0.3
    assert rms(candidate, expected).value <= nearness(own.rms, 1)
    found = worst(candidate, expected, axis=0)
    assert found.where == (1234,)
    assert found.value > nearness(own.row, 1)
    candidate[17, 8] = np.nan
    assert np.isnan(worst(candidate, expected, axis=1).value)
    assert worst(candidate, expected, axis=1).where == (17,)


def test_a_spread_needs_an_evaluation() -> None:
    with pytest.raises(ValueError, match="at least one evaluation"):
        spread([], np.zeros((2, 3), dtype=np.float32))
