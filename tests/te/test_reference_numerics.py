"""What the reference layers compute: against transformers' own decoder layer, packed, and with a cache."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from tiny_layer import (
    TOKENS,
    angles_of,
    assert_near,
    config_of,
    cumulative,
    hf_forward,
    hf_layer,
    hidden,
    reference_layer,
    weights,
)
from torch import Tensor

from converters.te import reference
from parity import bounds

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "biased": ({"attention_bias": True, "mlp_bias": True}, {}),
    "no-biases": ({}, {}),
    "multi-query": ({"num_key_value_heads": 1}, {}),
    "multi-head": ({"num_key_value_heads": 12}, {}),
    "sbhd": ({}, {"attn_input_format": "sbhd"}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_and_gradients_are_those_of_transformers(name: str) -> None:
    changes, options = VARIANTS[name]
    config = config_of(**changes)
    x, out_gradient = hidden(3, TOKENS), hidden(3, TOKENS, seed=6)

    def evaluate(implementation: str, dtype: torch.dtype) -> dict[str, Tensor]:
        hf, own = hf_layer(config).to(dtype), x.to(dtype, copy=True).requires_grad_()
        out = hf_forward(hf, config, own, implementation)
        out.backward(out_gradient.to(dtype))
        found = weights(hf, config, lambda parameter: parameter.grad)
        return {"output": out, "input's gradient": own.grad, **found}

    expected = evaluate("eager", torch.float32)
    others = [evaluate("sdpa", torch.float32), evaluate("eager", torch.float64)]
    layer, own = reference_layer(config, **options), x.clone().requires_grad_()
    flip = (lambda t: t.transpose(0, 1)) if name == "sbhd" else (lambda t: t)
    out = flip(layer(flip(own), rotary_pos_emb=angles_of(config)))
    out.backward(out_gradient)
    actual = {"output": out, "input's gradient": own.grad, **{n: p.grad for n, p in layer.named_parameters()}}
    assert actual.keys() == expected.keys()
    for key in expected:
        assert_near(actual[key], expected[key], *(other[key] for other in others))


@pytest.mark.parametrize("options", [{"qkv_weight_interleaved": False}, {"fuse_qkv_params": False}], ids=str)
def test_qkv_that_is_not_interleaved_is_one_after_another(options: dict[str, Any]) -> None:
    config = config_of(attention_bias=True, mlp_bias=True)
    values = weights(hf_layer(config), config, torch.Tensor.detach)
    x, angles = hidden(2, TOKENS), angles_of(config)
    expected = reference_layer(config, values)(x, rotary_pos_emb=angles)
    other = reference_layer(config, values, params_dtype=torch.float64)(x.double(), rotary_pos_emb=angles)
    heads = config.num_attention_heads // config.num_key_value_heads
    for name in ("weight", "bias"):
        prefix = "self_attention.layernorm_qkv."
        rows = values.pop(prefix + name).unflatten(0, (config.num_key_value_heads, heads + 2, config.head_dim))
        parts = [part.flatten(0, 2) for part in rows.split((heads, 1, 1), dim=1)]
        if options.get("fuse_qkv_params", True):
            values[prefix + name] = torch.cat(parts)
        else:
            values |= {f"{prefix}{p}_{name}": part for p, part in zip(("query", "key", "value"), parts, strict=True)}
    assert_near(reference_layer(config, values, **options)(x, rotary_pos_emb=angles), expected, other)


def test_bfloat16_is_as_near_to_float32_as_transformers_is() -> None:
    config = config_of()
    values = {k: v.bfloat16() for k, v in weights(hf_layer(config), config, torch.Tensor.detach).items()}
    x = hidden(4, TOKENS).bfloat16()
    hf = hf_layer(config).bfloat16()
    oracle = hf_forward(hf.float(), config, x.float())
    rounded = hf_forward(hf.bfloat16(), config, x)
    actual = reference_layer(config, values, params_dtype=torch.bfloat16)(x, rotary_pos_emb=angles_of(config))
    assert actual.dtype == torch.bfloat16
    theirs, ours = (bounds.rms(t.detach().float().numpy(), oracle.detach().numpy()).value for t in (rounded, actual))
    assert ours <= bounds.nearness(theirs, tp=1)


LENGTHS = [5, 1, 8, 3]
GAPS = [7, 4, 8, 6]


@pytest.mark.parametrize("slots", [LENGTHS, GAPS], ids=["packed", "gaps"])
def test_packed_sequences_are_rows_of_a_batch(slots: list[int]) -> None:
    config = config_of(attention_bias=True, mlp_bias=True)
    angles = angles_of(config)
    sequences = [hidden(1, length, seed=length) for length in LENGTHS]
    padding = [hidden(slot - length, seed=90 + slot) for slot, length in zip(slots, LENGTHS, strict=True)]

    def alone(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        layer, outs = reference_layer(config, params_dtype=dtype), []
        for sequence in sequences:
            outs.append(layer(sequence.to(dtype), rotary_pos_emb=angles)[0])
            (outs[-1] * torch.arange(1, 49)).sum().backward()
        return outs, [parameter.grad for parameter in layer.parameters()]

    layer = reference_layer(config, attn_input_format="thd", self_attn_mask_type="padding_causal")
    tokens = torch.cat(
        [part for pair in zip((s[0] for s in sequences), padding, strict=True) for part in pair]
    ).requires_grad_()
    lengths = {"cu_seqlens_q": cumulative(LENGTHS), "cu_seqlens_kv": cumulative(LENGTHS), "max_seqlen_q": max(slots)}
    if slots != LENGTHS:
        lengths |= {"cu_seqlens_q_padded": cumulative(slots), "pad_between_seqs": True}
    out = layer(tokens, rotary_pos_emb=angles, **lengths)
    starts = cumulative(slots).tolist()
    outs = [out[start : start + length] for start, length in zip(starts[:-1], LENGTHS, strict=True)]
    sum((one * torch.arange(1, 49)).sum() for one in outs).backward()
    expected, gradients = alone(torch.float32)
    others, other_gradients = alone(torch.float64)
    for one, two, three in zip(outs, expected, others, strict=True):
        assert_near(one, two, three)
    for parameter, two, three in zip(layer.parameters(), gradients, other_gradients, strict=True):
        assert_near(parameter.grad, two, three)
    for start, length, slot in zip(starts[:-1], LENGTHS, slots, strict=True):
        assert not tokens.grad[start + length : start + slot].any()


@pytest.mark.parametrize("slots", [LENGTHS, GAPS], ids=["packed", "gaps"])
def test_packed_sequences_do_not_see_each_other_nor_padding(slots: list[int]) -> None:
    config = config_of()
    layer = reference_layer(config, attn_input_format="thd", self_attn_mask_type="padding_causal")
    starts, total = cumulative(slots).tolist(), sum(slots) + 2
    lengths = {"cu_seqlens_q": cumulative(LENGTHS), "cu_seqlens_q_padded": cumulative(slots), "pad_between_seqs": True}
    tokens = hidden(total)

    def forward(changed: int | None = None) -> Tensor:
        own = tokens.clone()
        if changed is not None:
            own[changed] += 1.0
        return layer(own, rotary_pos_emb=angles_of(config), **lengths)

    before = forward()
    owner = {s + i: n for n, (s, length) in enumerate(zip(starts[:-1], LENGTHS, strict=True)) for i in range(length)}
    for token in range(total):
        same = (forward(token) == before).all(1).tolist()
        touched = {owner.get(index, index) for index, equal in enumerate(same) if not equal}
        assert touched == {owner.get(token, token)}
        if token in owner:
            sequence = [i for i in owner if owner[i] == owner[token]]
            assert [i for i in sequence if not same[i]] == [i for i in sequence if i >= token]


@pytest.mark.parametrize("layout", ["bshd", "thd", "sbhd"])
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_steps_with_a_cache_are_the_whole_at_once(layout: str, paged: bool) -> None:
    config = config_of()
    angles, lengths = angles_of(config), [6, 9]
    layer = reference_layer(config, attn_input_format=layout, self_attn_mask_type="padding_causal")
    whole = reference_layer(config)
    rows = [hidden(1, length, seed=length) for length in lengths]
    expected = [whole(row, rotary_pos_emb=angles)[0] for row in rows]
    others = [reference_layer(config, params_dtype=torch.float64)(r.double(), rotary_pos_emb=angles)[0] for r in rows]
    room = {"is_paged": True, "page_size": 4, "total_num_pages": 9} if paged else {}
    cache = reference.InferenceParams(
        3, 12, num_heads_kv=4, head_dim_k=10, dtype=torch.float32, max_ctx_len=12, qkv_format=layout, **room
    )
    outs: list[list[Tensor]] = [[], []]
    done = [0, 0]
    for steps in ([4, 7], [1, 1], [1, 1]):
        cache.pre_step(OrderedDict(enumerate(steps)))
        new = [row[0, start : start + n] for row, start, n in zip(rows, done, steps, strict=True)]
        options = {"inference_params": cache, "rotary_pos_emb": angles, "max_seqlen_q": max(steps)}
        if layout == "thd":
            own = {"cu_seqlens_q": cumulative(steps), "cu_seqlens_kv": cumulative(steps)}
            out = list(layer(torch.cat(new), **own, **options).split(steps))
        else:
            batch = torch.nn.utils.rnn.pad_sequence(new, batch_first=layout == "bshd")
            out = layer(batch, **options)
            out = list(out if layout == "bshd" else out.transpose(0, 1))
        for kept, one, n in zip(outs, out, steps, strict=True):
            kept.append(one[:n])
        done = [start + n for start, n in zip(done, steps, strict=True)]
    for kept, two, three in zip(outs, expected, others, strict=True):
        assert_near(torch.cat(kept), two, three)


def test_layers_of_the_meta_device_start_as_others_do() -> None:
    torch.manual_seed(1)
    config = config_of()
    direct = reference_layer(config, {})
    late = reference_layer(config, {}, device="meta")
    assert all(parameter.is_meta for parameter in late.parameters())
    torch.manual_seed(1)
    for module in late.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for (name, one), (_, two) in zip(direct.named_parameters(), late.named_parameters(), strict=True):
        assert torch.equal(one, two), name
