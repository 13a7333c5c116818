"""How Megatron-LM and Megatron-Bridge spell the fields of a ledger, and which of their fields change what a model is.

Sources:
    args: NVIDIA/Megatron-LM core_v0.16.1 and 2026-08, megatron/training/arguments.py
        (`core_transformer_config_from_args`: what an argument becomes), checkpointing.py
        (`load_args_from_checkpoint`: which of them `--use-checkpoint-args` reads) and argument_utils.py
        (`gpt_config_from_args`).
    run_config: NVIDIA-NeMo/Megatron-Bridge 2026-08, src/megatron/bridge/models/gpt_provider.py `GPTModelProvider`.
    defaults: megatron/core/transformer/transformer_config.py `TransformerConfig`, core_v0.16.1 and core_v0.19.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

REQUIRED: Any = object()
"""A field that settings without it do not describe a model."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One Megatron field of the ledger, in both spellings.

    Attributes:
        field: Its name in the ledger.
        default: What Megatron takes where the settings do not say.
        args: Its names in Megatron-LM's arguments. All are written; those that are there must agree.
        model: Its names in the `model` section of Megatron-Bridge's `run_config.yaml`, likewise.
        negated: The arguments state the opposite.
        computes: Other values make another function of the same weights; else it says how a run was trained.
    """

    field: str
    default: Any
    args: tuple[str, ...] = ()
    model: tuple[str, ...] = ()
    negated: bool = False
    computes: bool = True

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names in Megatron-LM's arguments."""
        return self.args or (self.field,)

    @property
    def members(self) -> tuple[str, ...]:
        """Names in `run_config.yaml`."""
        return self.model or (self.field,)


ROWS = (
    Setting(field="num_layers", default=REQUIRED),
    Setting(field="hidden_size", default=REQUIRED),
    Setting(field="num_attention_heads", default=REQUIRED),
    Setting(field="ffn_hidden_size", default=REQUIRED),
    Setting(field="vocab_size", default=REQUIRED),
    Setting(field="num_query_groups", default=None),
    Setting(field="kv_channels", default=None),
    Setting(
        field="max_position_embeddings",
        default=REQUIRED,
        args=("max_position_embeddings", "seq_length"),
        model=("max_position_embeddings", "seq_length"),
        computes=False,
    ),
    Setting(field="init_method_std", default=0.02, computes=False),
    Setting(field="layernorm_epsilon", default=1e-5, args=("layernorm_epsilon", "norm_epsilon")),
    Setting(
        field="layernorm_zero_centered_gamma",
        default=False,
        args=("layernorm_zero_centered_gamma", "apply_layernorm_1p"),
    ),
    Setting(
        field="share_embeddings_and_output_weights",
        default=True,
        args=("untie_embeddings_and_output_weights",),
        negated=True,
    ),
    Setting(field="attention_dropout", default=0.1, computes=False),
    Setting(field="hidden_dropout", default=0.1, computes=False),
    Setting(field="normalization", default="LayerNorm"),
    Setting(field="add_bias_linear", default=True),
    Setting(field="add_qkv_bias", default=False),
    Setting(field="zero_biases", default="none"),
    Setting(field="activation_func", default="gelu"),
    Setting(field="gated_linear_unit", default=False),
    Setting(field="position_embedding_type", default="learned_absolute"),
    Setting(field="rotary_base", default=10000),
    Setting(field="rotary_percent", default=1.0),
    Setting(field="rotary_interleaved", default=False),
    Setting(field="rope_scaling", default=False, args=("use_rope_scaling",)),
    Setting(field="rope_scaling_factor", default=None),
    Setting(field="rope_low_freq_factor", default=1.0),
    Setting(field="rope_high_freq_factor", default=4.0),
    Setting(field="rope_original_max_position_embeddings", default=8192),
    Setting(
        field="seq_len_interpolation_factor",
        default=None,
        args=("rotary_seq_len_interpolation_factor", "seq_len_interpolation_factor"),
    ),
    Setting(field="params_dtype", default="float32", computes=False),
    Setting(field="bf16", default=False, computes=False),
    Setting(field="fp16", default=False, computes=False),
)

HARD_CODED = {
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_max_position_embeddings": 8192,
}
"""Of Llama 3's rope scaling, Megatron takes only the factor.

Source: NVIDIA/Megatron-LM core_v0.19.2, megatron/core/models/common/embeddings/rotary_pos_embedding.py,
    `RotaryEmbedding._apply_scaling`.
"""

SWITCHES = {
    "num_moe_experts": None,
    "multi_latent_attention": False,
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "window_size": None,
    "window_attn_skip_freq": None,
    "no_rope_freq": None,
    "mrope_section": None,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "linear_attention_freq": None,
    "is_hybrid_model": False,
    "heterogeneous_block_specs": False,
    "mtp_num_layers": None,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "apply_residual_connection_post_layernorm": False,
    "use_mup": False,
    "squared_relu": False,
    "quick_geglu": False,
    "openai_gelu": False,
    "heterogeneous_layers_config_path": None,
    "heterogeneous_layers_config_encoded_json": None,
    "hybrid_layer_pattern": None,
    "hybrid_override_pattern": None,
    "add_position_embedding": True,
}
"""Fields and arguments that make another model, with the value that leaves it as it is.

Values other than these, and than `None` and `False`, are refused by the ledger, which has no row for them.
"""
ARGUMENT_OF = {"num_moe_experts": "num_experts"}
"""Arguments of another name than their field."""

EXECUTION = (
    *("*_parallel_*", "*_context_parallel*", "*gtp_*", "max_seqlen_*", "num_microbatches_*", "microbatch_*", "*wgrad*"),
    *("cross_entropy_*", "use_ring_exchange_p2p", "barrier_*", "mtp_*", "flash_*", "qk_clip*", "log_max_*", "dsa_*"),
    *("linear_*", "init_*", "mup_*", "apply_query_key_layer_scaling", "disable_*", "use_transformer_engine_*"),
    *("*kitchen*", "high_priority_*", "use_grouped_*", "*grouped_gemm*", "clone_scatter_*", "config_logger_dir"),
    *("batch_invariant_mode", "symmetric_ar_type", "nccl_*", "*inference*", "mamba_*", "use_mamba_*", "mlp_chunks_*"),
    *("*offload*", "async_*", "test_mode", "activation_func_fp8_*", "yarn_*", "rotary_scaling_factor", "logit_dtype"),
    *("hf_model_*", "transformer_layer_spec", "restore_modelopt_state", "use_arbitrary_attention_mask", "use_te_*"),
    *("masked_softmax_*", "scatter_embedding_*", "*_hooks", "extra_checkpoint_metadata", "vocab_size_*", "builder"),
    *(
        "fp32_residual_connection",
        "quant_recipe",
        "generation_config",
        "te_*",
        "*_checkpointing",
        "moe_*",
        "*_target_",
        "_*",
        "transformer",
    ),
)
"""Members of a `run_config.yaml` that say how a run goes.

`linear_*`, `mamba_*`, `mtp_*`, `mup_*`, `yarn_*` size what a switch, or `position_embedding_type`, would turn on.
"""
