"""The provider: what it derives, what it refuses, and the frequencies that it gives its models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch

from converters.errors import ConfigError, TopologyError
from converters.megatron.runtime import RuntimeUnavailableError
from converters.topology import Coord, Topology
from parity.ranks import RankFailure, Zygote

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
CONFIG = tiny_llama.SIZES


def made(topology: Topology | None = None, **changes: Any) -> Any:
    return tiny_llama.provider(CONFIG, topology or Topology(), **changes)


@pytest.mark.parametrize(
    "topology",
    [
        Topology(tp=2, sp=True),
        Topology(pp=2, vpp=2, cp=2),
        Topology(pp=2, first_stage_layers=1),
        Topology(pp=2, count_embedding=True, count_loss=True),
    ],
    ids=str,
)
def test_topology_and_back(topology: Topology) -> None:
    provider = made(topology)
    assert provider.topology == topology
    provider.finalize()
    assert provider.topology in (topology, Topology(**{**vars(topology), "etp": topology.tp}))


def test_nothing_is_checked_before_finalize() -> None:
    provider = made(pipeline_model_parallel_layout="Et|tttL", vocab_size=None, position_embedding_type="yarn")
    provider.tensor_model_parallel_size = 2
    with pytest.raises(ConfigError) as refusal:
        provider.finalize()
    for part in ("pipeline_model_parallel_layout", "vocab_size is not set", "'rope', found 'yarn'"):
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seq_len_interpolation_factor": 2.0}, ConfigError, "exclude each other"),
        ({"bf16": True, "fp16": True}, ConfigError, "fp16 and bf16"),
        (
            {"bf16": True, "params_dtype": torch.float16},
            ConfigError,
            "bf16=True contradicts params_dtype=torch.float16",
        ),
        ({"layer_spec": "te"}, ConfigError, "needs a GPU"),
        ({"pipeline_model_parallel_size": 3}, TopologyError, "do not fit pp=3"),
        ({"tensor_model_parallel_size": 3, "ffn_hidden_size": 96}, ConfigError, "Megatron-Core refuses"),
        ({"tensor_model_parallel_size": 3, "ffn_hidden_size": 100}, ConfigError, "100 does not divide over tp=3"),
        ({"sequence_parallel": True}, TopologyError, "sequence parallelism needs tp"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="what is refused here is what a machine without a GPU cannot do")
def test_refusals(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        made(**changes).finalize()


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, torch.float32),
        ({"bf16": True}, torch.bfloat16),
        ({"params_dtype": torch.bfloat16}, torch.bfloat16),
        ({"fp16": True, "params_dtype": torch.float16}, torch.float16),
    ],
)
def test_flags_and_dtypes_agree(changes: dict[str, Any], dtype: torch.dtype) -> None:
    provider = made(Topology(pp=2), **changes)
    provider.finalize()
    assert (provider.params_dtype, provider.pipeline_dtype) == (dtype, dtype)
    assert (provider.bf16, provider.fp16) == (dtype == torch.bfloat16, dtype == torch.float16)


@pytest.mark.parametrize(
    ("tp", "changes", "rows"), [(1, {}, 131), (2, {}, 132), (4, {"make_vocab_size_divisible_by": 64}, 256)]
)
def test_padded_vocabulary(tp: int, changes: dict[str, Any], rows: int) -> None:
    assert made(Topology(tp=tp), **changes).padded_vocab_size == rows


def test_a_vocabulary_that_may_not_be_padded() -> None:
    assert made(should_pad_vocab=False).padded_vocab_size == 131
    with pytest.raises(ConfigError, match="131 does not divide over tp=2"):
        _ = made(Topology(tp=2), should_pad_vocab=False).padded_vocab_size


def test_interleaving_does_not_batch_its_messages() -> None:
    """With two stages, batched messages give wrong gradients and no error."""
    provider = made(Topology(pp=2, vpp=2))
    provider.finalize()
    assert (provider.overlap_p2p_comm, provider.batch_p2p_comm) == (True, False)


def test_hooks_survive_a_copy_of_the_config_without_copying_their_owner() -> None:
    """Megatron-Core deep-copies the config where tp exceeds the groups; a loader's open files must not follow."""

    class Loader:
        def __deepcopy__(self, _: dict[int, Any]) -> Loader:
            raise AssertionError("the loader was copied")

        def load(self, chunks: list[Any]) -> None: ...

    provider = made()
    provider.register_pre_wrap_hook(Loader().load)
    copy.deepcopy(provider)


