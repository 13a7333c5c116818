"""`transformer_engine.pytorch.MultiheadAttention`: QKV, rotary positions, attention, projection.

Source: TransformerEngine 2.20.2, transformer_engine/pytorch/attention/multi_head_attention.py, `MultiheadAttention`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from converters.errors import ConversionError
from converters.te.reference import distributed
from converters.te.reference.attention import DotProductAttention
from converters.te.reference.layernorm_linear import LayerNormLinear
from converters.te.reference.linear import Linear
from converters.te.reference.parameters import Init, part, refuse
from converters.te.reference.rope import apply_rotary_pos_emb


class MultiheadAttention(torch.nn.Module):
    """Self-attention with its linears; the arguments are those of `TransformerLayer`.

    Args:
        input_layernorm: The norm is part of the layer; the reference has only that.
        return_bias: Leave the projection's bias to the caller: `forward` returns `(y, bias)`.
        qkv_format: `attn_input_format` of `TransformerLayer`.

    Raises:
        ConversionError: An option that the reference lacks, or sizes that do not divide.
    """

    OFF: Mapping[str, object] = {
        "window_size": None,
        "bottom_right_diagonal": None,
        "softcap": 0.0,
        "fuse_wgrad_accumulation": False,
        "get_rng_state_tracker": None,
        "return_layernorm_output": False,
        "attention_type": "self",
        "ub_overlap_ag": False,
        "ub_overlap_rs": False,
        "ub_overlap_rs_dgrad": False,
        "ub_bulk_dgrad": False,
        "ub_bulk_wgrad": False,
        "name": None,
        "qk_norm_type": None,
        "qk_norm_eps": 1e-6,
        "qk_norm_before_rope": False,
        "seq_length": None,
        "micro_batch_size": None,
        "softmax_type": "vanilla",
    }

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        kv_channels: int | None = None,
        attention_dropout: float = 0.1,
        layernorm_epsilon: float = 1e-5,
        init_method: Init | None = None,
        output_layer_init_method: Init | None = None,
        layer_number: int | None = None,
        attn_mask_type: str = "causal",
        tp_group: distributed.Group | None = None,
        tp_size: int = 1,
        num_gqa_groups: int | None = None,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        return_bias: bool = False,
        input_layernorm: bool = False,
        set_parallel_mode: bool = False,
        fuse_qkv_params: bool = False,
        zero_centered_gamma: bool = False,
        qkv_weight_interleaved: bool = True,
        rotary_pos_interleaved: bool = False,
        bias: bool = True,
        normalization: str = "LayerNorm",
        device: torch.device | str | None = None,
        qkv_format: str = "sbhd",
        **options: object,
    ) -> None:
        super().__init__()
        refuse("MultiheadAttention", options, self.OFF, {"attn_mask_type": None, "qkv_format": None})
        if layer_number is not None and layer_number < 1:
            raise ConversionError(f"expected layer_number to count from 1, found {layer_number}")
        self.layer_number = 1 if layer_number is None else layer_number
        self.attn_mask_type, self.qkv_format, self.return_bias = attn_mask_type, qkv_format, return_bias
        self.tp_size = tp_size if tp_group is None else distributed.world_size(tp_group)
        self.cp_group: distributed.Group | None = None
        self.qkv_weight_interleaved = qkv_weight_interleaved and fuse_qkv_params
        self.rotary_pos_interleaved = rotary_pos_interleaved

        groups = num_attention_heads if num_gqa_groups is None else num_gqa_groups
        self.queries_per_group = part(num_attention_heads, groups, what=f"num_attention_heads (over {groups} groups)")
        self.groups = part(groups, self.tp_size, what="num_gqa_groups")
        self.head_dim = kv_channels if kv_channels else hidden_size // num_attention_heads
        # By Transformer Engine's names, from which a cache takes its sizes.
        self.num_gqa_groups_per_partition, self.hidden_size_per_attention_head = self.groups, self.head_dim
        split = {"query": num_attention_heads, "key": groups, "value": groups}
        shared: dict[str, Any] = {
            "tp_group": tp_group,
            "tp_size": tp_size,
            "sequence_parallel": sequence_parallel,
            "params_dtype": params_dtype,
            "bias": bias,
            "device": device,
        }
        whole = (num_attention_heads + 2 * groups) * self.head_dim
        qkv: dict[str, Any] = {
            "init_method": init_method,
            "parallel_mode": "column" if set_parallel_mode else None,
            "parameters_split": None if fuse_qkv_params else {n: s * self.head_dim for n, s in split.items()},
            **shared,
        }
        if input_layernorm:
            self.layernorm_qkv: torch.nn.Module = LayerNormLinear(
                hidden_size,
                whole,
                eps=layernorm_epsilon,
                normalization=normalization,
                zero_centered_gamma=zero_centered_gamma,
                **qkv,
            )
        else:
            self.qkv: torch.nn.Module = Linear(hidden_size, whole, **qkv)
        self.core_attention = DotProductAttention(
            num_attention_heads,
            self.head_dim,
            num_gqa_groups=groups,
            attention_dropout=attention_dropout,
            qkv_format=qkv_format,
            attn_mask_type=attn_mask_type,
            tp_size=self.tp_size,
            layer_number=self.layer_number,
        )
        self.proj = Linear(
            num_attention_heads * self.head_dim,
            hidden_size,
            init_method=output_layer_init_method,
            return_bias=return_bias,
            parallel_mode="row" if set_parallel_mode else None,
            **shared,
        )

    def set_tensor_parallel_group(self, tp_group: distributed.Group | None) -> None:
        """The ranks that share the layer."""
        for child in self.children():
            if isinstance(child, (Linear, LayerNormLinear)):
                child.set_tensor_parallel_group(tp_group)

    def set_context_parallel_group(
        self,
        cp_group: distributed.Group | None,
        cp_global_ranks: list[int] | None,
        cp_stream: object,
        cp_comm_type: str = "p2p",
    ) -> None:
        """The ranks that share each sequence."""
        self.core_attention.set_context_parallel_group(cp_group, cp_global_ranks, cp_stream, cp_comm_type)
        self.cp_group = cp_group

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: str | None = None,
        is_first_microbatch: bool | None = None,
        inference_params: Any = None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        pad_between_seqs: bool | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """`[... h]` to `[... h]`, and the projection's bias where `return_bias`; see `TransformerLayer.forward`.

        Raises:
            ConversionError: Masks and lengths that do not go together.
        """
        if inference_params is not None and self.layer_number not in inference_params.cache_manager.cache:
            inference_params.allocate_memory(self.layer_number)
        linear = self.layernorm_qkv if hasattr(self, "layernorm_qkv") else self.qkv
        query, key, value = self._split(linear(hidden_states, is_first_microbatch=is_first_microbatch))
        if rotary_pos_emb is not None:
            q_angles, k_angles = rotary_pos_emb if isinstance(rotary_pos_emb, tuple) else (rotary_pos_emb,) * 2
            between = pad_between_seqs and cu_seqlens_q_padded is not None
            place: dict[str, Any] = {
                "start_positions": None if inference_params is None else inference_params.get_seqlens_pre_step(),
                "interleaved": self.rotary_pos_interleaved,
                "cp_size": distributed.world_size(self.cp_group),
                "cp_rank": distributed.rank_in(self.cp_group),
            }
            starts = (cu_seqlens_q_padded, cu_seqlens_kv_padded) if between else (cu_seqlens_q, cu_seqlens_kv)
            query = apply_rotary_pos_emb(query, q_angles, self.qkv_format, cu_seqlens=starts[0], **place)
            key = apply_rotary_pos_emb(key, k_angles, self.qkv_format, cu_seqlens=starts[1], **place)
        context = self.core_attention(
            query,
            key,
            value,
            attention_mask=attention_mask,
            qkv_format=self.qkv_format,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_kv=cu_seqlens_kv,
            cu_seqlens_q_padded=cu_seqlens_q_padded,
            cu_seqlens_kv_padded=cu_seqlens_kv_padded,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_kv=max_seqlen_kv,
            attn_mask_type=attn_mask_type or self.attn_mask_type,
            inference_params=inference_params,
            pad_between_seqs=pad_between_seqs,
        )
        out: Tensor | tuple[Tensor, Tensor | None] = self.proj(context, is_first_microbatch=is_first_microbatch)
        return out

    def _split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of QKV to `[... h d]`, `[... g d]`, `[... g d]`."""
        parts = (self.queries_per_group, 1, 1)
        if self.qkv_weight_interleaved:
            shape, dim = (self.groups, sum(parts), self.head_dim), -2
        else:
            shape, dim = (sum(parts), self.groups, self.head_dim), -3
        query, key, value = mixed.view(*mixed.shape[:-1], *shape).split(parts, dim=dim)
        return query.flatten(-3, -2), key.flatten(-3, -2), value.flatten(-3, -2)
