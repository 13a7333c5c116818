"""Diagnosis: a mutated model is explained by the very mutation, whether its elements are coded or real weights."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.sources import read_config
from converters.topology import Topology
from parity import coded
from parity.causes import Cause
from parity.diagnosis.diagnose import diagnose
from parity.seeded import key_table
from parity.tiny import odd_config, shrink, with_layers

CONFIG: dict[str, Any] = shrink(read_config("Llama-3.2-1B")) | {"tie_word_embeddings": False}
LAYERS = CONFIG["num_hidden_layers"]
GROUPS, REP, DIM, FFN = 4, 6, 32, 88
TP = Topology(tp=2)
WEIGHTS = ("coded", "real", "bf16")

Tensors = dict[str, np.ndarray]


def layer(n: int, name: str) -> str:
    part = "mlp." if name in ("gate_proj", "up_proj", "down_proj") else "self_attn." if "proj" in name else ""
    return f"model.layers.{n}.{part}{name}.weight"


@cache
def _right(weights: str) -> Tensors:
    table = key_table(CONFIG)
    if weights == "coded":
        return {key: coded.expected(table, key).view(np.float32) for key in table}
    out = {}
    for key, shape in table.items():
        drawn = np.random.default_rng(zlib.crc32(key.encode())).normal(1.0 if "norm" in key else 0.0, 0.2, shape)
        values = drawn.astype(np.float32)
        if weights == "bf16":
            values = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        out[key] = values
    return out


def right(weights: str) -> Tensors:
    """The tensors of the tiny model, to be changed in place by key."""
    return dict(_right(weights))


def causes(expected: Tensors, actual: Tensors, weights: str, topology: Topology = TP) -> list[Cause]:
    return diagnose(expected, actual, CONFIG, topology, table=key_table(CONFIG) if weights == "coded" else None)


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """What is done to the tensors of some layers, and the cause that must be named."""

    name: str
    change: Callable[[Tensors, int], None]
    cause: Cause
    says: str = ""
    skip: tuple[str, ...] = ()


def exchange(one: str, other: str) -> Callable[[Tensors, int], None]:
    def change(t: Tensors, n: int) -> None:
        t[layer(n, one)], t[layer(n, other)] = t[layer(n, other)], t[layer(n, one)]

    return change


def rows(name: str, order: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors, int], None]:
    def change(t: Tensors, n: int) -> None:
        t[layer(n, name)] = t[layer(n, name)][order(np.arange(len(t[layer(n, name)])))]

    return change


def columns(name: str, order: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors, int], None]:
    def change(t: Tensors, n: int) -> None:
        t[layer(n, name)] = t[layer(n, name)][:, order(np.arange(t[layer(n, name)].shape[1]))]

    return change


def values(name: str, to: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors, int], None]:
    def change(t: Tensors, n: int) -> None:
        t[layer(n, name)] = to(t[layer(n, name)]).astype(np.float32)

    return change


def some_rows(name: str, start: int, stop: int, value: float) -> Callable[[Tensors, int], None]:
    def to(x: np.ndarray) -> np.ndarray:
        x = x.copy()
        x[start:stop] = value
        return x

    return values(name, to)


def both(*changes: Callable[[Tensors, int], None]) -> Callable[[Tensors, int], None]:
    def change(t: Tensors, n: int) -> None:
        for one in changes:
            one(t, n)

    return change


def truncate(x: np.ndarray) -> np.ndarray:
    return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def round_(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)).view(
        np.float32
    )


def initial(x: np.ndarray) -> np.ndarray:
    return np.random.default_rng(5).normal(0, 0.02, x.shape)


def qkv_contiguous(t: Tensors, n: int) -> None:
    """Megatron's fused rows are q, then k, then v; pulled back by the grouped order."""
    names = ("q_proj", "k_proj", "v_proj")
    whole = np.concatenate([t[layer(n, name)] for name in names])
    q, k, v = (np.arange(len(t[layer(n, name)])) for name in names)
    k, v = k + len(q), v + len(q) + len(k)
    grouped = np.concatenate(
        [
            part
            for g in range(GROUPS)
            for part in (q[g * REP * DIM : (g + 1) * REP * DIM], k[g * DIM : (g + 1) * DIM], v[g * DIM : (g + 1) * DIM])
        ]
    )
    moved = np.empty_like(whole)
    moved[grouped] = whole
    for name, part in zip(names, np.split(moved, [len(q), len(q) + len(k)]), strict=True):
        t[layer(n, name)] = part


