"""The Llama family: one table of weights.

Sources:
    hf: huggingface/transformers v5.23.0, models/llama/modeling_llama.py (`LlamaAttention`, `LlamaMLP`): every weight is
        `(out, in)`; query heads are ordered group by group, `repeat_kv` giving each key head `rep` of them in a row.
    megatron: NVIDIA/Megatron-LM core_v0.16.1 and core_v0.19.2, megatron/core/transformer/attention.py
        (`get_query_key_value_tensors`: for each group its query heads, its key, its value), transformer/mlp.py (`glu`
        chunks the rows of linear_fc1 in two: gate, then up), models/gpt/gpt_model.py (`output_layer` under tying),
        tensor_parallel/layers.py (`ColumnParallelLinear` cuts rows, `RowParallelLinear` columns; the bias of a
        row-parallel layer is whole on every rank). The names are those of the Transformer Engine spec, whose linear
        layers hold the norm before them; they are also the names in a distributed checkpoint.
        Ghost groups are zeros in every matrix that touches them. They let heads divide over more ranks than they do,
        add exact zeros to the residual stream, and have no gradient, so training leaves them zero.
    megatron_local: the same with the local spec, whose norms are modules of their own.
    megatron_dist: the same with layers stacked on a leading dim, as a distributed checkpoint has them
        (transformer/transformer_block.py `sharded_state_dict`, unless `hetereogenous_dist_checkpoint`).
    te: NVIDIA/bionemo-framework 3a9d005, bionemo-recipes/models/llama3/modeling_llama_te.py `NVLlamaForCausalLM`, whose
        layers are `transformer_engine.pytorch.TransformerLayer` with `fuse_qkv_params` and `qkv_weight_interleaved`:
        rows of layernorm_qkv go group by group, as Megatron's do, and fc1 is gate, then up (`activation="swiglu"`).
        Norms are never centred on zero. One switch, `bias`, is for all four linear layers of a layer. What is cut over
        tp is what the layers cut under `set_parallel_mode` (NVIDIA/TransformerEngine v2.20, pytorch/module/linear.py
        and layernorm_mlp.py); in one piece and without padding it is BioNeMo's checkpoint. A tied head has no tensor.
"""

from __future__ import annotations

from converters.table import Table, rule
from converters.values import Constant, Drop, Shift, Tie

LAYER = "model.layers.{layer}."
DECODER = "decoder.layers.{layer/pp}."
QKV = DECODER + "self_attention.linear_qkv."
PROJ = DECODER + "self_attention.linear_proj."
FC1 = DECODER + "mlp.linear_fc1."
FC2 = DECODER + "mlp.linear_fc2."
TE_QKV = LAYER + "self_attention.layernorm_qkv."
TE_PROJ = LAYER + "self_attention.proj."
TE_MLP = LAYER + "layernorm_mlp."

