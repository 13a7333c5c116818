"""Scaled dot-product attention over the formats, masks and cache of Transformer Engine.

Every case comes down to whole sequences: a batch without padding is one block, padded or packed sequences and those
with a cache are taken one by one, so nothing can leak between them and no scores of one against another exist. What a
padding token attends to is nothing: its output is zero.

Source: TransformerEngine 2.20.2, transformer_engine/pytorch/attention/dot_product_attention/dot_product_attention.py
(`DotProductAttention.forward`), backends.py (`UnfusedDotProductAttention`), utils.py (`get_cu_seqlens`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from converters.errors import ConversionError
from converters.te.reference import distributed
from converters.te.reference.norm import compute_dtype
from converters.te.reference.parameters import Layer, refuse
from converters.te.reference.sequences import Spans, packed_spans, padded_spans, spans_of

MASKS = (
    "no_mask",
    "padding",
    "causal",
    "padding_causal",
    "causal_bottom_right",
    "padding_causal_bottom_right",
    "arbitrary",
)
FORMATS = ("sbhd", "bshd", "thd")


def attend(q: Tensor, k: Tensor, v: Tensor, masked: Tensor | None, *, scale: float, dropout: float = 0.0) -> Tensor:
    """Softmax attention, scores and softmax in float32, a key head for each group of query heads.

    Args:
        q: `[b s (g r) d]`.
        k: `[b t g d]`.
        v: `[b t g e]`.
        masked: True where a key is hidden, broadcasting to `[b (g r) s t]`; a query that sees none gets zero.
        scale: Of the scores.
        dropout: Share of the probabilities that is dropped, the rest scaled up.

    Returns:
        `[b s ((g r) e)]` in the dtype of `v`.
    """
    b, s, heads, d = q.shape
    t, groups = k.shape[1], k.shape[2]
    wide = compute_dtype(q.dtype)
    # The query heads of a group are rows of one product with that group's keys.
    rows = q.transpose(1, 2).reshape(b, groups, heads // groups * s, d).to(wide)
    scores = (rows @ k.permute(0, 2, 3, 1).to(wide)).view(b, heads, s, t) * scale
    if masked is not None:
        scores = scores.masked_fill(masked, torch.finfo(wide).min)
    probabilities = torch.softmax(scores, dim=-1)
    if masked is not None:
        probabilities = probabilities.masked_fill(masked, 0.0)
    probabilities = functional.dropout(probabilities, dropout) if dropout else probabilities
    out = probabilities.to(v.dtype).view(b, groups, heads // groups * s, t) @ v.transpose(1, 2)
    return out.view(b, heads, s, v.shape[-1]).transpose(1, 2).reshape(b, s, heads * v.shape[-1])


def causal_mask(s: int, t: int, *, bottom_right: bool, device: torch.device) -> Tensor:
    """`[s t]`, True where a key comes after its query; with `bottom_right`, the last query is at the last key."""
    query = torch.arange(s, device=device)[:, None] + (t - s if bottom_right else 0)
    return torch.arange(t, device=device)[None, :] > query


class DotProductAttention(Layer):
    """`transformer_engine.pytorch.DotProductAttention`, without parameters.

    Args:
        num_attention_heads: Query heads of all ranks.
        kv_channels: Width of a head.
        num_gqa_groups: Key-value heads of all ranks; as many as query heads where None.
        attention_dropout: Share of probabilities dropped in training.
        qkv_format: `sbhd`, `bshd` or `thd`.
        attn_mask_type: Where `forward` is given none.
        sequence_parallel: As in the linears; it changes nothing here.
        tp_size: Ranks that share the heads.
        tp_group: Those ranks.
        layer_number: Under which the cache knows this layer, from 1.
        softmax_scale: One over the root of `kv_channels` where None.

    Raises:
        ConversionError: An option that the reference lacks.
    """

    OFF: Mapping[str, object] = {
        "window_size": None,
        "bottom_right_diagonal": None,
        "softcap": 0.0,
        "get_rng_state_tracker": None,
        "attention_type": "self",
        "cp_group": None,
        "cp_global_ranks": None,
        "cp_stream": None,
        "cp_comm_type": "p2p",
        "softmax_type": "vanilla",
        "return_max_logit": False,
        "name": None,
    }

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        sequence_parallel: bool = False,
        tp_size: int = 1,
        tp_group: distributed.Group | None = None,
        layer_number: int | None = None,
        softmax_scale: float | None = None,
        **options: object,
    ) -> None:
        super().__init__(gemms=0)
        refuse("DotProductAttention", options, self.OFF, {"qkv_format": None, "attn_mask_type": None})
        self.num_attention_heads, self.kv_channels = num_attention_heads, kv_channels
        self.num_gqa_groups = num_gqa_groups or num_attention_heads
        self.attention_dropout, self.qkv_format, self.attn_mask_type = attention_dropout, qkv_format, attn_mask_type
        self.layer_number = layer_number
        self.softmax_scale = 1.0 / math.sqrt(kv_channels) if softmax_scale is None else softmax_scale
        self.cp_group: distributed.Group | None = None
        self.cp_comm_type = "p2p"

    def set_context_parallel_group(
        self,
        cp_group: distributed.Group | None,
        cp_global_ranks: list[int] | None,
        cp_stream: object,
        cp_comm_type: str = "p2p",
    ) -> None:
        """The ranks that share each sequence; ranks' numbers and stream are Transformer Engine's, not needed here.

        Raises:
            ConversionError: A hierarchical group.
        """
        if isinstance(cp_group, list):
            raise ConversionError("expected one context-parallel group, found a list; a2a+p2p is not in the reference")
        self.cp_group, self.cp_comm_type = cp_group, cp_comm_type

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        inference_params: Any = None,
        pad_between_seqs: bool | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query_layer: `[s b h d]`, `[b s h d]` or `[t h d]`; keys and values with `g` heads.
            key_layer: As the queries.
            value_layer: As the queries.
            attention_mask: True where masked: `[b 1 1 s]` at padding, or any that broadcasts to `[b h s t]` for
                `arbitrary`. Not looked at where `cu_seqlens_q` or a cache gives the lengths.
            qkv_format: Instead of the layer's own.
            cu_seqlens_q: `[b + 1]`, int32: sums of the sequences' lengths, without padding.
            cu_seqlens_kv: The same of keys and values.
            cu_seqlens_q_padded: `[b + 1]`, int32: where the sequences begin, with padding.
            cu_seqlens_kv_padded: The same of keys and values.
            max_seqlen_q: At least the longest sequence.
            max_seqlen_kv: At least the longest of keys.
            attn_mask_type: Instead of the layer's own.
            inference_params: A cache, which takes the keys and values in and gives back all of them.
            pad_between_seqs: Whether there is padding between packed sequences.

        Returns:
            `[... (h d)]`, in the format of the queries.

        Raises:
            ConversionError: Masks, formats or lengths that do not go together.
        """
        kind, layout = attn_mask_type or self.attn_mask_type, qkv_format or self.qkv_format
        if kind not in MASKS or layout not in FORMATS:
            raise ConversionError(f"expected a mask of {MASKS} in a format of {FORMATS}, found {kind!r} in {layout!r}")
        if layout == "thd" and "padding" not in kind:
            raise ConversionError(
                f"packed (thd) sequences need self_attn_mask_type 'padding' or 'padding_causal', found {kind!r}"
            )
        if self.cp_group is not None and distributed.world_size(self.cp_group) > 1:
            from converters.te.reference import context

            return context.attention(
                query_layer,
                key_layer,
                value_layer,
                group=self.cp_group,
                qkv_format=layout,
                attn_mask_type=kind,
                softmax_scale=self.softmax_scale,
                attention_mask=attention_mask,
                cu_seqlens_q=cu_seqlens_q,
                cu_seqlens_kv=cu_seqlens_kv,
                cu_seqlens_q_padded=cu_seqlens_q_padded,
                cu_seqlens_kv_padded=cu_seqlens_kv_padded,
                pad_between_seqs=pad_between_seqs,
                dropout=self.attention_dropout if self.training else 0.0,
                inference_params=inference_params,
            )
        if layout == "sbhd":
            query_layer, key_layer, value_layer = (x.transpose(0, 1) for x in (query_layer, key_layer, value_layer))
        if inference_params is not None:
            kind = _bottom_right(kind)
            key_layer, value_layer, cu_seqlens_q, cu_seqlens_kv, *_ = inference_params.step(
                self.layer_number,
                key_layer.contiguous(),
                value_layer.contiguous(),
                "bshd" if layout == "sbhd" else layout,
            )
            if inference_params.is_paged:
                key_layer, value_layer = inference_params.convert_paged_to_nonpaged(self.layer_number)
            # The cache's lengths go on after the batch, with zeros, up to the most sequences that it can hold.
            cu_seqlens_q, cu_seqlens_kv = cu_seqlens_q[: len(key_layer) + 1], cu_seqlens_kv[: len(key_layer) + 1]
            if layout == "thd":
                queries = packed_spans(len(query_layer), cu_seqlens_q, None)
            else:
                queries = padded_spans(len(query_layer), query_layer.shape[1], cu_seqlens_q)
            keys = padded_spans(len(key_layer), key_layer.shape[1], cu_seqlens_kv)
            out = self._one_by_one(query_layer, key_layer, value_layer, queries, keys, kind)
        elif layout == "thd":
            queries = packed_spans(len(query_layer), cu_seqlens_q, cu_seqlens_q_padded, max_seqlen_q, pad_between_seqs)
            keys = packed_spans(len(key_layer), cu_seqlens_kv, cu_seqlens_kv_padded, max_seqlen_kv, pad_between_seqs)
            out = self._one_by_one(query_layer, key_layer, value_layer, queries, keys, kind)
        elif "padding" in kind:
            queries = spans_of(attention_mask, cu_seqlens_q, query_layer)
            keys = spans_of(attention_mask, cu_seqlens_kv, key_layer)
            out = self._one_by_one(query_layer, key_layer, value_layer, queries, keys, kind)
        else:
            out = self._block(query_layer, key_layer, value_layer, kind, _masked(kind, attention_mask))
        return out.transpose(0, 1) if layout == "sbhd" else out

    def _one_by_one(self, q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, kind: str) -> Tensor:
        """Each sequence against its own keys, put back at its place with zeros at padding."""
        if len(queries.spans) != len(keys.spans):
            raise ConversionError(
                f"expected as many sequences of queries as of keys, found {len(queries.spans)} and {len(keys.spans)}"
            )
        outs = [
            self._block(a[None], b[None], c[None], kind, None)[0] if len(a) else a.flatten(1)
            for a, b, c in zip(queries.take(q), keys.take(k), keys.take(v), strict=True)
        ]
        return queries.put(outs)

    def _block(self, q: Tensor, k: Tensor, v: Tensor, kind: str, masked: Tensor | None) -> Tensor:
        if "causal" in kind:
            bottom_right = kind.endswith("bottom_right")
            masked = causal_mask(q.shape[1], k.shape[1], bottom_right=bottom_right, device=q.device)
        dropout = self.attention_dropout if self.training else 0.0
        return attend(q, k, v, masked, scale=self.softmax_scale, dropout=dropout)


def _bottom_right(kind: str) -> str:
    """With a cache the last query stands at the last key, whatever the corner that a causal mask starts from."""
    if "padding" not in kind:
        raise ConversionError(
            f"a key-value cache needs self_attn_mask_type 'padding_causal' (or 'padding'), found {kind!r}: only with "
            "padding does Transformer Engine look at the lengths of what is cached"
        )
    return "padding_causal_bottom_right" if kind == "padding_causal" else kind


def _masked(kind: str, attention_mask: Tensor | None) -> Tensor | None:
    if kind == "arbitrary":
        if attention_mask is None or attention_mask.dtype != torch.bool:
            found = "none" if attention_mask is None else attention_mask.dtype
            raise ConversionError(f"self_attn_mask_type 'arbitrary' needs a bool attention_mask, found {found}")
        return attention_mask
    if attention_mask is not None and bool(attention_mask.any()):
        raise ConversionError(
            f"attention_mask masks tokens, which self_attn_mask_type {kind!r} would not look at; "
            "use 'padding_causal', 'padding' or 'arbitrary'"
        )
    return None
