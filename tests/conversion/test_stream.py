"""The engine between files of any boxes: the bits of the copy kernel, whichever way they go, however they are cut."""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import boxed_files
import pytest
import torch
import xxhash
from boxed_files import BoxedFiles

from converters.errors import CheckpointError, ConversionError, PlanError
from converters.execute import bits, dtype_of, info_of, run
from converters.files import gather
from converters.files.extents import Chunk, FolderLayout
from converters.files.stream import Written, stream
from converters.models import family_of
from converters.plan import Plan
from converters.sources import read_config
from converters.tensors import TensorInfo
from converters.topology import Mesh, Topology
from parity.tiny import odd_config, with_layers

SIZES = {
    "vocab_size": 51,
    "hidden_size": 20,
    "intermediate_size": 38,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
ODD = with_layers(odd_config(), 3) | SIZES
TIED = with_layers(read_config("meta-llama/Llama-3.2-1B"), 2) | SIZES
FLOAT8 = ["float8_e5m2", "float8_e4m3fn", "float8_e5m2fnuz", "float8_e4m3fnuz", "float8_e8m0fnu"]
Tensors = dict[str, torch.Tensor]


class Held:
    """Tensors in memory as a store."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.held = dict(tensors)

    def tensors(self) -> Mapping[str, TensorInfo]:
        return {key: info_of(tensor) for key, tensor in self.held.items()}

    def tensor(self, key: str) -> torch.Tensor:
        return self.held[key]


def weights(plan: Plan, dtype: str = "bfloat16", seed: int = 0) -> Tensors:
    """What `plan` reads: numbers everywhere but where it must find constants, second copies equal to the first."""
    generator = torch.Generator().manual_seed(seed)
    out = {
        key: torch.randn(shape, generator=generator).to(dtype_of(dtype)) for key, shape in plan.source_tensors.items()
    }
    for part in plan.constants:
        out[part.region.key].as_strided(part.shape, part.region.strides, part.region.offset).fill_(part.value)
    if "lm_head.weight" in plan.tied | {copy.source.key for copy in plan.copies if copy.kind == "verify"}:
        out["lm_head.weight"] = out["model.embed_tokens.weight"].clone()
    return out


def expected(plan: Plan, source: Tensors, dtype: str = "bfloat16", cast: bool = False) -> Tensors:
    """What the copy kernel makes of it."""
    into = Held({key: torch.zeros(shape, dtype=dtype_of(dtype)) for key, shape in plan.target_tensors.items()})
    run(plan, Held(source), into, cast=cast)
    return into.held


def targets(plan: Plan, dtype: str = "bfloat16") -> dict[str, TensorInfo]:
    return {key: TensorInfo(shape, dtype) for key, shape in plan.target_tensors.items()}


def written(
    parts: list[tuple[Plan, BoxedFiles]], layout: FolderLayout, folder: Path, **options: Any
) -> tuple[Tensors, list[Written]]:
    boxed_files.prepare(folder, layout)
    done = list(stream(parts, layout.chunks, folder, **options))
    return boxed_files.load(boxed_files.opened(folder, layout)), done


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(torch.equal(bits(left[key]), bits(right[key])) for key in left)


@pytest.fixture(params=["whole blocks", "tiny blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Tensors of this size fit into a block; tiny blocks cut them, and runs, many times."""
    if request.param == "tiny blocks":
        monkeypatch.setattr(gather, "BLOCK", 192)
        monkeypatch.setattr(gather, "LONG", 32)
    return str(request.param)


WAYS = [
    ("hf", "megatron_dist"),
    ("megatron_dist", "hf"),
    ("hf", "megatron"),
    ("megatron", "megatron_dist"),
    ("megatron_dist", "megatron_dist"),
    ("hf", "hf"),
    ("te", "megatron_dist"),
]


@pytest.mark.parametrize(("source", "target"), WAYS)
@pytest.mark.parametrize("config", [ODD, TIED], ids=["odd", "tied"])
@pytest.mark.parametrize("cuts", [0, 5])
def test_files_hold_what_the_copy_kernel_makes(
    source: str, target: str, config: dict[str, Any], cuts: int, tmp_path: Path, blocks: str
) -> None:
    plan = family_of(config).plan(source, target, config, padded_vocab_size=config["vocab_size"] + 3)
    held = weights(plan)
    files = boxed_files.save(tmp_path / "source", held, cuts=cuts, seed=1, gap=3)
    layout = boxed_files.lay_out(targets(plan), cuts=cuts, seed=2, gap=5)
    found, done = written([(plan, files)], layout, tmp_path / "target")
    assert same(found, expected(plan, held))
    assert len(done) == len(layout.chunks)
    assert {(one.key, one.file, one.offset) for one in done} == {
        (chunk.key, chunk.extent.file, chunk.extent.offset) for chunk in layout.chunks
    }
    for one in done:
        data = (tmp_path / "target" / one.file).read_bytes()
        chunk = data[one.offset : one.offset + one.nbytes]
        assert one.crc32 == zlib.crc32(chunk)
        assert one.digest == xxhash.xxh3_128(chunk).hexdigest()
        assert data[one.offset + one.nbytes :][:16] == b"%016x" % one.crc32
        assert one.nonfinite == 0


@pytest.mark.parametrize("workers", [1, 3])
def test_nothing_but_the_chunks_and_their_seals_is_written(workers: int, tmp_path: Path, blocks: str) -> None:
    plan = family_of(ODD).plan("hf", "megatron_dist", ODD)
    files = boxed_files.save(tmp_path / "source", weights(plan))
    layout = boxed_files.lay_out(targets(plan), cuts=4, gap=7)
    some = layout.chunks[::2]
    boxed_files.prepare(tmp_path / "target", layout)
    told: list[int] = []
    done = list(stream([(plan, files)], some, tmp_path / "target", workers=workers, report=told.append))
    assert sum(told) == sum(one.nbytes for one in done)
    for file, size in layout.sizes.items():
        free = bytearray(b"\xa5" * size)
        data = bytearray((tmp_path / "target" / file).read_bytes())
        for one in done:
            if one.file == file:
                end = one.offset + one.nbytes + 16
                data[one.offset : end] = free[one.offset : end]
        assert data == free


def test_rank_files_with_replicas_make_whole_tensors(tmp_path: Path, blocks: str) -> None:
    whole = family_of(ODD).plan("hf", "hf", ODD)
    held = weights(whole)
    topology = Topology(tp=2)
    parts, shards = [], []
    for number, coord in enumerate(topology.shards()):
        mesh = Mesh(topology, coord)
        cut = family_of(ODD).plan("hf", "megatron_local", ODD, padded_vocab_size=ODD["vocab_size"] + 1)
        cut = cut.restrict(target=mesh)
        shards.append(expected(cut, held))
        files = boxed_files.save(tmp_path / f"rank{number}", shards[-1], cuts=3, seed=number)
        parts.append((cut.inverse(), files))
    layout = boxed_files.lay_out(targets(whole), cuts=2)
    found, _ = written(parts, layout, tmp_path / "target")
    assert same(found, held)
    name = "decoder.final_layernorm.weight"
    shards[1][name][2] += 1
    changed = boxed_files.save(tmp_path / "changed", shards[1], cuts=3, seed=1)
    with pytest.raises(CheckpointError, match=rf"{name}.* differs from it \(1 elements; final norm\)"):
        written([parts[0], (parts[1][0], changed)], layout, tmp_path / "again")


@pytest.mark.parametrize(("held", "asked"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float64", "float16")])
def test_casts_round_as_torch_does_and_only_on_request(held: str, asked: str, tmp_path: Path, blocks: str) -> None:
    plan = family_of(ODD).plan("hf", "megatron_dist", ODD)
    tensors = weights(plan, held)
    next(iter(tensors.values())).view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e38])
    files = boxed_files.save(tmp_path / "source", tensors, cuts=2)
    layout = boxed_files.lay_out(targets(plan, asked), cuts=2)
    with pytest.raises(CheckpointError, match=f"{held} -> {asked}: dtypes differ, and a cast must be asked for"):
        written([(plan, files)], layout, tmp_path / "refused")
    found, done = written([(plan, files)], layout, tmp_path / "target", cast=True)
    assert same(found, expected(plan, tensors, asked, cast=True))
    assert sum(one.nonfinite for one in done) == sum(int((~tensor.isfinite()).sum()) for tensor in found.values())
    assert sum(one.overflowed for one in done) == (asked == "float16"), "of the four, 1e38 alone is too large for it"


def test_integers_are_never_rounded(tmp_path: Path) -> None:
    plan = family_of(ODD).plan("hf", "megatron_dist", ODD)
    tensors = {key: torch.zeros(shape, dtype=torch.int8) for key, shape in plan.source_tensors.items()}
    files = boxed_files.save(tmp_path / "source", tensors)
    layout = boxed_files.lay_out(targets(plan))
    with pytest.raises(CheckpointError, match="integers are no numbers to round"):
        written([(plan, files)], layout, tmp_path / "target", cast=True)


@pytest.mark.parametrize("cuts", [0, 2])
def test_norms_centred_on_zero_are_shifted_as_the_copy_kernel_shifts(cuts: int, tmp_path: Path, blocks: str) -> None:
    features = frozenset({"layernorm_zero_centered_gamma"})
    plan = family_of(ODD).plan("hf", "megatron_dist", ODD, features=features)
    held = weights(plan)
    files = boxed_files.save(tmp_path / "source", held, cuts=cuts)
    found, _ = written([(plan, files)], boxed_files.lay_out(targets(plan), cuts=cuts), tmp_path / "target")
    assert same(found, expected(plan, held))
    assert not same(found, expected(family_of(ODD).plan("hf", "megatron_dist", ODD), held))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", *FLOAT8, "int16"])
def test_numbers_that_are_none_are_kept_and_counted(dtype: str, tmp_path: Path, blocks: str) -> None:
    plan = family_of(ODD).plan("hf", "megatron_dist", ODD)
    generator = torch.Generator().manual_seed(0)
    size = torch.empty((), dtype=dtype_of(dtype)).element_size()
    held = {
        key: torch.randint(0, 256, (*shape[:-1], shape[-1] * size), generator=generator)
        .to(torch.uint8)
        .view(dtype_of(dtype))
        for key, shape in plan.source_tensors.items()
    }
    files = boxed_files.save(tmp_path / "source", held, cuts=3)
    found, done = written([(plan, files)], boxed_files.lay_out(targets(plan, dtype), cuts=3), tmp_path / "target")
    wrong = sum(int((~tensor.to(torch.float64).isfinite()).sum()) for tensor in found.values())
    assert sum(one.nonfinite for one in done) == wrong
    assert (wrong == 0) == (dtype == "int16")


@pytest.mark.parametrize("cuts", [0, 3])
def test_second_copies_must_be_equal_and_all_that_are_not_are_named(cuts: int, tmp_path: Path, blocks: str) -> None:
    plan = family_of(TIED).plan("hf", "megatron_dist", TIED, features=frozenset({"stored_lm_head"}))
    held = weights(plan)
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    layout = boxed_files.lay_out(targets(plan))
    good = boxed_files.save(tmp_path / "good", held, cuts=cuts)
    written([(plan, good)], layout, tmp_path / "target")
    held["lm_head.weight"][3, 1] += 1
    held["lm_head.weight"][-1, -1] += 1
    bad = boxed_files.save(tmp_path / "bad", held, cuts=cuts)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is a second copy of .*\(2 elements; stored copy"):
        written([(plan, bad)], layout, tmp_path / "again")


def test_constants_are_checked_before_anything_is_written(tmp_path: Path, blocks: str) -> None:
    plan = family_of(ODD).plan("megatron_dist", "hf", ODD, padded_vocab_size=ODD["vocab_size"] + 5)
    held = weights(plan)
    held["output_layer.weight"][-2, 1:3] = 1
    held["embedding.word_embeddings.weight"][-1, 0] = 1
    files = boxed_files.save(tmp_path / "source", held, cuts=4)
    layout = boxed_files.lay_out(targets(plan))
    boxed_files.prepare(tmp_path / "target", layout)
    with pytest.raises(CheckpointError) as caught:
        list(stream([(plan, files)], layout.chunks, tmp_path / "target"))
    assert "output_layer.weight: 2 of " in str(caught.value)
    assert "embedding.word_embeddings.weight: 1 of " in str(caught.value)
    assert all(set((tmp_path / "target" / file).read_bytes()) == {0xA5} for file in layout.sizes)


def test_what_no_plan_makes_is_an_error(tmp_path: Path) -> None:
    plan = family_of(ODD).plan("hf", "megatron_dist", ODD)
    files = boxed_files.save(tmp_path / "source", weights(plan))
    half = replace(plan)
    half.__dict__["copies"] = plan.copies[1:]
    layout = boxed_files.lay_out(targets(plan))
    with pytest.raises(PlanError, match="the plans make"):
        written([(half, files)], layout, tmp_path / "target")


def test_missing_source_tensors_are_all_named(tmp_path: Path) -> None:
    plan = family_of(ODD).plan("hf", "megatron_dist", ODD)
    held = weights(plan)
    del held["model.norm.weight"], held["lm_head.weight"]
    files = boxed_files.save(tmp_path / "source", held)
    with pytest.raises(CheckpointError, match=r"(?s)lm_head.weight.*model.norm.weight"):
        written([(plan, files)], boxed_files.lay_out(targets(plan)), tmp_path / "target")


def test_an_error_of_a_worker_ends_all_of_them(tmp_path: Path) -> None:
    plan = family_of(ODD).plan("hf", "megatron_dist", ODD)
    files = boxed_files.save(tmp_path / "source", weights(plan))
    layout = boxed_files.lay_out(targets(plan), cuts=3)
    boxed_files.prepare(tmp_path / "target", layout)
    (tmp_path / "target" / "two.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"two\.bin"):
        list(stream([(plan, files)], layout.chunks, tmp_path / "target"))


@pytest.mark.parametrize("workers", [0, -1])
def test_without_workers_nothing_is_said_to_be_done(workers: int, tmp_path: Path) -> None:
    plan = family_of(ODD).plan("hf", "megatron_dist", ODD)
    files = boxed_files.save(tmp_path / "source", weights(plan))
    with pytest.raises(ConversionError, match=f"workers={workers}: expected 1 or more"):
        written([(plan, files)], boxed_files.lay_out(targets(plan)), tmp_path / "target", workers=workers)


def test_one_who_stops_listening_ends_the_workers(tmp_path: Path) -> None:
    import threading

    plan = family_of(ODD).plan("hf", "megatron_dist", ODD)
    files = boxed_files.save(tmp_path / "source", weights(plan))
    layout = boxed_files.lay_out(targets(plan), cuts=20)
    boxed_files.prepare(tmp_path / "target", layout)
    running = stream([(plan, files)], layout.chunks, tmp_path / "target")
    next(running)
    running.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("converter")]


def test_the_order_of_chunks_does_not_matter(tmp_path: Path) -> None:
    plan = family_of(ODD).plan("megatron_dist", "hf", ODD)
    files = boxed_files.save(tmp_path / "source", weights(plan), cuts=4)
    layout = boxed_files.lay_out(targets(plan), cuts=4)
    found, done = written([(plan, files)], layout, tmp_path / "one")
    mixed: list[Chunk] = random.Random(0).sample(list(layout.chunks), len(layout.chunks))
    again, redone = written([(plan, files)], replace(layout, chunks=mixed), tmp_path / "other")
    assert same(found, again)
    assert sorted(done, key=str) == sorted(redone, key=str)