TABLE = Table(
    family="llama",
    columns={"hf": None, "megatron": None, "megatron_local": "megatron", "megatron_dist": "megatron", "te": None},
    sizes={
        "num_hidden_layers": "layer",
        "hidden_size": "hidden",
        "intermediate_size": "ffn",
        "num_key_value_heads": "group",
        "padded_query_groups": "[group ghost]",
        "num_attention_heads": "(group rep)",
        "head_dim": "dim",
        "rotary_dims": "half_dim",
        "vocab_size": "vocab",
        "padded_vocab_size": "[vocab pad]",
    },
    branches=("q", "k", "v", "gate", "up"),
    constants={"zero": Constant(0.0)},
    stacked=frozenset({"megatron_dist"}),
    features=frozenset(
        {
            "tie_word_embeddings",
            "attention_bias",
            "mlp_bias",
            "layernorm_zero_centered_gamma",
            "stored_lm_head",
            "stored_inv_freq",
            "stored_te_inv_freq",
        }
    ),
    rules=(
        rule(
            "embedding",
            hf="model.embed_tokens.weight: vocab hidden",
            megatron="embedding.word_embeddings.weight @first: [vocab (zero pad)]/tp hidden",
            te="model.embed_tokens.weight: [vocab (zero pad)]/tp hidden",
        ),
        *(
            rule(name, when=when, value=value, **columns)
            for when, value in (
                ("!layernorm_zero_centered_gamma", None),
                ("layernorm_zero_centered_gamma", Shift("megatron", -1.0)),
            )
            for name, columns in {
                "attention norm": {
                    "hf": LAYER + "input_layernorm.weight: hidden",
                    "megatron": QKV + "layer_norm_weight: hidden",
                    "megatron_local": DECODER + "input_layernorm.weight: hidden",
                    "te": TE_QKV + "layer_norm_weight: hidden",
                },
                "mlp norm": {
                    "hf": LAYER + "post_attention_layernorm.weight: hidden",
                    "megatron": FC1 + "layer_norm_weight: hidden",
                    "megatron_local": DECODER + "pre_mlp_layernorm.weight: hidden",
                    "te": TE_MLP + "layer_norm_weight: hidden",
                },
                "final norm": {
                    "hf": "model.norm.weight: hidden",
                    "megatron": "decoder.final_layernorm.weight @last: hidden",
                    "te": "model.norm.weight: hidden",
                },
            }.items()
        ),
        rule(
            "qkv",
            hf=(
                LAYER + "self_attn.q_proj.weight: (group rep q dim) hidden",
                LAYER + "self_attn.k_proj.weight: (group k dim) hidden",
                LAYER + "self_attn.v_proj.weight: (group v dim) hidden",
            ),
            megatron=QKV + "weight: ([group (zero ghost)] [(rep q) k v] dim)/tp hidden",
            te=TE_QKV + "weight: ([group (zero ghost)] [(rep q) k v] dim)/tp hidden",
        ),
        rule(
            "qkv bias",
            when="attention_bias",
            hf=(
                LAYER + "self_attn.q_proj.bias: (group rep q dim)",
                LAYER + "self_attn.k_proj.bias: (group k dim)",
                LAYER + "self_attn.v_proj.bias: (group v dim)",
            ),
            megatron=QKV + "bias: ([group (zero ghost)] [(rep q) k v] dim)/tp",
            te=TE_QKV + "bias: ([group (zero ghost)] [(rep q) k v] dim)/tp",
        ),
        rule(
            "attention output",
            hf=LAYER + "self_attn.o_proj.weight: hidden (group rep dim)",
            megatron=PROJ + "weight: hidden ([group (zero ghost)] rep dim)/tp",
            te=TE_PROJ + "weight: hidden ([group (zero ghost)] rep dim)/tp",
        ),
        rule(
            "attention output bias",
            when="attention_bias",
            hf=LAYER + "self_attn.o_proj.bias: hidden",
            megatron=PROJ + "bias: hidden",
            te=TE_PROJ + "bias: hidden",
        ),
        rule(
            "gate and up",
            hf=(
                LAYER + "mlp.gate_proj.weight: (gate ffn) hidden",
                LAYER + "mlp.up_proj.weight: (up ffn) hidden",
            ),
            megatron=FC1 + "weight: ([gate up] ffn/tp) hidden",
            te=TE_MLP + "fc1_weight: ([gate up] ffn/tp) hidden",
        ),
        rule(
            "gate and up bias",
            when="mlp_bias",
            hf=(LAYER + "mlp.gate_proj.bias: (gate ffn)", LAYER + "mlp.up_proj.bias: (up ffn)"),
            megatron=FC1 + "bias: ([gate up] ffn/tp)",
            te=TE_MLP + "fc1_bias: ([gate up] ffn/tp)",
        ),
        rule(
            "down",
            hf=LAYER + "mlp.down_proj.weight: hidden ffn",
            megatron=FC2 + "weight: hidden ffn/tp",
            te=TE_MLP + "fc2_weight: hidden ffn/tp",
        ),
        rule(
            "down bias",
            when="mlp_bias",
            hf=LAYER + "mlp.down_proj.bias: hidden",
            megatron=FC2 + "bias: hidden",
            te=TE_MLP + "fc2_bias: hidden",
        ),
        # Megatron and TE have one switch for all biases: those that this model lacks are there, and zero.
        rule(
            "no attention bias",
            when="mlp_bias !attention_bias",
            megatron=(QKV + "bias: (zero [group ghost] [(rep q) k v] dim)/tp", PROJ + "bias: (zero hidden)"),
            te=(TE_QKV + "bias: (zero [group ghost] [(rep q) k v] dim)/tp", TE_PROJ + "bias: (zero hidden)"),
        ),
        rule(
            "no mlp bias",
            when="attention_bias !mlp_bias",
            megatron=(FC1 + "bias: (zero [gate up] ffn/tp)", FC2 + "bias: (zero hidden)"),
            te=(TE_MLP + "fc1_bias: (zero [gate up] ffn/tp)", TE_MLP + "fc2_bias: (zero hidden)"),
        ),
        rule(
            "head",
            when="!tie_word_embeddings",
            hf="lm_head.weight: vocab hidden",
            megatron="output_layer.weight @last: [vocab (zero pad)]/tp hidden",
            te="lm_head.weight: [vocab (zero pad)]/tp hidden",
        ),
        rule(
            "tied head",
            when="tie_word_embeddings",
            value=Tie("megatron"),
            hf="model.embed_tokens.weight: vocab hidden",
            megatron="output_layer.weight @last-not-first: [vocab (zero pad)]/tp hidden",
            te="model.embed_tokens.weight: [vocab (zero pad)]/tp hidden",
        ),
        rule(
            "stored copy of a tied head",
            when="tie_word_embeddings stored_lm_head",
            value=Tie("hf"),
            hf="lm_head.weight: vocab hidden",
            megatron="embedding.word_embeddings.weight @first: [vocab (zero pad)]/tp hidden",
            te="model.embed_tokens.weight: [vocab (zero pad)]/tp hidden",
        ),
        rule(
            "stored copy of a tied head in te",
            when="tie_word_embeddings stored_lm_head",
            value=Tie("te"),
            hf="model.embed_tokens.weight: vocab hidden",
            megatron="embedding.word_embeddings.weight @first: [vocab (zero pad)]/tp hidden",
            te="lm_head.weight: [vocab (zero pad)]/tp hidden",
        ),
        rule(
            "rotary frequencies",
            when="stored_inv_freq",
            value=Drop("hf", "a buffer that old checkpoints store; both sides compute it from rope_theta and head_dim"),
            hf=LAYER + "self_attn.rotary_emb.inv_freq: half_dim",
        ),
        rule(
            "rotary frequencies of a te model",
            when="stored_te_inv_freq",
            value=Drop("te", "a buffer that some versions store; both sides compute it from rope_theta and head_dim"),
            te="model.rotary_emb.inv_freq: half_dim",
        ),
    ),
)