def gate_up_contiguous(t: Tensors, n: int) -> None:
    whole = np.concatenate([t[layer(n, "gate_proj")], t[layer(n, "up_proj")]])
    moved = whole.reshape(2, 2, FFN // 2, -1).transpose(1, 0, 2, 3).reshape(whole.shape)
    t[layer(n, "gate_proj")], t[layer(n, "up_proj")] = np.split(moved, 2)


def heads(x: np.ndarray) -> np.ndarray:
    return x.reshape(REP, GROUPS, DIM).transpose(1, 0, 2).ravel()


def interleave(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, DIM // 2, 2).transpose(0, 2, 1).ravel()


def halves(x: np.ndarray) -> np.ndarray:
    return np.concatenate(np.split(x, 2)[::-1])


CODED_ONLY = ("real", "bf16")
IN_LAYERS = (
    Mutation(
        name="k v", change=exchange("k_proj", "v_proj"), cause=Cause(kind="keys exchanged", what=("k_proj", "v_proj"))
    ),
    Mutation(
        name="gate up",
        change=exchange("gate_proj", "up_proj"),
        cause=Cause(kind="keys exchanged", what=("gate_proj", "up_proj")),
    ),
    Mutation(
        name="norms",
        change=exchange("input_layernorm", "post_attention_layernorm"),
        cause=Cause(kind="keys exchanged", what=("input_layernorm", "post_attention_layernorm")),
    ),
    Mutation(
        name="up is gate",
        change=lambda t, n: t.update({layer(n, "up_proj"): t[layer(n, "gate_proj")]}),
        cause=Cause(kind="duplicated", what=("up_proj", "gate_proj")),
    ),
    Mutation(
        name="query heads",
        change=rows("q_proj", heads),
        cause=Cause(kind="rows permuted", what=("q_proj",)),
        says="(group rep dim) read as (rep group dim)",
    ),
    Mutation(
        name="query heads back",
        change=rows("q_proj", lambda x: np.argsort(heads(x))),
        cause=Cause(kind="rows permuted", what=("q_proj",)),
        says="(group rep dim) written as (rep group dim)",
    ),
    Mutation(
        name="rope",
        change=both(rows("q_proj", interleave), rows("k_proj", interleave)),
        cause=Cause(kind="rows permuted", what=("k_proj", "q_proj")),
        says="RoPE halves <-> interleaved",
    ),
    Mutation(
        name="rope of keys",
        change=rows("k_proj", lambda x: np.argsort(interleave(x))),
        cause=Cause(kind="rows permuted", what=("k_proj",)),
        says="RoPE halves <-> interleaved",
    ),
    Mutation(
        name="rope of queries with the heads of keys",
        change=rows("q_proj", lambda x: x.reshape(GROUPS, -1, 2).transpose(0, 2, 1).ravel()),
        cause=Cause(kind="rows permuted", what=("q_proj",)),
        says="(4 heads half pair)",
    ),
    Mutation(
        name="tp shards",
        change=rows("gate_proj", halves),
        cause=Cause(kind="rows permuted", what=("gate_proj",)),
        says="tp shards in another order: [1, 0]",
    ),
    Mutation(
        name="output heads",
        change=columns("o_proj", heads),
        cause=Cause(kind="columns permuted", what=("o_proj",)),
        says="(group rep dim) read as (rep group dim)",
    ),
    Mutation(
        name="row parallel shards",
        change=columns("down_proj", halves),
        cause=Cause(kind="columns permuted", what=("down_proj",)),
        says="tp shards in another order",
    ),
    Mutation(
        name="qkv contiguous",
        change=qkv_contiguous,
        cause=Cause(kind="rows permuted", what=("k_proj", "q_proj", "v_proj")),
        says="(group [(rep q) k v] dim) written as [(group rep q) (group k) (group v)] dim",
    ),
    Mutation(
        name="fc1 cut contiguously",
        change=gate_up_contiguous,
        cause=Cause(kind="rows permuted", what=("gate_proj", "up_proj")),
        says="(branch tp ffn)",
    ),
    Mutation(
        name="transposed",
        change=values("k_proj", lambda x: np.ascontiguousarray(x.T).reshape(x.shape)),
        cause=Cause(kind="transposed", what=("k_proj",)),
    ),
    Mutation(name="zeros", change=values("o_proj", np.zeros_like), cause=Cause(kind="zeros", what=("o_proj",))),
    Mutation(
        name="last shard zero",
        change=some_rows("up_proj", FFN // 2, FFN, 0.0),
        cause=Cause(kind="zeros", what=("up_proj",)),
        says="rows 44-87 (tp rank 1's part)",
    ),
    Mutation(
        name="initial", change=values("down_proj", initial), cause=Cause(kind="initial values", what=("down_proj",))
    ),
    Mutation(
        name="initial norm",
        change=values("input_layernorm", initial),
        cause=Cause(kind="initial values", what=("input_layernorm",)),
    ),
    Mutation(
        name="ones", change=values("input_layernorm", np.ones_like), cause=Cause(kind="ones", what=("input_layernorm",))
    ),
    Mutation(
        name="zero-centred",
        change=values("input_layernorm", lambda x: x - np.float32(1)),
        cause=Cause(kind="offset", what=("input_layernorm",)),
    ),
    Mutation(
        name="rounded", change=values("v_proj", round_), cause=Cause(kind="rounded", what=("v_proj",)), skip=("bf16",)
    ),
    Mutation(
        name="truncated",
        change=values("v_proj", truncate),
        cause=Cause(kind="truncated", what=("v_proj",)),
        skip=("bf16",),
    ),
    Mutation(
        name="not a number",
        change=some_rows("gate_proj", 3, 4, float("nan")),
        cause=Cause(kind="not numbers", what=("gate_proj",)),
        says="row 3",
    ),
    Mutation(
        name="lost",
        change=lambda t, n: t.pop(layer(n, "q_proj")) is None,
        cause=Cause(kind="missing tensors", what=("q_proj",)),
    ),
    Mutation(name="shape", change=values("q_proj", lambda x: x[:-1]), cause=Cause(kind="shape", what=("q_proj",))),
)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("mutation", IN_LAYERS, ids=lambda mutation: mutation.name)
def test_a_mutation_is_named_in_all_layers_and_in_one(mutation: Mutation, weights: str) -> None:
    if weights in mutation.skip:
        pytest.skip("does not change such weights")
    for layers, where in ((range(LAYERS), f"layers 0-{LAYERS - 1}"), ([3], "layer 3")):
        found = right(weights)
        for n in layers:
            mutation.change(found, n)
        (cause,) = causes(right(weights), found, weights)
        assert cause.names(mutation.cause), str(cause)
        assert mutation.says in str(cause)
        assert where in cause.where


def moved(order: list[int]) -> Callable[[Tensors], None]:
    def change(t: Tensors) -> None:
        was = dict(t)
        for key in t:
            if key.startswith("model.layers."):
                n = int(key.split(".")[2])
                t[key] = was[key.replace(f"layers.{n}.", f"layers.{order[n]}.")]

    return change


def in_vocabulary(to: Callable[[np.ndarray], np.ndarray], key: str = "lm_head.weight") -> Callable[[Tensors], None]:
    def change(t: Tensors) -> None:
        t[key] = to(t[key])

    return change


def swap_rows(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x[[7, 300]] = x[[300, 7]]
    return x


def behind_padding(x: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros_like(x[:1]), x[:-1]])


def halves_of_padded(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x[166:], np.zeros_like(x[:1]), x[:165]])


def padded(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, np.zeros_like(x[:5])])


WHOLE: tuple[tuple[str, Callable[[Tensors], Any], Cause, str], ...] = (
    ("shift", moved([(n + 1) % 8 for n in range(8)]), Cause(kind="layers moved"), "shifted by +1"),
    ("exchange", moved([0, 4, 2, 3, 1, 5, 6, 7]), Cause(kind="layers moved"), "layers 1 and 4 are exchanged"),
    ("stages", moved([4, 5, 6, 7, 0, 1, 2, 3]), Cause(kind="layers moved"), "0-3 holds 4-7, 4-7 holds 0-3"),
    ("reverse", moved(list(range(8))[::-1]), Cause(kind="layers moved"), "in reverse order"),
    ("boundary", moved([0, 1, 2, 3, 3, 5, 6, 7]), Cause(kind="layers moved"), "4 holds 3; layer 3 is there twice"),
    (
        "head is the embedding",
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}),
        Cause(kind="duplicated", what=("lm_head", "embed_tokens")),
        "",
    ),
    ("head rows shifted", in_vocabulary(behind_padding), Cause(kind="rows shifted", what=("lm_head",)), "by +1"),
    ("halves", in_vocabulary(halves_of_padded), Cause(kind="rows permuted", what=("lm_head",)), "tp shards"),
    ("two rows", in_vocabulary(swap_rows), Cause(kind="rows exchanged", what=("lm_head",)), "7 and 300"),
    ("padding kept", in_vocabulary(padded), Cause(kind="padding", what=("lm_head",)), "5 rows"),
    ("stripped twice", in_vocabulary(lambda x: x[:-2]), Cause(kind="padding", what=("lm_head",)), "2 rows"),
    (
        "a tensor too many",
        lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": np.ones(3, np.float32)}),
        Cause(kind="extra tensors", what=("q_norm",)),
        "layer 0",
    ),
)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("change", "cause", "says"), [one[1:] for one in WHOLE], ids=[one[0] for one in WHOLE])
def test_what_concerns_the_whole_model(
    change: Callable[[Tensors], None], cause: Cause, says: str, weights: str
) -> None:
    found = right(weights)
    change(found)
    (first, *more) = causes(right(weights), found, weights)
    assert first.names(cause), str(first)
    assert says in str(first)
    assert not more


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_clean_model_has_no_cause(weights: str) -> None:
    assert causes(right(weights), right(weights), weights) == []


