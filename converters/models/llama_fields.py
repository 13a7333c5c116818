"""The Llama family: what becomes of each config field.

Sources:
    hf: huggingface/transformers v4.57 and v5.23, models/llama/configuration_llama.py and modeling_rope_utils.py.
    megatron: NVIDIA/Megatron-LM core_v0.16.1 and core_v0.19.2, megatron/core/transformer/transformer_config.py;
        NVIDIA-NeMo/Megatron-Bridge 0.6, models/gpt_provider.py, for the names of what is no field of it.
    te: NVIDIA/bionemo-framework 3a9d005, bionemo-recipes/models/llama3/modeling_llama_te.py `NVLlamaConfig`, a
        LlamaConfig with four fields more. It is written there with `model_type` "llama", and here with "nvllama".
"""

from __future__ import annotations

from converters.dialect import Dialect, Option
from converters.fields import Field, FieldTable, Of, Ratio
from converters.rows import ABSENT, Case, Derived, Dropped, Fixed, Pair, Switch

QUANTIZED = "quantised weights; make them plain first: python -m converters dequantize SOURCE TARGET"
ROPE = ("rope_parameters", "rope_scaling")  # transformers 5, transformers 4


def _rope(*names: str) -> tuple[str, ...]:
    return tuple(f"{parent}.{name}" for parent in ROPE for name in names)


TE = Dialect(
    column="te",
    model_type="nvllama",
    known_as="llama",
    prefix="NV",
    options=(
        Option(
            name="attn_input_format",
            default="thd",
            values=("thd", "bshd"),
            why="how a batch is laid out in memory",
        ),
        Option(
            name="self_attn_mask_type",
            default="padding_causal",
            values=("padding_causal", "causal"),
            why="how padding is told apart; a Llama is causal",
        ),
        Option(
            name="layer_precision",
            default=None,
            values=("fp8", "fp4", None),
            by_layer=True,
            why="the precision of a layer's matrix products, not of its weights",
        ),
        Option(
            name="use_quantized_model_init",
            default=False,
            values=(False, True),
            why="whether a model in memory holds its weights quantised",
        ),
    ),
    # Those whose gated form Transformer Engine has; its GELU is the tanh approximation.
    only={"hidden_act": ("silu", "swish", "gelu_pytorch_tanh", "gelu_new", "quick_gelu", "relu", "relu2")},
)

