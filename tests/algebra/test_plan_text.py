"""What a plan says of itself: pieces, origins, and the tensors it cannot make."""

from __future__ import annotations

import pytest
from test_proof_teeth import SIZES, TOY, toy

from converters.errors import PlanError
from converters.plan import Copy, Plan
from converters.table import Table, rule
from converters.topology import Coord, Mesh, Topology
from converters.values import Shift

QKV = Table(
    family="qkv",
    columns={"hf": None, "megatron": None},
    sizes={"g": "g", "r": "r", "d": "d", "h": "h"},
    branches=("q", "k"),
    rules=(
        rule("qk", hf=("q: (g r q d) h", "k: (g k d) h"), megatron="qk: (g [(r q) k] d) h"),
        rule("norm", value=Shift("megatron", -1.0), hf="n: h", megatron="m: h"),
        rule("transposed", hf="t: d h", megatron="t: h d"),
    ),
)


def qkv() -> Plan:
    return QKV.plan("hf", "megatron", sizes={"g": 2, "r": 3, "d": 4, "h": 5, "q": 1, "k": 1}, features=frozenset())


def lines(plan: Plan, key: str) -> list[str]:
    return [str(piece) for piece in plan.explain(key)]


def test_a_merged_matrix_is_explained_piece_by_piece() -> None:
    assert lines(qkv(), "qk") == [
        "[0: 2x+80, 60x+1] <- q [0: 2x+60, 60x+1]  (qk: g=2 x r*d*h=60)",
        "[60: 2x+80, 20x+1] <- k [0: 2x+20, 20x+1]  (qk: g=2 x d*h=20)",
    ]
    assert lines(qkv(), "m") == ["[0:5] <- n [0:5] -1  (norm: h=5)"]
    assert lines(qkv().inverse(), "n") == ["[0:5] <- m [0:5] +1  (norm: h=5)"]
    assert lines(qkv(), "t") == ["[0: 5x+4, 4x+1] <- t [0: 5x+1, 4x+5]  (transposed: h=5 x d=4)"]


def test_constants_and_ties_are_explained() -> None:
    assert lines(toy("tied"), "v") == ["[0:20] <- w [0:20]  (w: n*m=20)", "[20:24] = 0  (w: 4 elements)"]
    assert lines(toy("tied"), "u") == [
        "[0:20] <- (tied) w [0:20]  (second: n*m=20)",
        "[20:24] = 0  (second: 4 elements)",
    ]
    assert lines(toy("tied").inverse(), "w")[1] == "[0:20] == (tied) u [0:20]  (second: n*m=20)"
    single = TOY.plan("a", "b", sizes={**SIZES, "n": 1, "m": 1, "pad": 0}, features=frozenset())
    assert lines(single, "v") == ["[0:1] <- w [0:1]  (w: 1 element)"]


def test_verified_copies_come_last() -> None:
    kinds = [copy.kind for copy in toy("tied").inverse().copies]
    assert kinds == ["move", "verify"]
    assert toy("tied").inverse().elements == 20


def test_the_origin_of_an_element_is_a_place_or_a_constant() -> None:
    assert qkv().origin("qk", 85) == ("q", 65)
    assert qkv().origin("qk", 60) == ("k", 0)
    assert qkv().origin("t", 5) == ("t", 6)
    assert toy().origin("v", 20) == 0.0


def test_an_unknown_tensor_or_element_is_refused() -> None:
    with pytest.raises(PlanError, match=r"megatron has no tensor 'qkk' here \(did you mean 'qk'\?\)"):
        qkv().explain("qkk")
    with pytest.raises(PlanError, match=r"qk has no element 160, its shape is \[32, 5\]"):
        qkv().origin("qk", 160)
    with pytest.raises(PlanError, match="qk has no element -1"):
        qkv().origin("qk", -1)


def test_what_is_dropped_is_neither_copied_nor_written() -> None:
    plan = toy()
    assert set(plan.source_tensors) == {"w", "cache"}
    assert set(plan.target_tensors) == {"v"}
    assert (plan.drops, plan.lost) == ({"cache": "recomputed"}, {"spare": "not stored"})


def test_a_restriction_keeps_the_side_it_does_not_name() -> None:
    mesh = Mesh(Topology(tp=2), Coord(tp=1))
    both = toy().restrict(source=mesh).restrict(target=mesh)
    assert (both.source_mesh, both.target_mesh) == (mesh, mesh)
    (copy,) = both.copies
    assert isinstance(copy, Copy)
    assert (copy.source.offset, copy.target.offset, copy.elements, copy.source_replica) == (12, 0, 8, True)
    assert both.inverse().inverse() == both
    onto = toy().restrict(target=mesh).inverse()
    assert (onto.source_mesh, onto.target_mesh, onto.target_tensors) == (mesh, None, {"w": (5, 4)})
    assert [(fill.region.offset, fill.elements) for fill in both.fills] == [(8, 4)]


def test_tied_tensors_are_told_on_either_side() -> None:
    assert toy("tied").tied == {"u"}
    assert toy("tied").inverse().tied == {"w"}
    assert toy().tied == frozenset()
