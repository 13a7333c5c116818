"""What a refusal names: the message of a failed rank, from our own converter or another's, as a cause."""

from __future__ import annotations

import pytest

from parity.causes import Cause
from parity.diagnosis.refusals import causes_of
from parity.rank_failure import RankFailure

FRAMES = """Traceback (most recent call last):
  File "converters/megatron/provider.py", line 304, in provide_distributed_model
    chunks: list[MegatronModule] = [self.provide(vp_stage=stage) for stage in stages]
"""
EXPORT = "converters.errors.CheckpointError: the model cannot be exported (1):\n  "


def failed(raised: str) -> tuple[Cause, ...]:
    return causes_of(RankFailure(f"rank 0 (tp=0): {raised}", 0, "tp=0", "exception", f"{FRAMES}{raised}\n"))


@pytest.mark.parametrize(
    ("raised", "kind", "what"),
    [
        (
            f"{EXPORT}output_layer.weight is a tied copy of model.embed_tokens.weight, and differs from it (7)",
            "untied",
            ("embed_tokens", "lm_head"),
        ),
        (f"{EXPORT}output_layer.weight: 70 of 70 elements that must be 0 are not (head)", "padding", ("lm_head",)),
        (
            "converters.errors.CheckpointError: here does not hold what its config promises:\n"
            "tensors that nothing maps (1):\n  model.extra.weight",
            "extra tensors",
            ("extra",),
        ),
        (
            "converters.errors.SourceError: model.safetensors.index.json names weight files that are not in the folder "
            "(1):\n  model-00003-of-00003.safetensors",
            "unreadable",
            ("model-00003-of-00003.safetensors", "model.safetensors.index.json"),
        ),
        ("converters.errors.SourceError: here has no safetensors weights: found none in here", "unreadable", ()),
        ("KeyError: 'model.layers.2.mlp.up_proj.weight'", "missing tensors", ("up_proj",)),
        (
            "converters.errors.ConfigError: its default is head_dim / 2, and 3 is no multiple of 2",
            "config",
            ("head_dim",),
        ),
        (
            "converters.errors.ConfigError: config of a llama model:\nhidden_act='tanh': expected silu or gelu",
            "config",
            ("hidden_act",),
        ),
        (
            "converters.errors.ConfigError: config of a llama model:\n"
            "rope_low_freq_factor=1.25: no row of the ledger uses it in this model\n"
            "rope_high_freq_factor=5.0: no row of the ledger uses it in this model",
            "config",
            ("rope_scaling.rope_type",),
        ),
        ("RuntimeError: something else", "ranks", ()),
    ],
)
def test_a_refusal_names_its_cause(raised: str, kind: str, what: tuple[str, ...]) -> None:
    first = failed(raised)[0]
    assert (first.kind, first.what) == (kind, what)


def test_a_rank_that_hangs_is_that() -> None:
    (cause,) = causes_of(
        RankFailure("rank 1: hung", 1, "tp=1", "timeout", "config of a llama model:\nhidden_size=1: x")
    )
    assert (cause.kind, cause.where) == ("ranks", "rank 1 (tp=1)")
