"""Comparing files through plans: every difference is found, counted and placed, and none of them ends the search."""

from __future__ import annotations

from pathlib import Path

import boxed_files
import numpy as np
import pytest
import torch
from test_stream import ODD, TIED, blocks, expected, weights  # noqa: F401 (a fixture)

from converters.errors import CheckpointError
from converters.files.compare import Comparison, Element, compare, number
from converters.files.extents import TensorFiles
from converters.files.gather import Part
from converters.models import family_of

PLAN = family_of(ODD).plan("hf", "megatron_dist", ODD, padded_vocab_size=ODD["vocab_size"] + 3)
FC2 = "decoder.layers.mlp.linear_fc2.weight"
QKV = "decoder.layers.self_attention.linear_qkv.weight"


def found(parts: list[Part], other: TensorFiles, **options: int) -> dict[str, Comparison]:
    return {one.key: one for one in compare(parts, other, **options)}  # type: ignore[arg-type]


@pytest.fixture
def source(tmp_path: Path) -> Part:
    return PLAN, boxed_files.save(tmp_path / "source", weights(PLAN), cuts=3, seed=1)


@pytest.mark.parametrize("cuts", [0, 6])
def test_equal_checkpoints_are_equal(source: Part, cuts: int, tmp_path: Path, blocks: str) -> None:  # noqa: F811
    other = boxed_files.save(tmp_path / "other", expected(PLAN, weights(PLAN)), cuts=cuts)
    told: list[int] = []
    compared = list(compare([source], other, report=told.append))
    assert all(one.equal for one in compared)
    assert {one.key: one.elements for one in compared} == {key: info.elements for key, info in other.tensors().items()}
    assert sum(told) == sum(info.nbytes for info in other.tensors().values())


def element(made: torch.Tensor, found: torch.Tensor, at: tuple[int, ...]) -> Element:
    raw = (int(tensor[at].view(torch.int16)) & 0xFFFF for tensor in (made, found))
    return Element(index=at, made=float(made[at]), found=float(found[at]), bits=(next(raw), next(raw)))


@pytest.mark.parametrize("cuts", [0, 6])
def test_all_differences_are_counted_and_the_first_are_shown(
    source: Part,
    cuts: int,
    tmp_path: Path,
    blocks: str,  # noqa: F811
) -> None:
    tensors = expected(PLAN, weights(PLAN))
    right = {key: tensor.clone() for key, tensor in tensors.items()}
    places = [(0, 3, 7), (0, 19, 37), (1, 0, 0), (2, 11, 5), (2, 19, 37)]
    for at in places:
        tensors[FC2][at] += 1
    tensors[QKV][2] = float("nan")
    tensors["decoder.final_layernorm.weight"][-1] = -tensors["decoder.final_layernorm.weight"][-1]
    other = boxed_files.save(tmp_path / "other", tensors, cuts=cuts)
    compared = found([source], other, show=3)
    assert {key for key, one in compared.items() if not one.equal} == {FC2, QKV, "decoder.final_layernorm.weight"}
    assert compared[FC2].differing == 5
    assert compared[FC2].first == tuple(element(right[FC2], tensors[FC2], at) for at in places[:3])
    assert compared[QKV].differing == tensors[QKV][2].numel()
    assert compared[QKV].nonfinite == (0, tensors[QKV][2].numel())
    assert compared["decoder.final_layernorm.weight"].differing == 1


def test_equal_nans_are_equal_and_both_zeros_are_not(tmp_path: Path) -> None:
    tensors = weights(PLAN)
    tensors["model.norm.weight"][0] = float("nan")
    tensors["model.norm.weight"][1] = 0.0
    files = boxed_files.save(tmp_path / "source", tensors)
    made = expected(PLAN, tensors)
    made["decoder.final_layernorm.weight"][1] = -0.0
    compared = found([(PLAN, files)], boxed_files.save(tmp_path / "other", made))
    norm = compared["decoder.final_layernorm.weight"]
    assert norm.differing == 1
    assert norm.nonfinite == (1, 1)
    assert norm.first[0].index == (1,)


