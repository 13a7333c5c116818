"""The copy kernel on real plans: exact bits, everything checked first, and declared bounds where values change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from converters.errors import CheckpointError
from converters.execute import bits, info_of, run
from converters.models import family_of
from converters.plan import Plan
from converters.sources import read_config
from converters.tensors import TensorInfo
from converters.topology import Coord, Mesh, Topology
from converters.values import Shift
from parity.seeded import key_table
from parity.statement.weights import expected_shard
from parity.tiny import odd_config, shrink, with_layers

ODD = with_layers(odd_config(), 2)
TIED = with_layers(shrink(read_config("meta-llama/Llama-3.2-1B")), 2)
LAST = "model.layers.1.mlp.down_proj.weight"


class Held:
    """Tensors in memory as a store."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.held = dict(tensors)

    def tensors(self) -> Mapping[str, TensorInfo]:
        return {key: info_of(tensor) for key, tensor in self.held.items()}

    def tensor(self, key: str) -> torch.Tensor:
        return self.held[key]


def weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Any bit pattern of float32, NaN of every payload and both zeros among them."""
    generator = torch.Generator().manual_seed(0)
    made = {
        key: torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32).view(torch.float32)
        for key, shape in key_table(config).items()
    }
    for tensor in made.values():
        payloads = torch.tensor([0x7FC00001, 0x7F800123, -0x7FFFFF, -(2**31), 0, 1], dtype=torch.int32)
        tensor.view(-1)[:6] = payloads.view(torch.float32)
    return made


def plan(config: dict[str, Any], place: Mesh | None = None, **options: Any) -> Plan:
    options.setdefault("padded_vocab_size", config["vocab_size"] + 1)
    return family_of(config).plan("hf", "megatron_local", config, **options).restrict(target=place)


def room(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> Held:
    return Held({key: torch.full(shape, float("nan"), dtype=dtype) for key, shape in shapes.items()})


def same(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype
        assert torch.equal(bits(actual[key]), bits(tensor)), key


@pytest.mark.parametrize("coord", [Coord(), Coord(tp=2), Coord(tp=1, pp=1)], ids=str)
@pytest.mark.parametrize("config", [ODD, TIED], ids=["odd", "tied"])
def test_every_bit_arrives(config: dict[str, Any], coord: Coord) -> None:
    """Against the independent statement, on one rank of six."""
    topology, groups = Topology(tp=3, pp=2), config["num_key_value_heads"]
    padded = topology.query_groups(groups, config["num_attention_heads"] // groups)
    if config["intermediate_size"] % 3:
        config = config | {"intermediate_size": 87}
    source = weights(config)
    vocab = -(-config["vocab_size"] // 3) * 3
    part = plan(config, Mesh(topology, coord), padded_vocab_size=vocab, padded_query_groups=padded)
    target = room(part.target_tensors)
    done = run(part, Held({key: source[key] for key in part.source_tensors}), target)
    same(target.held, expected_shard(source, config, topology, coord, padded_query_groups=padded))
    assert done.tensors == len(target.held)
    assert done.bytes == sum(t.numel() * 4 for t in target.held.values())
    assert done.casts == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_there_and_back(dtype: torch.dtype) -> None:
    source = {key: tensor.to(dtype) for key, tensor in weights(ODD).items()}
    forward = plan(ODD)
    middle, back = room(forward.target_tensors, dtype), room(forward.source_tensors, dtype)
    run(forward, Held(source), middle)
    run(forward.inverse(), middle, back)
    same(back.held, source)


def test_what_does_not_fit_is_listed_and_nothing_is_written() -> None:
    source = Held(weights(ODD))
    source.held["model.layers.1.mlp.downproj.weight"] = source.held.pop(LAST)
    source.held["lm_head.weight"] = source.held["lm_head.weight"][:, 1:]
    source.held["model.layers.2.mlp.up_proj.weight"] = torch.zeros(1)
    target = room(plan(ODD).target_tensors)
    with pytest.raises(CheckpointError) as raised:
        run(plan(ODD), source, target, where="the checkpoint")
    message = str(raised.value)
    assert message.startswith("the checkpoint does not hold what its config promises:")
    assert f"tensors missing (1):\n  {LAST} (did you mean 'model.layers.1.mlp.downproj.weight'" in message
    assert "tensors that nothing maps (2):" in message
    assert "tensors of another shape (1):\n  lm_head.weight: expected [509, 210], found [509, 209]" in message
    assert all(bool(tensor.isnan().all()) for tensor in target.held.values())


def test_a_target_that_does_not_fit() -> None:
    target = room(plan(ODD).target_tensors)
    del target.held["output_layer.weight"]
    with pytest.raises(CheckpointError, match=r"the target does not hold(?s:.*)missing(?s:.*)output_layer\.weight"):
        run(plan(ODD), Held(weights(ODD)), target)


def test_a_cast_is_refused_unless_asked_for() -> None:
    source = {key: torch.randn(shape) for key, shape in key_table(ODD).items()}
    target = room(plan(ODD).target_tensors, torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"a cast must be asked for(?s:.*)float32 -> bfloat16"):
        run(plan(ODD), Held(source), target)
    assert all(bool(tensor.isnan().all()) for tensor in target.held.values())
    done = run(plan(ODD), Held(source), target, cast=True)
    assert set(done.casts) == set(target.held)
    wide = room(plan(ODD).target_tensors)
    run(plan(ODD), Held(source), wide)
    same(target.held, {key: tensor.bfloat16() for key, tensor in wide.held.items()})
    for key, cast in done.casts.items():
        error = (target.held[key].float() - wide.held[key]).abs()
        assert (error <= cast.bound * wide.held[key].abs()).all()


def test_constants_are_written_forward_and_verified_backward() -> None:
    forward = plan(ODD, padded_query_groups=6)
    middle, back = room(forward.target_tensors), room(forward.source_tensors)
    run(forward, Held(weights(ODD)), middle)
    assert not middle.held["output_layer.weight"][-1].any()
    for key, where in (
        ("output_layer.weight", (-1, 3)),
        ("decoder.layers.1.self_attention.linear_proj.weight", (0, -1)),
    ):
        spoilt = Held({**middle.held, key: middle.held[key].clone()})
        spoilt.held[key][where] = float("nan")
        with pytest.raises(CheckpointError, match=rf"{key}: 1 of [\d,]+ elements that must be 0 are not"):
            run(forward.inverse(), spoilt, back)


def test_ties_are_written_one_way_and_verified_the_other() -> None:
    """On the last stage, whose copy nothing else checks."""
    source = weights(TIED)
    stage = Mesh(Topology(pp=2), Coord(pp=1))
    forward = plan(TIED, stage)
    target = room(forward.target_tensors)
    run(forward, Held({key: source[key] for key in forward.source_tensors}), target)
    assert torch.equal(bits(target.held["output_layer.weight"][:-1]), bits(source["model.embed_tokens.weight"]))
    both = plan(TIED, features=frozenset({"stored_lm_head"}))
    head = source["model.embed_tokens.weight"].clone()
    run(both, Held(source | {"lm_head.weight": head}), room(both.target_tensors))
    head.view(torch.int32)[3, 1] ^= 1  # one bit
    with pytest.raises(CheckpointError, match=r"lm_head.weight is a tied copy of .* differs from it \(1 elements\)"):
        run(both, Held(source | {"lm_head.weight": head}), room(both.target_tensors))


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "float32"), (torch.bfloat16, "bfloat16")])
def test_a_zero_centred_norm_comes_back_within_its_bound(dtype: torch.dtype, name: str) -> None:
    """And everything else to the bit."""
    generator = torch.Generator().manual_seed(1)
    source = {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in key_table(ODD).items()}
    forward = plan(ODD, features=frozenset({"layernorm_zero_centered_gamma"}))
    middle, back = room(forward.target_tensors, dtype), room(forward.source_tensors, dtype)
    run(forward, Held(source), middle)
    run(forward.inverse(), middle, back)
    norm = "decoder.layers.0.input_layernorm.weight"
    assert torch.equal(middle.held[norm], source["model.layers.0.input_layernorm.weight"] - 1)
    shift = Shift("megatron", -1.0)
    for key, tensor in source.items():
        if "norm" in key:
            error = (back.held[key].double() - tensor.double()).abs().max()
            assert 0 < float(error) <= shift.bound(name, float(tensor.abs().max()))
        else:
            assert torch.equal(back.held[key], tensor)


def test_a_read_only_source_is_not_written() -> None:
    source = weights(ODD)
    before = {key: tensor.clone() for key, tensor in source.items()}
    run(plan(ODD), Held(source), room(plan(ODD).target_tensors))
    same(source, before)