def hooked(config: dict[str, Any]) -> list[str]:
    """In a rank: the order and the effect of hooks."""
    from converters.megatron import runtime

    runtime.install()
    provider, seen = tiny_llama.provider(config, Topology(), bf16=True), []
    wrapped = torch.nn.Identity()
    provider.register_pre_wrap_hook(lambda chunks: seen.append(type(chunks[0]).__name__))
    provider.register_pre_wrap_hook(lambda chunks: [wrapped])
    provider.register_pre_wrap_hook(lambda chunks: seen.append(type(chunks[0]).__name__))
    chunks = provider.provide_distributed_model(mixed_precision_wrapper=None)
    assert chunks == [wrapped]
    return seen


def test_hooks_run_in_order_on_bare_models_and_may_replace_them(zygote: Zygote) -> None:
    assert zygote.run(hooked, CONFIG, timeout=60) == [["GPTModel", "Identity"]]


def frequencies(config: dict[str, Any]) -> torch.Tensor:
    """In a rank: the live model's rotary frequencies."""
    from converters.megatron import runtime

    runtime.install()
    provider = tiny_llama.provider(config, Topology())
    (model,) = provider.provide_distributed_model()
    assert model.rotary_pos_emb.seq_len_interpolation_factor is None
    found: torch.Tensor = model.rotary_pos_emb.inv_freq
    return found


@pytest.mark.parametrize(
    "changes",
    [
        tiny_llama.DEFAULT,
        tiny_llama.LINEAR,
        tiny_llama.LLAMA3,
        {**tiny_llama.LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
    ids=["default", "linear", "llama3", "llama3-short", "llama3.2"],
)
def test_rotary_frequencies_are_transformers(changes: dict[str, Any], tmp_path: Path, zygote: Zygote) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = {**CONFIG, "rope_parameters": changes}
    expected = LlamaRotaryEmbedding(LlamaConfig(**config)).inv_freq
    (actual,) = zygote.run(frequencies, config, timeout=60)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


class Reordered(Topology):
    """A mesh that numbers its ranks backwards, as no Megatron-Core does."""

    def coord(self, rank: int) -> Coord:
        return super().coord(self.world_size - 1 - rank)


def initialized(topology: Topology) -> tuple[Coord, str]:
    """In a rank: its place, and that the state can be set up again after a shutdown."""
    from converters.megatron import parallel, runtime

    runtime.install()
    first = parallel.initialize(topology)
    parallel.shutdown()
    assert parallel.initialize(topology, seed=1) == first
    return first, type(topology).__name__


@pytest.mark.parametrize(
    "topology",
    [Topology(tp=2, pp=2), Topology(cp=2, dp=2), Topology(dp=4, ep=2), Topology(tp=2, dp=2, ep=2, etp=1)],
    ids=str,
)
def test_ranks_stand_where_the_topology_says(topology: Topology, zygote: Zygote) -> None:
    found = [coord for coord, _ in zygote.run(initialized, topology, world=4, timeout=60)]
    assert tuple(found) == topology.coords()


@pytest.mark.parametrize(
    ("topology", "world", "message"),
    [(Topology(tp=2), 3, "is a mesh of 2 ranks, and this process group has 3"), (Reordered(tp=2), 2, "rank order")],
)
def test_a_mesh_that_is_not_megatrons_is_refused(topology: Topology, world: int, message: str, zygote: Zygote) -> None:
    with pytest.raises(RankFailure, match=message):
        zygote.run(initialized, topology, world=world, timeout=60)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, Megatron-Core needs no runtime")
def test_without_the_runtime_the_refusal_says_what_to_call() -> None:
    from converters.megatron import parallel

    with pytest.raises(RuntimeUnavailableError, match=r"runtime\.install\(\)"):
        parallel.initialize(Topology())
