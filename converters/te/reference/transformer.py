"""`transformer_engine.pytorch.TransformerLayer` and its `MultiheadAttention`, of an encoder-type (decoder-only) model.

Source: TransformerEngine 2.20.2, transformer_engine/pytorch/transformer.py, `TransformerLayer`;
transformer_engine/pytorch/attention/multi_head_attention.py, `MultiheadAttention`; pytorch/jit.py, `bias_dropout_add`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from converters.errors import ConversionError
from converters.te.reference import distributed
from converters.te.reference.layernorm_linear import LayerNormLinear
from converters.te.reference.layernorm_mlp import LayerNormMLP
from converters.te.reference.linear import Linear
from converters.te.reference.multi_head_attention import MultiheadAttention
from converters.te.reference.norm import compute_dtype
from converters.te.reference.parameters import Init, refuse


def bias_dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor, dropout: float, training: bool) -> Tensor:
    """`residual + dropout(x + bias)`, rounded once: Transformer Engine compiles it into one kernel."""
    wide = compute_dtype(x.dtype)
    total = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
    total = functional.dropout(total, dropout, training) if dropout else total
    return (residual.to(wide) + total).to(x.dtype)


class TransformerLayer(torch.nn.Module):
    """Attention and MLP, each after its norm and added to its input.

    Args:
        hidden_size: Of activations between layers.
        ffn_hidden_size: Inside the MLP.
        num_attention_heads: Query heads of all ranks.
        num_gqa_groups: Key-value heads of all ranks; as many as query heads where None.
        layernorm_epsilon: Of both norms.
        hidden_dropout: Share of each block's output that is dropped in training.
        attention_dropout: Share of attention probabilities that is dropped in training.
        init_method: Sets the first value of the weights of QKV and fc1, in place.
        output_layer_init_method: Those of proj and fc2.
        layer_number: From 1; the cache's name for this layer.
        kv_channels: Width of a head; `hidden_size / num_attention_heads` where None.
        self_attn_mask_type: One of `attention.MASKS`, where `forward` is given none.
        tp_group: The ranks that share the layer.
        tp_size: How many where the group comes later, by `set_tensor_parallel_group`.
        params_dtype: Of parameters; torch's default dtype where None.
        sequence_parallel: Activations between blocks are cut over those ranks, along their first dimension.
        set_parallel_mode: Cut QKV and fc1 by rows, proj and fc2 by columns.
        fuse_qkv_params: One parameter for QKV, or `query_`, `key_` and `value_` ones.
        rotary_pos_interleaved: Neighbouring dims rotate against each other, not halves.
        zero_centered_gamma: Norms' weights are stored less one.
        qkv_weight_interleaved: Rows of QKV are `[group (query.. key value) dim]`, or `[(query.. key value) group dim]`.
        bias: Of all four linears.
        activation: Of the MLP.
        normalization: `RMSNorm` or `LayerNorm`.
        device: Where parameters are made; `meta` leaves them to each layer's `reset_parameters`.
        attn_input_format: `sbhd`, `bshd` or `thd`.

    Raises:
        ConversionError: An option that the reference lacks, or sizes that do not divide.
    """

    OFF: Mapping[str, object] = {
        "window_size": None,
        "bottom_right_diagonal": None,
        "softcap": 0.0,
        "enc_dec_attn_mask_type": "no_mask",
        "enc_dec_bottom_right_diagonal": None,
        "enc_dec_window_size": None,
        "get_rng_state_tracker": None,
        "fuse_wgrad_accumulation": False,
        "seq_length": None,
        "micro_batch_size": None,
        "apply_residual_connection_post_layernorm": False,
        "output_layernorm": False,
        "parallel_attention_mlp": False,
        "layer_type": "encoder",
        "drop_path_rate": 0.0,
        "ub_tp_comm_overlap": False,
        "ub_overlap_ag": True,
        "ub_overlap_rs": True,
        "ub_overlap_rs_dgrad": False,
        "ub_bulk_dgrad": True,
        "ub_bulk_wgrad": True,
        "activation_params": None,
        "name": None,
        "qk_norm_type": None,
        "qk_norm_eps": 1e-6,
        "qk_norm_before_rope": False,
        "softmax_type": "vanilla",
    }
    FORWARD_OFF: Mapping[str, object] = {
        "window_size": None,
        "bottom_right_diagonal": None,
        "encoder_output": None,
        "enc_dec_attn_mask": None,
        "enc_dec_attn_mask_type": None,
        "enc_dec_window_size": None,
        "enc_dec_bottom_right_diagonal": None,
        "checkpoint_core_attention": False,
        "core_attention_bias_type": "no_bias",
        "core_attention_bias": None,
        "alibi_slopes": None,
        "fast_zero_fill": True,
        "thd_attention_policies": None,
        "thd_attention_policy_dispatch": "auto",
        "softcap": None,
    }

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        num_attention_heads: int,
        num_gqa_groups: int | None = None,
        layernorm_epsilon: float = 1e-5,
        hidden_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        init_method: Init | None = None,
        output_layer_init_method: Init | None = None,
        layer_number: int | None = None,
        kv_channels: int | None = None,
        self_attn_mask_type: str = "causal",
        tp_group: distributed.Group | None = None,
        tp_size: int = 1,
        params_dtype: torch.dtype | None = None,
        sequence_parallel: bool = False,
        set_parallel_mode: bool = False,
        fuse_qkv_params: bool = False,
        rotary_pos_interleaved: bool = False,
        zero_centered_gamma: bool = False,
        qkv_weight_interleaved: bool = True,
        bias: bool = True,
        activation: str = "gelu",
        normalization: str = "LayerNorm",
        device: torch.device | str | None = None,
        attn_input_format: str = "sbhd",
        **options: object,
    ) -> None:
        super().__init__()
        refuse("TransformerLayer", options, self.OFF, {"attn_input_format": None, "self_attn_mask_type": None})
        self.self_attn_mask_type, self.layer_number = self_attn_mask_type, layer_number
        self.hidden_dropout = hidden_dropout
        shared: dict[str, Any] = {
            "init_method": init_method,
            "output_layer_init_method": output_layer_init_method,
            "tp_group": tp_group,
            "tp_size": tp_size,
            "sequence_parallel": sequence_parallel,
            "set_parallel_mode": set_parallel_mode,
            "params_dtype": params_dtype,
            "zero_centered_gamma": zero_centered_gamma,
            "bias": bias,
            "return_bias": True,
            "normalization": normalization,
            "device": device,
        }
        self.self_attention = MultiheadAttention(
            hidden_size,
            num_attention_heads,
            kv_channels=kv_channels,
            attention_dropout=attention_dropout,
            layernorm_epsilon=layernorm_epsilon,
            layer_number=layer_number,
            attn_mask_type=self_attn_mask_type,
            num_gqa_groups=num_gqa_groups,
            input_layernorm=True,
            fuse_qkv_params=fuse_qkv_params,
            qkv_weight_interleaved=qkv_weight_interleaved,
            rotary_pos_interleaved=rotary_pos_interleaved,
            qkv_format=attn_input_format,
            **shared,
        )
        self.layernorm_mlp = LayerNormMLP(
            hidden_size, ffn_hidden_size, eps=layernorm_epsilon, activation=activation, **shared
        )

    def set_tensor_parallel_group(self, tp_group: distributed.Group | None) -> None:
        """The ranks that share the layer."""
        for child in self.modules():
            if isinstance(child, (Linear, LayerNormLinear, LayerNormMLP)):
                child.set_tensor_parallel_group(tp_group)

    def set_context_parallel_group(
        self,
        cp_group: distributed.Group | None,
        cp_global_ranks: list[int] | None,
        cp_stream: object,
        cp_comm_type: str = "p2p",
    ) -> None:
        """The ranks that share each sequence."""
        self.self_attention.set_context_parallel_group(cp_group, cp_global_ranks, cp_stream, cp_comm_type)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        self_attn_mask_type: str | None = None,
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
        **options: object,
    ) -> Tensor:
        """Apply the layer.

        Args:
            hidden_states: `[s b h]`, `[b s h]` or `[t h]`.
            attention_mask: See `DotProductAttention.forward`.
            self_attn_mask_type: Instead of the layer's own.
            is_first_microbatch: See `Module.gemm`.
            inference_params: A cache, after its `pre_step`.
            rotary_pos_emb: Angles `[s2 1 1 d]`, float32, of all positions from zero.
            cu_seqlens_q: Lengths, as in `DotProductAttention.forward`; they hold for keys too.
            cu_seqlens_kv: As `cu_seqlens_q` or None (Transformer Engine uses it for cross attention only).
            cu_seqlens_q_padded: Where packed sequences begin.
            cu_seqlens_kv_padded: As `cu_seqlens_q_padded` or None.
            max_seqlen_q: At least the longest sequence.
            max_seqlen_kv: As `max_seqlen_q` or None.
            pad_between_seqs: Whether there is padding between packed sequences.
            options: Transformer Engine's others, each only at its default.

        Returns:
            As `hidden_states`.

        Raises:
            ConversionError: An option that the reference lacks, or masks and lengths that do not go together.
        """
        refuse("TransformerLayer.forward", options, self.FORWARD_OFF, {"self_attn_mask_type": None})
        for name, q, kv in (
            ("cu_seqlens", cu_seqlens_q, cu_seqlens_kv),
            ("cu_seqlens_padded", cu_seqlens_q_padded, cu_seqlens_kv_padded),
        ):
            if kv is not None and kv is not q and (q is None or not torch.equal(q, kv)):
                raise ConversionError(
                    f"{name}: self-attention has the lengths of its queries for keys too (in Transformer Engine the "
                    "others serve cross attention only), but those given for q and kv differ; give the same"
                )
        x, bias = self.self_attention(
            hidden_states,
            attention_mask=attention_mask,
            attn_mask_type=self_attn_mask_type or self.self_attn_mask_type,
            is_first_microbatch=is_first_microbatch,
            inference_params=inference_params,
            rotary_pos_emb=rotary_pos_emb,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_kv=cu_seqlens_q,
            cu_seqlens_q_padded=cu_seqlens_q_padded,
            cu_seqlens_kv_padded=cu_seqlens_q_padded,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_kv=max_seqlen_q,
            pad_between_seqs=pad_between_seqs,
        )
        residual = bias_dropout_add(x, bias, hidden_states, self.hidden_dropout, self.training)
        x, bias = self.layernorm_mlp(residual, is_first_microbatch=is_first_microbatch)
        return bias_dropout_add(x, bias, residual, self.hidden_dropout, self.training)