FIELDS = FieldTable(
    family="llama",
    fields=(
        Field("vocab_size", default=32000),
        Field("hidden_size", default=4096),
        Field("intermediate_size", default=11008),
        Field("num_hidden_layers", default=32),
        Field("num_attention_heads", default=32),
        Field("num_key_value_heads", default=Of("num_attention_heads")),
        Field("head_dim", default=Ratio("hidden_size", "num_attention_heads")),
        Field("hidden_act", default="silu"),
        Field("max_position_embeddings", default=2048),
        Field("initializer_range", default=0.02),
        Field("rms_norm_eps", default=1e-6),
        Field("tie_word_embeddings", default=False),
        Field("attention_bias", default=False),
        Field("attention_dropout", default=0.0),
        Field("mlp_bias", default=False),
        Field("dtype", ("dtype", "torch_dtype"), default="float32"),
        Field("rope_theta", ("rope_parameters.rope_theta", "rope_theta", "rope_scaling.rope_theta"), default=10000.0),
        Field("rope_type", _rope("rope_type", "type"), default="default"),
        Field("rope_factor", _rope("factor"), default=None),
        Field("rope_low_freq_factor", _rope("low_freq_factor"), default=None),
        Field("rope_high_freq_factor", _rope("high_freq_factor"), default=None),
        Field("rope_original_length", _rope("original_max_position_embeddings"), default=None),
    ),
    inferred={"rotary_dims": Ratio("head_dim", 2)},
    rows=(
        Pair("vocab_size", "vocab_size"),
        Pair("hidden_size", "hidden_size"),
        Pair("intermediate_size", "ffn_hidden_size"),
        Pair("num_hidden_layers", "num_layers"),
        Pair("num_attention_heads", "num_attention_heads"),
        Pair("num_key_value_heads", "num_query_groups"),
        Pair("head_dim", "kv_channels"),
        Pair("max_position_embeddings", "max_position_embeddings"),
        Pair("initializer_range", "init_method_std"),
        Pair("rms_norm_eps", "layernorm_epsilon"),
        Pair("tie_word_embeddings", "share_embeddings_and_output_weights"),
        Pair("attention_dropout", "attention_dropout"),
        Pair("rope_theta", "rotary_base"),
        Derived(
            ("hidden_act",),
            ("activation_func", "gated_linear_unit"),
            ((("silu",), ("silu", True)), (("gelu",), ("gelu", True))),
        ),
        Derived(
            ("attention_bias", "mlp_bias"),
            ("add_bias_linear", "add_qkv_bias", "zero_biases"),
            (
                ((False, False), (False, False, "none")),
                ((True, True), (True, True, "none")),
                ((True, False), (True, True, "mlp")),
                ((False, True), (True, True, "attention")),
            ),
        ),
        Derived(
            ("dtype",),
            ("params_dtype", "bf16", "fp16"),
            (
                (("float32",), ("float32", False, False)),
                (("bfloat16",), ("bfloat16", True, False)),
                (("float16",), ("float16", False, True)),
            ),
        ),
        Switch(
            "rope_type",
            {
                "default": Case({"rope_scaling": False, "seq_len_interpolation_factor": None}),
                "linear": Case(
                    {"rope_scaling": False, "seq_len_interpolation_factor": ABSENT},
                    (Pair("rope_factor", "seq_len_interpolation_factor"),),
                ),
                "llama3": Case(
                    {"rope_scaling": True, "seq_len_interpolation_factor": None},
                    (
                        Pair("rope_factor", "rope_scaling_factor"),
                        Pair("rope_low_freq_factor", "rope_low_freq_factor"),
                        Pair("rope_high_freq_factor", "rope_high_freq_factor"),
                        Pair("rope_original_length", "rope_original_max_position_embeddings"),
                    ),
                ),
            },
        ),
        Fixed("normalization", "RMSNorm", "every norm of a Llama is an RMSNorm"),
        Fixed("position_embedding_type", "rope", "positions enter through rotary embeddings alone"),
        Fixed("rotary_percent", 1.0, "every channel of a head is rotated"),
        Fixed("rotary_interleaved", False, "the halves of a head rotate against each other"),
        Fixed("hidden_dropout", 0.0, "there is no dropout on the residual path"),
        Dropped("hf", ("model_type",), "selects the family", only=("llama",)),
        Dropped("hf", ("architectures",), "selects the class", only=(["LlamaForCausalLM"],)),
        Dropped("hf", ("use_cache",), "how `generate` runs, not what the model is"),
        Dropped("hf", ("pretraining_tp",), "slices matrix products without changing them", only=(1, None)),
        Dropped("hf", ("*_token_id",), "belongs to the tokenizer and to generation; carried over in config.json"),
        Dropped(
            "hf",
            ("transformers_version", "_name_or_path", "_commit_hash", "unsloth_*", "_attn_implementation_autoset"),
            "says who wrote the file",
        ),
        Dropped("hf", ("return_dict", "output_hidden_states", "output_attentions"), "what a call returns"),
        Dropped("hf", ("rope_*.partial_rotary_factor",), "only whole heads are rotated", only=(1.0, None)),
        Dropped("hf", ("quantization_config",), QUANTIZED, only=(None,)),
        Dropped("hf", ("sliding_window", "use_sliding_window"), "a Llama attends everywhere", only=(None, False)),
        Dropped("hf", ("chunk_size_feed_forward",), "the MLP runs in one piece", only=(0,)),
        Dropped("hf", ("is_encoder_decoder", "add_cross_attention", "is_decoder"), "decoder only", only=(False,)),
        Dropped("hf", ("id2label", "label2id", "problem_type", "finetuning_task"), "belongs to classification heads"),
        Dropped(
            "megatron",
            (
                "seq_length",
                "make_vocab_size_divisible_by",
                "should_pad_vocab",
                "ghost_query_groups",
                "parallel_output",
                "fp16_lm_cross_entropy",
                "layer_spec",
                "layernorm_zero_centered_gamma",
                "hetereogenous_dist_checkpoint",
                "*_parallel_size",
                "sequence_parallel",
                "num_layers_in_*_pipeline_stage",
                "account_for_*_in_pipeline_split",
                "pipeline_dtype",
                "autocast_dtype",
                "enable_autocast",
                "_*",
            ),
            "how tensors are laid out over ranks; the plan undoes it",
        ),
        Dropped(
            "megatron",
            (
                "*_fusion",
                "*_fused_*",
                "fused_*",
                "*_func",
                "init_method",
                "output_layer_init_method",
                "embedding_init_method*",
                "*overlap*",
                "tp_comm_*",
                "batch_p2p_*",
                "recompute_*",
                "cuda_graph_*",
                "*_cuda_graph*",
                "cpu_offloading*",
                "use_cpu_initialization",
                "perform_initialization",
                "deallocate_pipeline_outputs",
                "variable_seq_lengths",
                "cp_comm_type",
                "transformer_impl",
                "attention_backend",
                "attention_softmax_in_fp32",
                "persist_layer_norm",
                "memory_efficient_layer_norm",
                "deterministic_mode",
                "calculate_per_token_loss",
                "distribute_saved_activations",
                "timers",
                "*_rng_tracker",
                "*_seed",
                "fp8*",
                "fp4*",
                "tp_only_amax_red",
                "first_last_layers_bf16",
                "num_layers_at_*_in_bf16",
                "moe_*",
            ),
            "how the model is trained, not what it computes",
        ),
    ),
)
