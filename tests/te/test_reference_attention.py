"""Masks, padding, rotary positions, activations and norms of the reference layers, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_layer import assert_near, blocks, cumulative
from torch import Tensor

from converters.errors import ConversionError
from converters.te import reference
from converters.te.reference import attention, layernorm_mlp, norm, rope, transformer


def core(**options: Any) -> reference.DotProductAttention:
    return reference.DotProductAttention(6, 5, num_gqa_groups=2, qkv_format="bshd", layer_number=1, **options)


MASKS: dict[str, Callable[[int, int], Tensor]] = {
    "no_mask": lambda i, j: j > 99,
    "causal": lambda i, j: j > i,
    "causal_bottom_right": lambda i, j: j > i + 2,
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_hide_what_they_say(kind: str) -> None:
    q, k, v = blocks(1, 3, 7, 6, 5), blocks(2, 3, 9, 2, 5), blocks(3, 3, 9, 2, 5)
    masked = MASKS[kind](torch.arange(7)[:, None], torch.arange(9)[None])

    def oracle(dtype: torch.dtype) -> Tensor:
        heads = [t.to(dtype).transpose(1, 2) for t in (q, *(t.repeat_interleave(3, 2) for t in (k, v)))]
        out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=~masked)
        return out.transpose(1, 2).flatten(2)

    layer = core()
    assert_near(layer(q, k, v, attn_mask_type=kind), oracle(torch.float32), oracle(torch.float64))
    arbitrary = layer(q, k, v, attention_mask=masked, attn_mask_type="arbitrary")
    assert torch.equal(arbitrary, layer(q, k, v, attn_mask_type=kind))


@pytest.mark.parametrize("kind", ["padding", "padding_causal"])
def test_padding_gets_and_gives_nothing(kind: str) -> None:
    q, k, v = blocks(1, 2, 7, 6, 5).requires_grad_(), blocks(2, 2, 7, 2, 5), blocks(3, 2, 7, 2, 5)
    mask = torch.arange(7)[None] >= torch.tensor([[4], [7]])
    out = core()(q, k, v, attention_mask=mask[:, None, None], attn_mask_type=kind)
    by_lengths = core()(q, k, v, cu_seqlens_q=cumulative([4, 7]), cu_seqlens_kv=cumulative([4, 7]), attn_mask_type=kind)
    bare = kind.replace("padding_", "").replace("padding", "no_mask")
    assert torch.equal(out, by_lengths)
    assert torch.equal(out[0, :4], core()(q[:1, :4], k[:1, :4], v[:1, :4], attn_mask_type=bare)[0])
    assert torch.equal(out[1], core()(q[1:], k[1:], v[1:], attn_mask_type=bare)[0])
    assert not out[0, 4:].any()
    (out**2).sum().backward()
    assert q.grad[0, :4].any()
    assert not q.grad[0, 4:].any()


def test_a_query_that_sees_nothing_gets_nothing() -> None:
    q, k, v = (blocks(n, 1, 3, heads, 5).requires_grad_() for n, heads in ((1, 6), (2, 2), (3, 2)))
    masked = torch.tensor([[True, True, True], [False, True, True], [False, False, True]])
    out = core()(q, k, v, attention_mask=masked, attn_mask_type="arbitrary")
    assert not out[0, 0].any()
    assert out[0, 1:].any()
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_positions_follow_the_zigzag_of_context_parallelism(ranks: int) -> None:
    freqs = rope.angles(1 / 100.0 ** (torch.arange(3) / 3), 50)
    per, slots = 2 * ranks, [2, 5]
    rows = blocks(1, 2, per * 5, 4, 7)
    packed = blocks(2, sum(slots) * per, 4, 7)
    starts = cumulative([slot * per for slot in slots])
    whole = rope.apply_rotary_pos_emb(rows, freqs, "bshd")
    whole_packed = rope.apply_rotary_pos_emb(packed, freqs, "thd", cu_seqlens=starts)
    assert torch.equal(whole[..., 6:], rows[..., 6:])
    assert not torch.equal(whole[:, 1:, :, :6], rows[:, 1:, :, :6])

    # A sequence that is packed has the positions of one that is alone.
    apart = [rope.apply_rotary_pos_emb(one[:, None], freqs)[:, 0] for one in packed.split(starts.diff().tolist())]
    assert torch.equal(whole_packed, torch.cat(apart))

    def own(x: Tensor, rank: int) -> Tensor:
        chunks = x.chunk(per)
        return torch.cat([chunks[rank], chunks[per - 1 - rank]])

    for rank in range(ranks):
        place = {"cp_size": ranks, "cp_rank": rank}
        mine = own(rows.transpose(0, 1), rank)
        assert torch.equal(rope.apply_rotary_pos_emb(mine, freqs, "sbhd", **place), own(whole.transpose(0, 1), rank))
        part, expected = (
            torch.cat([own(s, rank) for s in t.split(starts.diff().tolist())]) for t in (packed, whole_packed)
        )
        assert torch.equal(rope.apply_rotary_pos_emb(part, freqs, "thd", cu_seqlens=starts, **place), expected)


ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "gelu": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "qgelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "relu": lambda x: max(x, 0.0),
    "srelu": lambda x: max(x, 0.0) ** 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "glu": lambda x: 1 / (1 + math.exp(-x)),
}
GATES = {"geglu": "gelu", "qgeglu": "qgelu", "reglu": "relu", "sreglu": "srelu", "swiglu": "silu", "glu": "glu"}


@pytest.mark.parametrize("name", [*layernorm_mlp.ACTIVATIONS, *layernorm_mlp.GATED])
def test_activations_are_their_formulas(name: str) -> None:
    x = torch.tensor([-2.5, -0.3, 0.7, 4.0, 1.5, -3.0], dtype=torch.float64)
    formula = ACTIVATIONS[GATES.get(name, name)]
    values = [formula(value) for value in x.tolist()]
    expected = [a * b for a, b in zip(values[:3], x.tolist()[3:], strict=True)] if name in GATES else values
    assert layernorm_mlp.activate(x, name).tolist() == pytest.approx(expected, rel=2.0**-48)


def rms_norm(x: Tensor) -> Tensor:
    return norm.normalize(x, x[0], None, eps=1e-5, zero_centered_gamma=False)


def layer_norm(x: Tensor) -> Tensor:
    return norm.normalize(x, x[0], x[1], eps=1e-5, zero_centered_gamma=True)


ROUNDED_ONCE: dict[str, Callable[[Tensor], Tensor]] = {
    "rms norm": rms_norm,
    "layer norm": layer_norm,
    "activation": lambda x: layernorm_mlp.activate(x, "swiglu"),
    "rotation": lambda x: rope.apply_rotary_pos_emb(x[:, None, None], rope.angles(1 / torch.arange(1, 25), 40)),
    "bias and residual": lambda x: transformer.bias_dropout_add(x, x[1], x.flip(0), 0.0, True),
}


@pytest.mark.parametrize("name", ROUNDED_ONCE)
def test_bfloat16_is_rounded_once(name: str) -> None:
    x = blocks(8, 40, 48).bfloat16()
    exact, actual = ROUNDED_ONCE[name](x.double()), ROUNDED_ONCE[name](x)
    assert actual.dtype == torch.bfloat16
    # Half a step of bfloat16, and what a few roundings in float32 of the largest intermediate value may add.
    half_step = 2.0 ** (exact.abs().log2().floor() - 8)
    assert ((actual.double() - exact).abs() <= half_step + 2.0**-22 * x.abs().max() ** 2).all()


def test_attention_in_bfloat16_has_scores_and_softmax_in_float32() -> None:
    # Scores near 45 that differ by about one: bfloat16 would round them by up to an eighth.
    q, k, v = (1 + blocks(1, 1, 9, 6, 5) / 8).bfloat16(), (20 + blocks(2, 1, 9, 2, 5)).bfloat16(), blocks(3, 1, 9, 2, 5)
    v = v.bfloat16()
    exact, actual = core()(q.double(), k.double(), v.double()), core()(q, k, v)
    # Only the probabilities and the output are rounded, each by at most 2^-9 of values below the largest `v`.
    assert actual.dtype == torch.bfloat16
    assert (actual.double() - exact).abs().max() <= (2.0**-8 + 2.0**-16) * v.double().abs().max()


def test_bias_after_a_row_parallel_gemm() -> None:
    plain, row = (reference.Linear(6, 4, params_dtype=torch.float64, parallel_mode=mode) for mode in (None, "row"))
    torch.nn.init.normal_(plain.bias)
    row.load_state_dict(plain.state_dict())
    x = blocks(4, 3, 6).double()
    torch.testing.assert_close(row(x), plain(x), rtol=2.0**-48, atol=2.0**-48)
    apart = reference.Linear(6, 4, params_dtype=torch.float64, return_bias=True)
    apart.load_state_dict(plain.state_dict())
    out, bias = apart(x)
    torch.testing.assert_close(out + bias, plain(x), rtol=2.0**-48, atol=2.0**-48)


def layer_norm_layer() -> reference.LayerNormLinear:
    return reference.LayerNormLinear(6, 4, eps=1e-3, zero_centered_gamma=True, params_dtype=torch.float64)


def test_layer_norm_with_zero_centred_weights() -> None:
    layer, x = layer_norm_layer(), blocks(4, 3, 6).double()
    torch.nn.init.normal_(layer.layer_norm_weight)
    torch.nn.init.normal_(layer.layer_norm_bias)
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    normal = (x - mean) / torch.sqrt(variance + 1e-3) * (1 + layer.layer_norm_weight) + layer.layer_norm_bias
    torch.testing.assert_close(layer(x), normal @ layer.weight.T + layer.bias, rtol=2.0**-46, atol=2.0**-46)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown option": (lambda: reference.Linear(4, 4, params_dtypes=None), "no such option.*'params_dtype'"),
    "option beyond the reference": (
        lambda: reference.TransformerLayer(8, 8, 2, window_size=(5, 0), softcap=30.0),
        r"window_size=\(5, 0\).*\n.*softcap=30.0.*\n.*GPU",
    ),
    "parallel attention and mlp": (
        lambda: reference.TransformerLayer(8, 8, 2, parallel_attention_mlp=True),
        "parallel_attention_mlp=True",
    ),
    "groups over ranks": (lambda: reference.TransformerLayer(8, 8, 4, 2, tp_size=4), "num_gqa_groups.*4, found 2"),
    "no group": (
        lambda: reference.Linear(4, 4, tp_size=2, parallel_mode="row")(torch.ones(1, 2)),
        "set_tensor_parallel_group",
    ),
    "row-parallel norm": (lambda: reference.LayerNormLinear(4, 4, parallel_mode="row"), "'column'"),
    "activation": (lambda: reference.LayerNormMLP(4, 4, activation="clamped_swiglu"), "clamped_swiglu"),
    "mask that is not looked at": (
        lambda: core()(*[blocks(1, 1, 3, 6, 5)] * 3, attention_mask=torch.tensor([True])),
        "padding_causal",
    ),
    "padding unsaid": (lambda: core()(*[blocks(1, 1, 3, 6, 5)] * 3, attn_mask_type="padding"), "found neither"),
    "left padding": (
        lambda: core()(
            *[blocks(1, 1, 3, 6, 5)] * 3,
            attn_mask_type="padding_causal",
            attention_mask=torch.tensor([True, False, False])[None, None, None],
        ),
        "padding before tokens.*thd",
    ),
    "packed without padding mask": (lambda: core()(*[blocks(1, 3, 6, 5)] * 3, qkv_format="thd"), "padding_causal"),
    "padding between sequences unsaid": (
        lambda: attention.packed_spans(9, cumulative([2, 3]), cumulative([4, 5])),
        "pad_between_seqs=True",
    ),
    "lengths in int64": (lambda: attention.packed_spans(9, cumulative([2, 3]).long(), None), "int32"),
    "lengths beyond the tokens": (lambda: attention.packed_spans(4, cumulative([2, 3]), None), "at most 4"),
    "cache without padding mask": (
        lambda: core()(*[blocks(1, 1, 3, 6, 5)] * 3, inference_params=object()),
        "padding_causal",
    ),
    "too few angles": (
        lambda: rope.apply_rotary_pos_emb(blocks(1, 1, 5, 2, 4), rope.angles(torch.ones(2), 4), "bshd"),
        "4 positions, found a token at 4",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_there_is_refused_with_what_to_do(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ConversionError, match=f"(?s){message}"):
        call()
