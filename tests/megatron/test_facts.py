"""What a model computes with, beside what its config demands: each wrong field is named, by whichever number it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_llama
import torch
from tiny_llama import Tiny

from converters.topology import Topology
from parity.causes import Cause
from parity.ranks import Zygote
from parity.statement.config import FREQUENCIES, Facts, answered, demanded, disagreements
from parity.statement.rope import fields, frequencies, rope_cause

ONE = Topology()
ROPE = {**tiny_llama.LLAMA3, "rope_type": "llama3"}


def facts(tiny: Tiny, changes: dict[str, Any]) -> Facts:
    """In a rank: what a model that was built with other fields says of itself."""
    chunks, _ = tiny_llama.build(tiny, ONE, **changes)
    return answered(chunks[0])


@pytest.fixture(scope="module")
def right(models: dict[str, Tiny], zygote: Zygote) -> Facts:
    (found,) = zygote.run(facts, models["untied"], {}, world=1, coords=ONE.coords(), timeout=60)
    return found


@pytest.fixture(scope="module")
def wanted(models: dict[str, Tiny]) -> Facts:
    return demanded(models["untied"].folder)


def named(wanted: Facts, found: Facts, config: dict[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
    lines = list(disagreements(wanted, found, config))
    assert all(line.endswith(cause.detail) for line, cause in lines)
    return [(cause.kind, cause.what) for _, cause in lines]


def test_a_right_model_answers_what_is_demanded(wanted: Facts, right: Facts, models: dict[str, Tiny]) -> None:
    assert named(wanted, right, models["untied"].config) == []
    assert set(wanted) - set(right) == {"max_position_embeddings"}, "which this provider was not told"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 3),
        ("hidden_size", 64),
        ("intermediate_size", 128),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 8),
        ("head_dim", 10),
        ("rms_norm_eps", 1e-5),
        ("rms_norm_eps", (1e-5, 3e-4)),
        ("tie_word_embeddings", True),
        ("attention_dropout", 0.1),
        ("max_position_embeddings", 2048),
        ("vocab_size", 132),
        ("sliding_window", (64, 0)),
    ],
)
def test_each_wrong_field_is_named(name: str, value: Any, wanted: Facts, right: Facts, models: dict[str, Tiny]) -> None:
    assert named(wanted, {**right, name: value}, models["untied"].config) == [("config", (name,))]


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("softmax_scale", 0.3, "attention"),
        ("qk_layernorm", True, "attention"),
        ("normalization", "LayerNorm", "norm"),
        (FREQUENCIES, "neighbouring channels rotate against each other", "rope"),
        ("hidden_act", "a feed-forward part without a gate", "mlp"),
    ],
)
def test_what_no_config_says_is_computation(
    name: str, value: Any, part: str, wanted: Facts, right: Facts, models: dict[str, Tiny]
) -> None:
    assert named(wanted, {**right, name: value}, models["untied"].config) == [("computation", (part,))]


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"layernorm_epsilon": 1e-5}, Cause(kind="config", what=("rms_norm_eps",))),
        ({"activation_func": torch.nn.functional.gelu}, Cause(kind="config", what=("hidden_act",))),
        ({"attention_dropout": 0.1}, Cause(kind="config", what=("attention_dropout",))),
        ({"rotary_base": 10000.0}, Cause(kind="config", what=("rope_theta",))),
        ({"softmax_scale": 0.1}, Cause(kind="computation", what=("attention",))),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_it_is_read_off_the_model(
    changes: dict[str, Any], cause: Cause, wanted: Facts, models: dict[str, Tiny], zygote: Zygote
) -> None:
    (found,) = zygote.run(facts, models["untied"], changes, world=1, coords=ONE.coords(), timeout=60)
    (said,) = (cause for _, cause in disagreements(wanted, found, models["untied"].config))
    assert said.names(cause), str(said)


def test_a_scale_that_is_the_usual_one_is_no_disagreement(models: dict[str, Tiny], zygote: Zygote) -> None:
    (found,) = zygote.run(
        facts, models["untied"], {"softmax_scale": 16**-0.5}, world=1, coords=ONE.coords(), timeout=60
    )
    assert "softmax_scale" not in found


@pytest.mark.parametrize(
    ("changes", "what", "said"),
    [
        ({"rope_theta": 10000.0}, ("rope_theta",), "rope_theta 10000 for 5000"),
        ({"rope_theta": 5432.1}, ("rope_theta",), "rope_theta 5432.1 for 5000"),
        ({"factor": 32.0}, ("rope_scaling.factor",), "factor 32 for 3"),
        ({"factor": 2.75}, ("rope_scaling.factor",), "factor 2.75 for 3"),
        ({"low_freq_factor": 1.0}, ("rope_scaling.low_freq_factor",), "low_freq_factor 1 for 1.5"),
        ({"low_freq_factor": 1.125}, ("rope_scaling.low_freq_factor",), "low_freq_factor 1.125 for 1.5"),
        ({"high_freq_factor": 4.0}, ("rope_scaling.high_freq_factor",), "high_freq_factor 4 for 5"),
        ({"high_freq_factor": 4.5}, ("rope_scaling.high_freq_factor",), "high_freq_factor 4.5 for 5"),
        (
            {"original_max_position_embeddings": 8192},
            ("rope_scaling.original_max_position_embeddings",),
            "original_max_position_embeddings 8192 for 24",
        ),
        (
            {"original_max_position_embeddings": 20},
            ("rope_scaling.original_max_position_embeddings",),
            "original_max_position_embeddings 20 for 24",
        ),
        ({"rope_type": "default"}, ("rope_scaling",), "rope_type 'default' for 'llama3'"),
        (
            {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
            ("rope_scaling.high_freq_factor", "rope_scaling.low_freq_factor"),
            "low_freq_factor 1 for 1.5, high_freq_factor 4 for 5",
        ),
    ],
)
def test_fields_of_the_rope(changes: dict[str, Any], what: tuple[str, ...], said: str) -> None:
    config = {"rope_parameters": ROPE, "max_position_embeddings": 96}
    right, found = (frequencies({**fields(config), **changed}, 32).astype(np.float32) for changed in ({}, changes))
    cause = rope_cause(right, found, config)
    assert (cause.kind, cause.what, cause.detail) == ("config", what, said)


def test_what_no_field_of_the_rope_explains() -> None:
    config = {"rope_scaling": ROPE, "rope_theta": 5000.0}
    right = frequencies(fields(config), 8).astype(np.float32)
    found = right.copy()
    found[3] *= 1.5
    assert rope_cause(right, found, config).detail.startswith("frequency 3 is ")
    assert rope_cause(right, found[:6], config).what == ("head_dim",)
    rounded = torch.from_numpy(right).bfloat16().float().numpy()
    assert rope_cause(right, rounded, config).names(Cause(kind="computation", what=("rope",)))
    for value in (0.0, np.nan, -1.0):
        assert rope_cause(right, np.full_like(right, value), config).names(Cause(kind="computation", what=("rope",)))


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_frequencies_are_those_of_transformers(spelling: str, models: dict[str, Tiny], tmp_path: Path) -> None:
    config = dict(models["untied"].config)
    rope = dict(config.pop("rope_parameters"))
    config |= (
        {spelling: rope} if spelling == "rope_parameters" else {"rope_theta": rope.pop("rope_theta"), spelling: rope}
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    wanted = demanded(tmp_path)[FREQUENCIES]
    np.testing.assert_allclose(frequencies(fields(config), len(wanted)), wanted, rtol=1e-6)
