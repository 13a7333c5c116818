"""Every module of the reference against Transformer Engine's own: the same weights, forward and backward.

Sizes are what its kernels take (multiples of 8, 16 below bf16), and otherwise unalike: heads, groups, heads a group,
head width, and hidden size over heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from on_gpu import DEVICE, attention_backend, lacking_for, needs_te, precisions, reset_recipes, transformer_engine
from side_by_side import compare, flat, outcome, random, trio
from torch import Tensor, nn

from converters.te import quantization
from converters.te.quantization.recipes import recipe_of
from converters.te.reference import rope
from converters.te.reference.transformer import bias_dropout_add
from parity import bounds

pytestmark = needs_te

HIDDEN, FFN, HEADS, GROUPS, WIDTH, LENGTH, BATCH = 96, 224, 6, 2, 32, 32, 3
LENGTHS = (32, 13, 21)
DTYPES = (torch.float32, torch.bfloat16)
Record = Callable[[str, object], None]

# bshd: rows of one length, or of several behind each other's padding. thd: one after another, or in longer slots.
LAYOUTS = ("causal", "no_mask", "padding_causal", "padding", "packed", "packed-slots")


def cumulative(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def slots_of(layout: str) -> tuple[int, ...]:
    """The room of each sequence."""
    return LENGTHS if layout == "packed" else tuple(length + 3 + index for index, length in enumerate(LENGTHS))


def tokens(layout: str, dtype: torch.dtype) -> tuple[tuple[int, ...], Tensor]:
    """The leading dimensions of activations, and which of them are tokens."""
    if not layout.startswith("packed"):
        real = torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]
        return (BATCH, LENGTH), real if layout.startswith("padding") else torch.ones_like(real)
    slots = slots_of(layout)
    real = torch.cat([torch.arange(slot) < length for slot, length in zip(slots, LENGTHS, strict=True)])
    return (sum(slots),), real


def attention_options(layout: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the constructor (`qkv_format`, `attn_mask_type`) and of the call."""
    if not layout.startswith("packed"):
        made = {"qkv_format": "bshd", "attn_mask_type": layout}
        _, real = tokens(layout, torch.float32)
        return made, {"attention_mask": ~real[:, None, None, :]} if layout.startswith("padding") else {}
    made = {"qkv_format": "thd", "attn_mask_type": "padding_causal"}
    longest = max(slots_of(layout))
    call: dict[str, Any] = {"max_seqlen_q": longest, "max_seqlen_kv": longest}
    call |= {"cu_seqlens_q": cumulative(LENGTHS), "cu_seqlens_kv": cumulative(LENGTHS)}
    if layout == "packed-slots":
        starts = cumulative(slots_of(layout))
        call |= {"cu_seqlens_q_padded": starts, "cu_seqlens_kv_padded": starts, "pad_between_seqs": True}
    return made, call


def skip_without_backend(layout: str, dtype: torch.dtype) -> None:
    if layout == "packed-slots" and dtype == torch.float32:
        pytest.skip("Transformer Engine has no attention in float32 with padding between packed sequences")


def masked(gradient: Tensor, real: Tensor) -> Tensor:
    return gradient * real[(...,) + (None,) * (gradient.ndim - real.ndim)]


def check(
    name: str,
    dtype: torch.dtype,
    inputs: tuple[Tensor, ...],
    gradient: Tensor,
    arguments: dict[str, Any],
    record: Record,
    **options: Any,
) -> None:
    """Build the class in both libraries, ask both, compare."""
    real, ours, oracle = trio(name, dtype, **arguments)
    inputs = tuple(each.to(dtype) for each in inputs)
    gradient = gradient.to(dtype)
    found = outcome(real, inputs, gradient, device=DEVICE, dtype=dtype, **options)
    expected = outcome(ours, inputs, gradient, device="cpu", dtype=dtype, **options)
    wanted = outcome(oracle, inputs, gradient, device="cpu", dtype=torch.float64, **options)
    compare(found, expected, wanted, record)


