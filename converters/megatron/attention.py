"""Core attention under context parallelism for Megatron-Core's local layers, which refuse it themselves."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import attention_mask_func

from converters.errors import ConfigError
from converters.zigzag import zigzag_order, zigzag_positions


class ContextParallelAttention(MegatronModule):  # type: ignore[misc]  # megatron-core is untyped
    """Attention of this rank's queries over the whole context, keys and values gathered from the CP group.

    Causal, or by an explicit mask.

    The arithmetic follows Megatron-Core's local `DotProductAttention` step by step (scaled scores in the activations'
    dtype, softmax in float32 where the config says so), so that the two differ by the order of summation alone.

    Raises:
        ConfigError: The config asks for what this attention does not do.

    Source: NVIDIA/Megatron-LM core_v0.16.1, megatron/core/transformer/dot_product_attention.py `DotProductAttention`,
        and for how a mask is cut megatron/core/utils.py `get_batch_on_this_cp_rank`.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        refused = {
            f"attention_dropout={dropout} (its mask would repeat on every context-parallel rank)": dropout > 0,
            f"attention_type={attention_type!r}": attention_type != "self",
            f"mask type {attn_mask_type}": "causal" not in str(attn_mask_type),
            f"window_size={config.window_size}": config.window_size is not None,
            f"softmax_type={config.softmax_type!r}": config.softmax_type != "vanilla",
            "apply_query_key_layer_scaling": config.apply_query_key_layer_scaling,
        }
        if any(refused.values()):
            asked = "; ".join(name for name, on in refused.items() if on)
            raise ConfigError(f"layer {layer_number}: local attention under context parallelism does not do {asked}")
        self.group = pg_collection.cp if pg_collection is not None else parallel_state.get_context_parallel_group()
        self.scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        self.softmax_in_fp32 = config.attention_softmax_in_fp32

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: `[s/cp b heads/tp d]`, rotated.
            key: `[s/cp b groups/tp d]`, rotated.
            value: `[s/cp b groups/tp d]`.
            attention_mask: `[b 1 s/cp s]` bool, true where a key is hidden: this rank's queries by all keys, these in
                the order of the sequence; as Megatron-Core cuts a mask for context parallelism. `None` is causal.
            attn_mask_type: Ignored, as in Megatron-Core's own.
            attention_bias: Must be `None`.
            packed_seq_params: Must be `None`.

        Returns:
            `[s/cp b (heads d)/tp]`, in the dtype of `query`.
        """
        given = {"attention_bias": attention_bias, "packed_seq_params": packed_seq_params}
        if extra := [name for name, item in given.items() if item is not None]:
            raise ConfigError(f"local attention under context parallelism takes a mask only, found {', '.join(extra)}")
        size, rank = self.group.size(), self.group.rank()
        key = gather_from_sequence_parallel_region(key.contiguous(), group=self.group)
        value = gather_from_sequence_parallel_region(value.contiguous(), group=self.group)
        repeats = query.size(2) // key.size(2)
        key, value = key.repeat_interleave(repeats, dim=2), value.repeat_interleave(repeats, dim=2)

        queries, batch, heads, channels = query.shape
        keys = key.size(0)
        # [s b n d] -> [b*n s d]
        q, k, v = (t.reshape(t.size(0), batch * heads, channels).transpose(0, 1) for t in (query, key, value))
        scores = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0.0, alpha=self.scale)
        order = zigzag_order(keys, size)  # the gathered keys', which a mask does not have
        if attention_mask is None:
            hidden = order > zigzag_positions(keys, size, rank)[:, None]  # [queries keys]
        elif attention_mask.shape != (batch, 1, queries, keys):
            expected = [batch, 1, queries, keys]
            raise ConfigError(f"expected an attention mask {expected}, found {list(attention_mask.shape)}")
        else:
            hidden = attention_mask.index_select(3, order.to(attention_mask.device))
        dtype = scores.dtype
        if self.softmax_in_fp32:
            scores = scores.float()
        scores = attention_mask_func(scores.view(batch, heads, queries, keys), hidden.to(scores.device))
        weights = torch.softmax(scores, dim=-1).to(dtype).view(batch * heads, queries, keys)
        context = torch.bmm(weights, v).view(batch, heads, queries, channels)
        return context.permute(2, 0, 1, 3).reshape(queries, batch, heads * channels)
