"""Which modules a Megatron-Core layer is made of: the one switch between Transformer Engine and the local ones."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any, Literal

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from converters.errors import ConfigError
from converters.megatron.attention import ContextParallelAttention

LayerSpec = Literal["auto", "local", "te"]

# Kernels that only CUDA, Apex or Transformer Engine have. None of them changes what is computed.
WITHOUT_FUSED_KERNELS: dict[str, Any] = {
    "gradient_accumulation_fusion": False,  # Apex
    "masked_softmax_fusion": False,  # Megatron-Core's own CUDA kernels
    "bias_activation_fusion": False,  # torch.compile
    "bias_dropout_fusion": False,  # torch.compile
    "apply_rope_fusion": False,  # Transformer Engine
    "cross_entropy_loss_fusion": False,  # torch.compile
    "persist_layer_norm": False,  # Apex
    "memory_efficient_layer_norm": False,  # Apex
    "tp_comm_overlap": False,  # Transformer Engine
}


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, built as Megatron-Core builds a norm, also under sequence parallelism.

    Megatron-Core wraps the same torch module but refuses sequence parallelism, for which a norm only needs its weight
    marked: each rank then sees part of the tokens, and the gradients are summed over the tensor-parallel group.

    Source: NVIDIA/Megatron-LM core_v0.16.1, megatron/core/transformer/torch_norm.py `WrappedTorchNorm` and
        distributed/finalize_model_grads.py `_allreduce_non_tensor_model_parallel_grads`.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def resolve(layer_spec: LayerSpec) -> Literal["local", "te"]:
    """The layers to build: as asked, or by what this process has.

    Raises:
        ConfigError: Transformer Engine layers without a GPU, or without Transformer Engine.
    """
    chosen = layer_spec
    if chosen == "auto":
        chosen = "te" if torch.cuda.is_available() else "local"
    if chosen == "te" and not torch.cuda.is_available():
        raise ConfigError("layer_spec='te' needs a GPU: Transformer Engine has no CPU kernels. Use layer_spec='local'")
    if chosen == "te" and importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError("Transformer Engine layers need the package transformer_engine; or set layer_spec='local'")
    return chosen


def block_spec(config: Any, *, vp_stage: int | None, pp_rank: int) -> Any:
    """The layers and the final norm of one model chunk, for `GPTModel`.

    Args:
        config: A finalised provider.
        vp_stage: Model chunk under interleaving, or `None`.
        pp_rank: Pipeline stage.

    Raises:
        ConfigError: See `resolve`; or local layers with a normalisation other than RMSNorm.
    """
    if resolve(config.layer_spec) == "te":
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    if config.normalization != "RMSNorm":
        raise ConfigError(f"local layers are built for normalization='RMSNorm', found {config.normalization!r}")
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    layer.submodules = replace(layer.submodules, input_layernorm=RMSNorm, pre_mlp_layernorm=RMSNorm)
    if config.context_parallel_size > 1:
        layer.submodules.self_attention.submodules.core_attention = ContextParallelAttention
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)