def test_float32_is_not_multiplied_in_tf32() -> None:
    """Else every bound in float32 below would be broken by Transformer Engine's GEMMs alone."""
    real, _, oracle = trio("Linear", torch.float32, in_features=512, out_features=64, bias=False)
    x = random(256, 512, seed=1)
    found, wanted = flat(real(x.to(DEVICE))), flat(oracle(x.double()))
    apart = bounds.rms(found, wanted).value / float((wanted**2).mean() ** 0.5)
    assert apart < 2.0**-18, (
        f"float32 GEMMs are {apart:.1e} from exact, as TF32 is (2^-11): NVIDIA_TF32_OVERRIDE=0 has to be in the "
        "environment before CUDA starts"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero_centered_gamma", [False, True])
def test_rms_norm(dtype: torch.dtype, zero_centered_gamma: bool, record_property: Record) -> None:
    arguments = {"normalized_shape": HIDDEN, "eps": 3e-3, "zero_centered_gamma": zero_centered_gamma}
    x = 0.1 * random(BATCH, LENGTH, HIDDEN, seed=1)
    check("RMSNorm", dtype, (x,), random(BATCH, LENGTH, HIDDEN, seed=2), arguments, record_property)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["Linear", "LayerNormLinear"])
def test_linears(name: str, bias: bool, dtype: torch.dtype, record_property: Record) -> None:
    arguments: dict[str, Any] = {"in_features": HIDDEN, "out_features": FFN, "bias": bias}
    if name == "LayerNormLinear":
        arguments |= {"normalization": "RMSNorm", "eps": 3e-3}
    x = 0.1 * random(BATCH, LENGTH, HIDDEN, seed=1)
    check(name, dtype, (x,), random(BATCH, LENGTH, FFN, seed=2), arguments, record_property)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "reglu", "qgeglu", "sreglu"])
def test_layer_norm_mlp(activation: str, dtype: torch.dtype, record_property: Record) -> None:
    arguments = {"hidden_size": HIDDEN, "ffn_hidden_size": FFN, "eps": 3e-3, "normalization": "RMSNorm"}
    arguments |= {"activation": activation, "bias": activation in ("swiglu", "reglu")}
    x = 0.1 * random(BATCH, LENGTH, HIDDEN, seed=1)
    check("LayerNormMLP", dtype, (x,), random(BATCH, LENGTH, HIDDEN, seed=2), arguments, record_property)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention(layout: str, dtype: torch.dtype, record_property: Record) -> None:
    skip_without_backend(layout, dtype)
    made, call = attention_options(layout)
    lead, real = tokens(layout, dtype)
    inputs = tuple(
        random(*lead, heads, WIDTH, seed=3 + index) * 1.5 for index, heads in enumerate((HEADS, GROUPS, GROUPS))
    )
    gradient = masked(random(*lead, HEADS * WIDTH, seed=2), real)
    arguments = {"num_attention_heads": HEADS, "kv_channels": WIDTH, "num_gqa_groups": GROUPS, "layer_number": 1}
    check("DotProductAttention", dtype, inputs, gradient, arguments | made, record_property, real=real, **call)
    record_property("attention backend", attention_backend())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["causal", "padding_causal", "packed", "packed-slots"])
@pytest.mark.parametrize("bias", [False, True])
def test_multi_head_attention(bias: bool, layout: str, dtype: torch.dtype, record_property: Record) -> None:
    skip_without_backend(layout, dtype)
    made, call = attention_options(layout)
    lead, real = tokens(layout, dtype)
    arguments: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "kv_channels": WIDTH,
        "num_gqa_groups": GROUPS,
        "attention_dropout": 0.0,
        "layernorm_epsilon": 3e-3,
        "layer_number": 1,
        "input_layernorm": True,
        "fuse_qkv_params": True,
        "bias": bias,
        "normalization": "RMSNorm",
        **made,
    }
    x = 0.1 * random(*lead, HIDDEN, seed=1)
    gradient = masked(random(*lead, HIDDEN, seed=2), real)
    check(
        "MultiheadAttention",
        dtype,
        (x,),
        gradient,
        arguments,
        record_property,
        real=real,
        rotary_pos_emb=angles(),
        **call,
    )
    record_property("attention backend", attention_backend())


