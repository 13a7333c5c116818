"""The reference layers beside the real ones: parameters, where they start, and what may be asked of them."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import pytest
import real_layers
import torch

from parity.ranks import Zygote

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="transformer-engine is not installed"
)

# No two sizes alike: heads 12, groups 4, head_dim 10 (not 44 / 12), ffn 28, twice that 56.
LLAMA: dict[str, Any] = {
    "hidden_size": 44,
    "ffn_hidden_size": 28,
    "num_attention_heads": 12,
    "num_gqa_groups": 4,
    "kv_channels": 10,
    "layernorm_epsilon": 3e-5,
    "layer_number": 3,
    "fuse_qkv_params": True,
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "attn_input_format": "bshd",
    "self_attn_mask_type": "padding_causal",
    "params_dtype": torch.float32,
    "device": "cpu",
}
PARALLEL = {"tp_size": 2, "set_parallel_mode": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "biases": {},
    "no-biases": {"bias": False},
    "multi-query": {"num_gqa_groups": 1},
    "multi-head": {"num_gqa_groups": None},
    "head-dim-of-hidden": {"kv_channels": None, "hidden_size": 48},
    "separate-qkv": {"fuse_qkv_params": False},
    "separate-qkv-no-biases": {"fuse_qkv_params": False, "bias": False},
    "qkv-not-interleaved": {"qkv_weight_interleaved": False},
    "zero-centred": {"zero_centered_gamma": True},
    "layer-norm": {"normalization": "LayerNorm"},
    "gelu": {"activation": "gelu"},
    "bf16": {"params_dtype": torch.bfloat16},
    "default-dtype": {"params_dtype": None},
    "thd": {"attn_input_format": "thd"},
    "sbhd": {"attn_input_format": "sbhd"},
    "init-methods": {"init_method": torch.nn.init.ones_, "output_layer_init_method": torch.nn.init.zeros_},
    "tp2": PARALLEL,
    "tp2-no-biases": {**PARALLEL, "bias": False},
    "tp2-sp": {**PARALLEL, "sequence_parallel": True},
    "tp2-separate-qkv-bf16": {**PARALLEL, "fuse_qkv_params": False, "params_dtype": torch.bfloat16},
    "tp2-mlp-only": {"tp_size": 2},
    "meta": {"device": "meta"},
    "tp2-meta": {**PARALLEL, "device": "meta"},
}
LINEAR: dict[str, Any] = {"in_features": 24, "out_features": 36, "params_dtype": torch.float32, "device": "cpu"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"layer-{name}": ("TransformerLayer", {**LLAMA, **changes}) for name, changes in VARIANTS.items()},
    "linear": ("Linear", LINEAR),
    "linear-column": ("Linear", {**LINEAR, "parallel_mode": "column", "tp_size": 2, "bias": False}),
    "linear-row-sp": ("Linear", {**LINEAR, "parallel_mode": "row", "tp_size": 2, "sequence_parallel": True}),
    "linear-split": ("Linear", {**LINEAR, "parameters_split": ("left", "right_")}),
    "linear-meta": ("Linear", {**LINEAR, "device": "meta"}),
    "norm": ("RMSNorm", {"normalized_shape": 24, "eps": 1e-6, "device": "cpu"}),
    "norm-bf16": ("RMSNorm", {"normalized_shape": 24, "dtype": torch.bfloat16, "device": "cpu"}),
    "norm-params-dtype": ("RMSNorm", {"normalized_shape": 24, "params_dtype": torch.bfloat16, "device": "cpu"}),
    "norm-zero-centred-sp": (
        "RMSNorm",
        {"normalized_shape": 24, "zero_centered_gamma": True, "sequence_parallel": True, "device": "cpu"},
    ),
    "norm-meta": ("RMSNorm", {"normalized_shape": 24, "device": "meta"}),
    "mlp-columns": ("LayerNormMLP", {"hidden_size": 24, "ffn_hidden_size": 40, "tp_size": 2, "device": "cpu"}),
}


@pytest.fixture(scope="module")
def made(zygote: Zygote) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    (found,) = zygote.run(real_layers.structures, CASES)
    return found


@pytest.fixture(scope="module")
def signatures(zygote: Zygote) -> dict[str, tuple[dict[str, str], dict[str, str], dict[str, str]]]:
    (found,) = zygote.run(real_layers.signatures)
    return found


@pytest.mark.parametrize("case", CASES)
def test_same_parameters_and_first_values(case: str, made: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> None:
    real, reference = made[case]
    assert real
    assert list(reference.items()) == list(real.items())


@pytest.mark.parametrize("name", real_layers.CLASSES)
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_same_keywords_and_defaults(
    name: str, method: str, signatures: dict[str, tuple[dict[str, str], dict[str, str], dict[str, str]]]
) -> None:
    real, reference, off = signatures[f"{name}.{method}"]
    # The one difference in meaning: where Transformer Engine's default is a GPU, the reference's is torch's own device.
    reference.pop("device", None)
    stated = reference | off
    # What the reference requires may be optional in Transformer Engine, which has other ways to give it.
    optional = {option: default for option, default in stated.items() if default != repr(inspect.Parameter.empty)}
    assert set(stated) <= set(real)
    assert {option: real[option] for option in optional} == optional
    if off:
        assert set(real) - {"device"} == set(stated), "each option is either in the reference or refused by name"