def test_what_one_side_lacks_and_other_shapes_and_dtypes_are_findings(source: Part, tmp_path: Path) -> None:
    tensors = expected(PLAN, weights(PLAN))
    tensors["more.weight"] = torch.zeros(3)
    del tensors[QKV]
    tensors[FC2] = tensors[FC2][:2]
    tensors["decoder.final_layernorm.weight"] = tensors["decoder.final_layernorm.weight"].float()
    tensors["output_layer.weight"] = torch.zeros(tensors["output_layer.weight"].shape, dtype=torch.int16)
    compared = found([source], boxed_files.save(tmp_path / "other", tensors))
    faults = {key: one.faults for key, one in compared.items() if not one.equal}
    assert faults == {
        "more.weight": ("only the other checkpoint has it",),
        QKV: ("the other checkpoint lacks it",),
        FC2: (f"shape {[3, *tensors[FC2].shape[1:]]}, in the other checkpoint {list(tensors[FC2].shape)}",),
        "decoder.final_layernorm.weight": ("bfloat16, in the other checkpoint float32",),
        "output_layer.weight": ("bfloat16, in the other checkpoint int16",),
    }
    assert compared["decoder.final_layernorm.weight"].elements == ODD["hidden_size"]
    assert compared["decoder.final_layernorm.weight"].differing == 0
    assert compared["output_layer.weight"].elements == 0


def test_constants_and_second_copies_of_the_source_are_findings(tmp_path: Path) -> None:
    plan = family_of(ODD).plan("megatron_dist", "hf", ODD, padded_vocab_size=ODD["vocab_size"] + 5)
    held = weights(plan)
    made = boxed_files.save(tmp_path / "made", expected(plan, held))
    held["output_layer.weight"][-1, 0] = 1
    compared = found([(plan, boxed_files.save(tmp_path / "padded", held, cuts=3))], made)
    assert [key for key, one in compared.items() if not one.equal] == ["output_layer.weight"]
    assert "1 of" in compared["output_layer.weight"].faults[0]

    plan = family_of(TIED).plan("hf", "megatron_dist", TIED, features=frozenset({"stored_lm_head"}))
    held = weights(plan)
    made = boxed_files.save(tmp_path / "tied", expected(plan, held))
    held["lm_head.weight"][0, 0] += 1
    compared = found([(plan, boxed_files.save(tmp_path / "untied", held, cuts=3))], made)
    assert [key for key, one in compared.items() if not one.equal] == ["embedding.word_embeddings.weight"]
    assert "lm_head.weight is a second copy" in compared["embedding.word_embeddings.weight"].faults[0]


def test_a_sample_looks_at_both_ends_of_every_box(source: Part, tmp_path: Path) -> None:
    tensors = expected(PLAN, weights(PLAN))
    tensors[FC2][0, 0, 0] += 1
    tensors[FC2][-1, -1, -1] += 1
    other = boxed_files.save(tmp_path / "other", tensors)
    compared = found([source], other, sample=400)
    assert compared[FC2].differing == 2
    looked = sum(one.elements for one in compared.values())
    assert looked < sum(info.elements for info in other.tensors().values()) / 2
    assert all(one.elements for one in compared.values())


def test_a_source_without_its_tensors_cannot_be_compared(source: Part, tmp_path: Path) -> None:
    held = weights(PLAN)
    del held["model.norm.weight"]
    files = boxed_files.save(tmp_path / "less", held)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        list(compare([(PLAN, files)], source[1]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "int8", "int64"])
def test_values_are_shown_as_numbers(dtype: str) -> None:
    value = torch.tensor([-3], dtype=getattr(torch, dtype))
    bits = value.view(torch.uint8).numpy().view(f"u{value.element_size()}")
    assert number(np.asarray(bits), dtype) == -3