def angles() -> Tensor:
    """Of 64 positions, theta 700."""
    return rope.angles(700.0 ** (-torch.arange(0, WIDTH, 2).float() / WIDTH), 64)


def layer_arguments(layout: str, **changes: Any) -> dict[str, Any]:
    made, _ = attention_options(layout)
    return {
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "num_attention_heads": HEADS,
        "num_gqa_groups": GROUPS,
        "kv_channels": WIDTH,
        "layernorm_epsilon": 3e-3,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "layer_number": 1,
        "fuse_qkv_params": True,
        "normalization": "RMSNorm",
        "activation": "swiglu",
        "attn_input_format": made["qkv_format"],
        "self_attn_mask_type": made["attn_mask_type"],
        **changes,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["causal", "padding_causal", "packed", "packed-slots"])
@pytest.mark.parametrize("bias", [False, True])
def test_transformer_layer(bias: bool, layout: str, dtype: torch.dtype, record_property: Record) -> None:
    skip_without_backend(layout, dtype)
    _, call = attention_options(layout)
    lead, real = tokens(layout, dtype)
    x, gradient = random(*lead, HIDDEN, seed=1), masked(random(*lead, HIDDEN, seed=2), real)
    arguments = layer_arguments(layout, bias=bias)
    check(
        "TransformerLayer",
        dtype,
        (x,),
        gradient,
        arguments,
        record_property,
        real=real,
        rotary_pos_emb=angles(),
        **call,
    )
    record_property("attention backend", attention_backend())