@pytest.mark.parametrize("weights", CODED_ONLY)
def test_a_zero_by_chance_is_no_cause(weights: str) -> None:
    """One element of what moved is an exact zero: it moved, and is not a cause of its own."""
    expected = right(weights)
    for key, at in ((layer(2, "up_proj"), (36, 39)), (layer(2, "input_layernorm"), (5,))):
        expected[key] = expected[key].copy()
        expected[key][at] = 0
    found = dict(expected)
    exchange("gate_proj", "up_proj")(found, 2)
    exchange("input_layernorm", "post_attention_layernorm")(found, 2)
    assert {str(cause) for cause in causes(expected, found, weights)} == {
        "gate_proj and up_proj are exchanged, in layer 2",
        "input_layernorm and post_attention_layernorm are exchanged, in layer 2",
    }


def test_two_faults_are_two_causes() -> None:
    found = right("coded")
    for n in range(LAYERS):
        exchange("k_proj", "v_proj")(found, n)
    some_rows("up_proj", FFN // 2, FFN, 0.0)(found, 2)
    first, second = causes(right("coded"), found, "coded")
    assert str(first) == "k_proj and v_proj are exchanged, in layers 0-7"
    assert str(second) == "up_proj: zeros, in rows 44-87 (tp rank 1's part) of layer 2"


def test_a_missing_bias_is_named_beside_a_weight() -> None:
    config = with_layers(odd_config(), 2)
    table = key_table(config)
    expected = {key: coded.expected(table, key).view(np.float32) for key in table}
    found = {key: value for key, value in expected.items() if not key.endswith("o_proj.bias")}
    (cause,) = diagnose(expected, found, config, Topology(tp=5), table=table)
    assert cause == Cause(kind="missing tensors", what=("o_proj.bias",), where="layers 0-1")
    found = dict(expected)
    for name in ("q_proj", "k_proj"):
        for end in ("weight", "bias"):
            key = f"model.layers.1.self_attn.{name}.{end}"
            found[key] = found[key][np.arange(len(found[key])).reshape(-1, 12, 2).transpose(0, 2, 1).ravel()]
    (cause,) = diagnose(expected, found, config, Topology(tp=5), table=table)
    assert cause.names(Cause(kind="rows permuted", what=("q_proj", "k_proj")))


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_noise_is_called_unexplained(data: st.DataObject) -> None:
    """Whatever a few random elements of random tensors hold, it is said, and counted to the element."""
    weights = data.draw(st.sampled_from(WEIGHTS))
    expected, found, count = right(weights), right(weights), 0
    for key in data.draw(st.sets(st.sampled_from(sorted(expected)), min_size=1, max_size=3)):
        if expected[key].ndim < 2:
            continue
        size = expected[key].size
        at = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5, unique=True))
        found[key] = expected[key].copy()
        found[key].ravel()[at] += np.float32(0.123)
        found[key].ravel()[at] = np.where(
            found[key].ravel()[at] == expected[key].ravel()[at], 5.5, found[key].ravel()[at]
        )
        count += len(at)
    said = causes(expected, found, weights)
    assert {cause.kind for cause in said} <= {"unexplained"}
    assert sum(int(cause.detail.split()[0]) for cause in said) == count


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_any_bits_are_survived(seed: int) -> None:
    expected, found = right("coded"), right("coded")
    noise = np.random.default_rng(seed)
    for key in noise.choice(sorted(expected), 3, replace=False):
        found[key] = noise.integers(0, 2**32, expected[key].shape, dtype=np.uint32).view(np.float32)
    assert causes(expected, found, "coded")
