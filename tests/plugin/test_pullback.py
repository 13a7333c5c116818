"""Wrong elements of ranks' shards, back in the tensors of the checkpoint: each at its place, and nothing beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from converters.topology import Topology
from parity.causes import Cause
from parity.diagnosis.pullback import HEAD, Numbers, Pullback
from parity.diagnosis.verdicts import Trace
from parity.seeded import key_table
from parity.statement.live import Chunk
from parity.statement.weights import expected_shard
from parity.tiny import odd_config, with_layers

CONFIG: dict[str, Any] = with_layers(odd_config(), 2) | {"tie_word_embeddings": False}
TIED: dict[str, Any] = CONFIG | {"tie_word_embeddings": True}
TP = Topology(tp=5)
PP = Topology(pp=2)
QKV, FC1, HEAD_SHARD = (
    "decoder.layers.1.self_attention.linear_qkv.weight",
    "decoder.layers.1.mlp.linear_fc1.weight",
    "output_layer.weight",
)
UP = "model.layers.1.mlp.up_proj.weight"

Held = dict[str, torch.Tensor]


@cache
def _drawn(tied: bool) -> Held:
    config, generator = TIED if tied else CONFIG, torch.Generator().manual_seed(5)
    return {key: torch.randn(*shape, generator=generator) for key, shape in key_table(config).items()}


def source(config: dict[str, Any]) -> Held:
    return dict(_drawn(config["tie_word_embeddings"]))


def pulled(
    change: Callable[[Held, Any], Any], at: Path, config: dict[str, Any] = CONFIG, topology: Topology = TP
) -> tuple[Pullback, list[Trace]]:
    """What is kept of all ranks' shards once `change` had its way with each."""
    weights = source(config)
    back = Pullback.of(at, weights, config)
    back.create()
    traces: list[Trace] = []
    choices: dict[str, Any] = {"make_vocab_size_divisible_by": 7}
    for rank in range(topology.world_size):
        for place in topology.chunks_of(topology.coord(rank)):
            stated = expected_shard(weights, config, topology, place, **choices)
            held: Any = {name: tensor.clone() for name, tensor in stated.items()}
            change(held, place)
            chunk = Chunk(place=place, model=SimpleNamespace(), held=held, stated=stated, choices=choices)
            traces += back.keep(chunk, config, topology)
    return back, traces


def in_shard(name: str, tp: int, change: Callable[[torch.Tensor], Any]) -> Callable[[Held, Any], None]:
    def on(held: Held, place: Any) -> None:
        if name in held and place.tp == tp:
            change(held[name])

    return on


def test_elements_are_numbered_from_one() -> None:
    numbers = Numbers({"a": (2, 3), "b": (4,)})
    assert numbers["a"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert numbers["b"].tolist() == [7, 8, 9, 10]
    assert numbers.total == 10


def test_right_shards_leave_nothing(tmp_path: Path) -> None:
    back, traces = pulled(lambda held, place: None, tmp_path)
    assert (traces, back.changed()) == ([], {})
    assert back.causes(source(CONFIG), CONFIG, TP, is_coded=False) == []


def test_an_element_goes_back_to_its_place(tmp_path: Path) -> None:
    """Row 3 of the up half on tensor-parallel rank 2 is that row of the third fifth of up_proj."""
    ffn = CONFIG["intermediate_size"] // 5

    def change(tensor: torch.Tensor) -> None:
        tensor[ffn + 3, 4] = 17.0

    back, traces = pulled(in_shard(FC1, 2, change), tmp_path)
    assert traces == []
    ((key, (wrong, values)),) = back.changed().items()
    assert key == UP
    assert np.argwhere(wrong).tolist() == [[2 * ffn + 3, 4]]
    assert values[2 * ffn + 3, 4] == 17
    (cause,) = back.causes(source(CONFIG), CONFIG, TP, is_coded=False)
    assert cause.names(Cause(kind="unexplained", what=("up_proj",)))


def test_a_shard_of_zeros_is_named_over_ranks(tmp_path: Path) -> None:
    ffn = CONFIG["intermediate_size"] // 5
    back, _ = pulled(in_shard(FC1, 4, lambda tensor: tensor[ffn:].zero_()), tmp_path)
    (cause,) = back.causes(source(CONFIG), CONFIG, TP, is_coded=False)
    assert cause.names(Cause(kind="zeros", what=("up_proj",)))
    assert "(tp rank 4's part)" in cause.where


def test_not_a_number_is_wrong_as_well(tmp_path: Path) -> None:
    back, _ = pulled(in_shard("decoder.final_layernorm.weight", 0, lambda tensor: tensor.fill_(math.nan)), tmp_path)
    (cause,) = back.causes(source(CONFIG), CONFIG, TP, is_coded=False)
    assert cause.names(Cause(kind="not numbers", what=("norm",)))


def test_padding_has_no_place_in_the_checkpoint(tmp_path: Path) -> None:
    back, (trace,) = pulled(in_shard(HEAD_SHARD, 4, lambda tensor: tensor[-1].fill_(1)), tmp_path)
    assert (trace.kind, trace.keys, trace.elements) == ("padding", (HEAD,), CONFIG["hidden_size"])
    assert back.changed() == {}


@pytest.mark.parametrize(
    ("change", "kind", "keys"),
    [
        (lambda held: held.pop(FC1), "missing tensors", (UP.replace("up_", "gate_"), UP)),
        (lambda held: held.update(strange=torch.ones(3)), "extra tensors", ("strange",)),
        (lambda held: held.update({FC1: held[FC1][1:]}), "shape", (UP.replace("up_", "gate_"), UP)),
        (lambda held: held.update({FC1: held[FC1].half()}), "dtype", (UP.replace("up_", "gate_"), UP)),
    ],
    ids=["missing", "strange", "shape", "dtype"],
)
def test_what_has_no_elements_to_compare(
    change: Callable[[Held], Any], kind: str, keys: tuple[str, ...], tmp_path: Path
) -> None:
    def on(held: Held, place: Any) -> None:
        if place.tp == 1:
            change(held)

    back, (trace,) = pulled(on, tmp_path)
    assert (trace.kind, trace.keys) == (kind, keys)
    assert back.changed() == {}


def test_the_copy_of_a_tied_head_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    """The last stage's copy is wrong, the embedding of the first is right: only the head differs."""
    back, _ = pulled(lambda held, place: held.get(HEAD_SHARD, torch.empty(0)).zero_(), tmp_path, TIED, PP)
    assert list(back.changed()) == [HEAD]
    (cause,) = back.causes(source(TIED), TIED, PP, is_coded=False)
    assert cause.names(Cause(kind="zeros", what=("lm_head",)))


def test_exchanged_rows_are_told_from_all_ranks(tmp_path: Path) -> None:
    """Keys and values exchanged in every shard of one layer."""
    dim = CONFIG["head_dim"]

    def change(held: Held, place: Any) -> None:
        key, value = held[QKV][-2 * dim : -dim].clone(), held[QKV][-dim:].clone()
        held[QKV][-2 * dim : -dim], held[QKV][-dim:] = value, key

    back, _ = pulled(change, tmp_path)
    (cause,) = back.causes(source(CONFIG), CONFIG, TP, is_coded=False)
    assert cause.names(Cause(kind="keys exchanged", what=("k_proj", "v_proj")))
    assert cause.where == "layer 1"