@pytest.mark.parametrize("name", ["Linear", "LayerNormLinear", "LayerNormMLP", "TransformerLayer"])
@pytest.mark.parametrize("precision", precisions())
def test_modules_in_each_recipe(name: str, precision: str, record_property: Record) -> None:
    """As near to float64 as the reference is, and nearer to the reference than another quantisation would be."""
    sizes = {"in_features": 128, "out_features": 192, "bias": True}
    normed = {"normalization": "RMSNorm", "eps": 3e-3}
    arguments: dict[str, dict[str, Any]] = {
        "Linear": sizes,
        "LayerNormLinear": sizes | normed,
        "LayerNormMLP": {"hidden_size": 128, "ffn_hidden_size": 320, "activation": "swiglu", "bias": True} | normed,
        "TransformerLayer": layer_arguments("causal", hidden_size=128, ffn_hidden_size=320, bias=True),
    }
    real, ours, oracle = trio(name, torch.bfloat16, **arguments[name])
    x = 0.1 * random(2, 96, 128, seed=1, dtype=torch.bfloat16)
    gradient = random(2, 96, 192 if name.endswith("Linear") else 128, seed=2, dtype=torch.bfloat16)
    options = {"rotary_pos_emb": rope.angles(torch.linspace(1, 0.01, WIDTH // 2), 96)} if name[0] == "T" else {}
    reset_recipes()
    for _ in range(3):  # delayed scaling has scales of its own from the second step on
        found = in_recipe(transformer_engine(), real, precision, x, gradient, DEVICE, **options)
        expected = in_recipe(quantization, ours, precision, x, gradient, "cpu", **options)
    wanted = outcome(oracle, (x,), gradient, device="cpu", dtype=torch.float64, **options)
    compare(found, expected, wanted, record_property)
    apart, ratios = {}, []
    for key, value in found.items():
        theirs = bounds.rms(flat(expected[key]), flat(wanted[key])).value
        between = bounds.rms(flat(value), flat(expected[key])).value
        ratios.append(between / theirs)
        # Independent quantisation would put the two sqrt(2) errors apart, that of a bias's gradient is no error of it.
        if between >= theirs and not key.endswith("bias"):
            apart[key] = f"{between:.3g} from the reference, which is {theirs:.3g} from float64"
    record_property("distance to the reference in its own errors, at most", max(ratios))
    assert not apart, "\n".join(f"{key}: {each}" for key, each in apart.items())


def in_recipe(
    library: Any, module: nn.Module, precision: str, x: Tensor, gradient: Tensor, device: str, **options: Any
) -> dict[str, Tensor]:
    """Forward inside the recipe of `precision`, backward outside it, as a training step has them."""

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = module

        def forward(self, x: Tensor, **options: Any) -> Tensor:
            with library.autocast(enabled=True, recipe=recipe_of(precision)):
                out: Tensor = module(x, **options)
                return out

    found = outcome(Inside(), (x,), gradient, device=device, dtype=torch.bfloat16, **options)
    return {key.replace("gradient of inside.", "gradient of "): value for key, value in found.items()}


@pytest.mark.parametrize("training", [False, True])
def test_bias_and_residual_are_added_in_float32_and_rounded_once(training: bool) -> None:
    """To the bit, where rounding twice is seen: biases and residuals of many magnitudes beside the output."""
    layer = (
        transformer_engine()
        .TransformerLayer(**layer_arguments("causal", bias=True), params_dtype=torch.bfloat16, device=DEVICE)
        .train(training)
    )
    spread = 2.0 ** torch.randint(-6, 7, (HIDDEN,), generator=torch.Generator().manual_seed(4))
    out, residual = (random(64, HIDDEN, seed=seed).mul(spread).bfloat16() for seed in (1, 2))
    bias = random(HIDDEN, seed=3, dtype=torch.bfloat16)
    twice = residual + (out + bias)
    for given in (bias, None):
        expected = bias_dropout_add(out, given, residual, 0.0, training)
        if given is not None:
            assert not torch.equal(twice, expected)
        found = layer._bias_dropout_add(*(None if each is None else each.to(DEVICE) for each in (out, given, residual)))
        assert torch.equal(found.cpu(), expected), f"bias {given is not None}: rounded twice or otherwise"


def test_which_attention_runs(record_property: Record) -> None:
    """What the figures of the other tests are of."""
    for layout in LAYOUTS:
        for dtype in DTYPES:
            if layout == "packed-slots" and dtype == torch.float32:
                continue
            made, call = attention_options(layout)
            lead, _ = tokens(layout, dtype)
            heads: dict[str, Any] = {"num_attention_heads": HEADS, "kv_channels": WIDTH, "num_gqa_groups": GROUPS}
            layer = transformer_engine().DotProductAttention(**heads, **made)
            q, k, v = (torch.randn(*lead, n, WIDTH, device=DEVICE, dtype=dtype) for n in (HEADS, GROUPS, GROUPS))
            layer(q, k, v, **{n: c.to(DEVICE) if isinstance(c, Tensor) else c for n, c in call.items()})
            ran = attention_backend()
            record_property(f"attention of {layout} in {dtype}", ran)
            assert ran != "none"
            assert (ran == "unfused") == (dtype == torch.float32), f"{layout} in {dtype} ran {ran}"


def test_precisions_that_the_gpu_lacks_are_refused_by_transformer_engine_too() -> None:
    te = transformer_engine()
    available = {
        "fp8-delayed": te.is_fp8_available,
        "fp8-current": te.is_fp8_available,
        "fp8-block": te.is_fp8_block_scaling_available,
        "mxfp8": te.is_mxfp8_available,
        "nvfp4": te.is_nvfp4_available,
    }
    for precision, ask in available.items():
        assert bool(ask()) == (not lacking_for(precision)), (precision, ask(return_reason=True))
