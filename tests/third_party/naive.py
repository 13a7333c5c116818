"""A small converter as one writes it in an afternoon: a loop over layers, one direction at a time, no pipeline.

`Correct` does what it should. Each class below it has one of the bugs that such converters have had, and nothing in it
is written for this harness: it knows Megatron-Core, transformers' file formats, and nothing else.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from safetensors.torch import load_file, save_file


class Correct:
    """Llama without biases and rope scaling, at any tensor-parallel size."""

    def to_megatron(self, folder: Path, settings: Any) -> list[GPTModel]:
        config = json.loads((folder / "config.json").read_text())
        if config.get("rope_scaling") or config.get("attention_bias") or config.get("mlp_bias"):
            raise NotImplementedError("rope scaling and biases")
        tensors = {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
        model = self.build(config, settings.topology.tp, settings.precision)
        rank, size = parallel_state.get_tensor_model_parallel_rank(), settings.topology.tp

        def put(name: str, tensor: torch.Tensor, dim: int | None) -> None:
            part = tensor if dim is None else tensor.chunk(size, dim)[rank]
            model.get_parameter(name).data.copy_(part)

        put("embedding.word_embeddings.weight", self.padded(tensors["model.embed_tokens.weight"], size), 0)
        for layer in range(config["num_hidden_layers"]):
            hf, mcore = f"model.layers.{layer}.", f"decoder.layers.{layer}."
            put(mcore + "input_layernorm.weight", tensors[hf + "input_layernorm.weight"], None)
            put(mcore + "pre_mlp_layernorm.weight", tensors[hf + "post_attention_layernorm.weight"], None)
            q, k, v = (tensors[f"{hf}self_attn.{name}_proj.weight"] for name in "qkv")
            put(mcore + "self_attention.linear_qkv.weight", self.merge(q, k, v, config), 0)
            put(mcore + "self_attention.linear_proj.weight", tensors[hf + "self_attn.o_proj.weight"], 1)
            gate, up = (tensors[f"{hf}mlp.{name}_proj.weight"] for name in ("gate", "up"))
            put(mcore + "mlp.linear_fc1.weight", self.join(gate, up, size), 0)
            put(mcore + "mlp.linear_fc2.weight", tensors[hf + "mlp.down_proj.weight"], 1)
        put("decoder.final_layernorm.weight", tensors["model.norm.weight"], None)
        if not config["tie_word_embeddings"]:
            put("output_layer.weight", self.padded(tensors["lm_head.weight"], size), 0)
        return [model]

    def to_hf(self, chunks: Sequence[Any], source: Path, target: Path) -> None:
        config = json.loads((source / "config.json").read_text())
        (model,) = chunks
        size = parallel_state.get_tensor_model_parallel_world_size()

        def whole(name: str, dim: int | None) -> torch.Tensor:
            mine = model.get_parameter(name).data
            if dim is None or size == 1:
                return mine.clone()
            parts = [torch.empty_like(mine) for _ in range(size)]
            dist.all_gather(parts, mine.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
            return torch.cat(parts, dim)

        rows = config["vocab_size"]
        out = {"model.embed_tokens.weight": whole("embedding.word_embeddings.weight", 0)[:rows]}
        for layer in range(config["num_hidden_layers"]):
            hf, mcore = f"model.layers.{layer}.", f"decoder.layers.{layer}."
            out[hf + "input_layernorm.weight"] = whole(mcore + "input_layernorm.weight", None)
            out[hf + "post_attention_layernorm.weight"] = whole(mcore + "pre_mlp_layernorm.weight", None)
            qkv = self.split(whole(mcore + "self_attention.linear_qkv.weight", 0), config)
            for name, tensor in zip("qkv", qkv, strict=True):
                out[f"{hf}self_attn.{name}_proj.weight"] = tensor
            out[hf + "self_attn.o_proj.weight"] = whole(mcore + "self_attention.linear_proj.weight", 1)
            gate, up = self.part(whole(mcore + "mlp.linear_fc1.weight", 0), size)
            out[hf + "mlp.gate_proj.weight"], out[hf + "mlp.up_proj.weight"] = gate, up
            out[hf + "mlp.down_proj.weight"] = whole(mcore + "mlp.linear_fc2.weight", 1)
        out["model.norm.weight"] = whole("decoder.final_layernorm.weight", None)
        if not config["tie_word_embeddings"]:
            out["lm_head.weight"] = whole("output_layer.weight", 0)[:rows]
        if dist.get_rank() == 0:
            target.mkdir()
            for file in source.iterdir():
                if "safetensors" not in file.name:  # nor their index: what is written is one file
                    shutil.copy(file, target)
            tensors = {name: tensor.contiguous() for name, tensor in out.items()}
            save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})

    def build(self, config: dict[str, Any], tp: int, precision: str) -> GPTModel:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        transformer = TransformerConfig(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=config["num_attention_heads"],
            num_query_groups=config["num_key_value_heads"],
            kv_channels=config["head_dim"],
            layernorm_epsilon=self.epsilon(config),
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            params_dtype=dtype,
            bf16=precision == "bf16",
            tensor_model_parallel_size=tp,
            masked_softmax_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            gradient_accumulation_fusion=False,
        )
        rows = config["vocab_size"]
        return GPTModel(
            config=transformer,
            transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=rows + -rows % tp,
            max_sequence_length=config["max_position_embeddings"],
            parallel_output=True,
            share_embeddings_and_output_weights=config["tie_word_embeddings"],
            position_embedding_type="rope",
            rotary_base=config["rope_theta"],
        )

    def epsilon(self, config: dict[str, Any]) -> float:
        return float(config["rms_norm_eps"])

    def padded(self, tensor: torch.Tensor, size: int) -> torch.Tensor:
        return torch.cat([tensor, tensor.new_zeros(-len(tensor) % size, tensor.size(1))])

    def merge(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
        groups, width = config["num_key_value_heads"], q.size(1)
        return torch.cat([part.view(groups, -1, width) for part in (q, k, v)], dim=1).view(-1, width)

    def split(self, qkv: torch.Tensor, config: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        groups, width, dim = config["num_key_value_heads"], qkv.size(1), config["head_dim"]
        rows = config["num_attention_heads"] // groups * dim
        parts = qkv.view(groups, -1, width).split([rows, dim, dim], dim=1)
        return tuple(part.reshape(-1, width) for part in parts)

    def join(self, gate: torch.Tensor, up: torch.Tensor, size: int) -> torch.Tensor:
        return torch.cat([part for pair in zip(gate.chunk(size), up.chunk(size), strict=True) for part in pair])

    def part(self, fc1: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        pieces = fc1.chunk(2 * size)
        return torch.cat(pieces[0::2]), torch.cat(pieces[1::2])


class Nothing(Correct):
    """Forgets to return what it has built."""

    def to_megatron(self, folder: Path, settings: Any) -> list[GPTModel]:
        super().to_megatron(folder, settings)
        return []


class Contiguous(Correct):
    """Query, key and value one after the other, there and back, as if there were one group (gpt-neox #1345)."""

    def merge(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
        return torch.cat([q, k, v])

    def split(self, qkv: torch.Tensor, config: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        rows = config["num_key_value_heads"] * config["head_dim"]
        return tuple(qkv.split([len(qkv) - 2 * rows, rows, rows]))


class CutWhole(Correct):
    """Gate and up cut over tensor-parallel ranks as one matrix, there and back (Megatron-LM #360)."""

    def join(self, gate: torch.Tensor, up: torch.Tensor, size: int) -> torch.Tensor:
        return torch.cat([gate, up])

    def part(self, fc1: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = fc1.chunk(2)
        return gate, up


class ForgetsEpsilon(Correct):
    """Megatron-Core's default epsilon, whatever the config says (Megatron-Bridge #5712)."""

    def epsilon(self, config: dict[str, Any]) -> float:
        return 1e-5


class ShiftsVocabulary(Correct):
    """Padding in front of the vocabulary instead of behind it, on export alone."""

    def to_hf(self, chunks: Sequence[Any], source: Path, target: Path) -> None:
        super().to_hf(chunks, source, target)
        if dist.get_rank() == 0:
            tensors = load_file(target / "model.safetensors")
            tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0)
            save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
