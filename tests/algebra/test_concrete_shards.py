"""What a rank holds, against slices and concatenations of whole arrays written by hand."""

from __future__ import annotations

import numpy as np
import pytest
from index_arrays import Array, Tensors, coded, convert, run, same
from test_llama_proofs import groups, plan

from converters.table import Table, rule
from converters.topology import Topology

Q, K, V = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv")
DECODER = "decoder.layers.1."


def sharded(tp: int, *features: str) -> tuple[Tensors, list[Tensors]]:
    mesh = Topology(tp=tp)
    there = plan("hf", "megatron", features, **groups(mesh))
    whole = coded(there.source_tensors)
    return whole, list(convert(there, {None: whole}, target=mesh).values())


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_column_row_and_gated_cuts(tp: int) -> None:
    whole, ranks = sharded(tp)
    for rank, held in enumerate(ranks):
        cut = slice(rank * 24 // tp, (rank + 1) * 24 // tp)
        gate, up, down = (whole[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        assert np.array_equal(held[DECODER + "mlp.linear_fc1.weight"], np.concatenate([gate[cut], up[cut]]))
        assert np.array_equal(held[DECODER + "mlp.linear_fc2.weight"], down[:, cut])
        heads = slice(rank * 48 // tp, (rank + 1) * 48 // tp)
        proj = whole["model.layers.1.self_attn.o_proj.weight"]
        assert np.array_equal(held[DECODER + "self_attention.linear_proj.weight"], proj[:, heads])
        assert np.array_equal(held["decoder.final_layernorm.weight"], whole["model.norm.weight"])


def merged(whole: Tensors) -> Array:
    """For each of two groups its four query heads, its key head, its value head; six rows a head."""
    parts = []
    for group in range(2):
        parts += [whole[Q][group * 24 : group * 24 + 24], whole[K][group * 6 : group * 6 + 6]]
        parts += [whole[V][group * 6 : group * 6 + 6]]
    return np.concatenate(parts)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_merged_qkv_is_cut_by_rows_even_through_a_group(tp: int) -> None:
    whole, ranks = sharded(tp)
    pieces = np.split(merged(whole), tp)
    assert all(
        np.array_equal(held[DECODER + "self_attention.linear_qkv.weight"], piece)
        for held, piece in zip(ranks, pieces, strict=True)
    )


def test_merged_qkv_with_a_ghost_group() -> None:
    whole, ranks = sharded(3)
    padded = np.concatenate([merged(whole), np.zeros((36, 10), int)])
    for held, piece in zip(ranks, np.split(padded, 3), strict=True):
        assert np.array_equal(held[DECODER + "self_attention.linear_qkv.weight"], piece)
    assert not ranks[2][DECODER + "self_attention.linear_proj.weight"].any()


def test_the_vocabulary_is_padded_on_the_last_rank() -> None:
    whole, ranks = sharded(4)
    padded = np.concatenate([whole["model.embed_tokens.weight"], np.zeros((3, 10), int)])
    for held, piece in zip(ranks, np.split(padded, 4), strict=True):
        assert np.array_equal(held["embedding.word_embeddings.weight"], piece)


def test_the_layers_of_interleaved_stages() -> None:
    mesh = Topology(pp=2, vpp=2)
    there = plan("hf", "megatron")
    whole = coded(there.source_tensors)
    held = {(c.pp, c.chunk): tensors for c, tensors in convert(there, {None: whole}, target=mesh).items() if c}
    for layer, place in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):  # each chunk counts its layers from 0
        moved = held[place]["decoder.layers.0.mlp.linear_fc2.weight"]
        assert np.array_equal(moved, whole[f"model.layers.{layer}.mlp.down_proj.weight"])
        assert not any(key.startswith("decoder.layers.1.") for key in held[place])
    assert [at for at, tensors in held.items() if "embedding.word_embeddings.weight" in tensors] == [(0, 0)]
    assert [at for at, tensors in held.items() if "output_layer.weight" in tensors] == [(1, 1)]


EXPERTS = Table(
    family="experts",
    columns={"hf": None, "megatron": None, "stacked": None},
    sizes={name: name for name in ("layer", "expert", "f", "h")},
    branches=("gate", "up"),
    rules=(
        rule(
            "fc1",
            hf=("l.{layer}.e.{expert}.gate: (gate f) h", "l.{layer}.e.{expert}.up: (up f) h"),
            megatron="d.{layer/pp}.fc1.{expert/ep}: ([gate up] f/etp) h",
            stacked="fc1: layer expert ([gate up] f) h",
        ),
        rule(
            "fc2",
            hf="l.{layer}.e.{expert}.down: h f",
            megatron="d.{layer/pp}.fc2.{expert/ep}: h f/etp",
            stacked="fc2: layer expert (f h)",
        ),
        rule("router", hf="l.{layer}.r: expert h", megatron="d.{layer/pp}.r: expert h", stacked="r: layer expert h"),
    ),
)
MESHES = (Topology(tp=4, ep=2, etp=2), Topology(tp=2, cp=2, dp=2, ep=4, etp=1, pp=2), Topology(dp=4, ep=2, etp=2))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_experts_under_expert_and_expert_tensor_parallelism(mesh: Topology) -> None:
    sizes = {**{"layer": 2, "expert": 4, "f": 6, "h": 5}, "gate": 1, "up": 1}
    there = EXPERTS.plan("hf", "megatron", sizes=sizes, features=frozenset())
    there.prove(target=mesh).check()
    there.inverse().prove(source=mesh).check()
    whole = coded(there.source_tensors)
    held = convert(there, {None: whole}, target=mesh)
    rows, experts, layers = 6 // mesh.expert_tp, 4 // mesh.ep, 2 // mesh.pp
    for coord, tensors in held.items():
        assert coord is not None
        cut = slice(coord.etp * rows, (coord.etp + 1) * rows)
        for layer, expert in np.ndindex(layers, experts):  # keys count from 0 on every rank
            first = f"l.{coord.pp * layers + layer}.e.{coord.ep * experts + expert}"
            gate, up = (whole[f"{first}.{name}"][cut] for name in ("gate", "up"))
            assert np.array_equal(tensors[f"d.{layer}.fc1.{expert}"], np.concatenate([gate, up]))
            assert np.array_equal(tensors[f"d.{layer}.fc2.{expert}"], whole[f"{first}.down"][:, cut])
        assert len(tensors) == layers * (2 * experts + 1)
    assert same(convert(there.inverse(), held, source=mesh)[None], whole)


def test_stacked_experts_are_a_stack() -> None:
    sizes = {**{"layer": 2, "expert": 3, "f": 4, "h": 5}, "gate": 1, "up": 1}
    there = EXPERTS.plan("hf", "stacked", sizes=sizes, features=frozenset())
    whole = coded(there.source_tensors)
    stack = [[whole[f"l.{layer}.e.{expert}.down"].T.reshape(-1) for expert in range(3)] for layer in range(2)]
    assert np.array_equal(run(there, whole)["fc2"], np.array(stack))


def test_composite_keys_and_sums_in_keys() -> None:
    table = Table(
        family="keys",
        columns={"a": None, "b": None},
        sizes={name: name for name in ("p", "v", "i", "n")},
        branches=("x", "y"),
        rules=(rule("w", a=("x.{v p i}: (x n)", "y.{v p i}: (y n)"), b="stage.{p}.chunk.{v}.{i}.{[x y]}: n"),),
    )
    there = table.plan("a", "b", sizes={"p": 2, "v": 3, "i": 4, "n": 5, "x": 1, "y": 1}, features=frozenset())
    there.prove().check()
    whole = coded(there.source_tensors)
    moved = run(there, whole)
    for p, v, i in np.ndindex(2, 3, 4):
        number = (v * 2 + p) * 4 + i
        assert np.array_equal(moved[f"stage.{p}.chunk.{v}.{i}.0"], whole[f"x.{number}"])
        assert np.array_equal(moved[f"stage.{p}.chunk.{v}.{i}.1"], whole[f"y.{number}"])
    assert len(moved) == len(whole) == 48
    assert there.origin("stage.1.chunk.2.3.1", 4) == ("y.23", 4)
