"""Tiny Llamas without coincidences, and what a rank does with one. Functions here run in ranks and at home."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from converters.topology import Topology
from parity.probes import Probe

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 3.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 24,
}
DEFAULT = {"rope_type": "default", "rope_theta": 3000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 7000.0, "factor": 2.7}

# Heads, groups, heads a group, head_dim, and the rows and columns of all linears differ; two groups, so that tp=4 is
# more. Inner dims are multiples of 16: only then does a CPU add up a dot product in one order whatever the other
# dim, and only then can Megatron-Core (one merged matrix) and transformers (three) be equal to the last bit.
SIZES: dict[str, Any] = {
    "hidden_size": 80,
    "intermediate_size": 160,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "vocab_size": 131,
    "rms_norm_eps": 3e-4,
    "max_position_embeddings": 96,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_parameters": LLAMA3,
}


@dataclass(frozen=True)
class Tiny:
    """A folder with a tiny Llama, and its config as transformers completes it."""

    folder: Path
    config: dict[str, Any]

    def weights(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.folder / "model.safetensors")


def write(folder: Path, **changes: Any) -> Tiny:
    """Write a Llama of random weights (norms and biases too) into `folder`."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(**{**SIZES, **changes}, architectures=["LlamaForCausalLM"])
    generator = torch.Generator().manual_seed(7)
    heads, groups, dim = (config.to_dict()[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    hidden, ffn, vocab = config.hidden_size, config.intermediate_size, config.vocab_size

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    def norm() -> torch.Tensor:
        return torch.rand(hidden, generator=generator) + 0.5

    tensors = {"model.embed_tokens.weight": normal(vocab, hidden, scale=1.0), "model.norm.weight": norm()}
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = normal(vocab, hidden, scale=0.5)
    linears = [
        ("self_attn.q_proj", heads * dim, hidden, config.attention_bias),
        ("self_attn.k_proj", groups * dim, hidden, config.attention_bias),
        ("self_attn.v_proj", groups * dim, hidden, config.attention_bias),
        ("self_attn.o_proj", hidden, heads * dim, config.attention_bias),
        ("mlp.gate_proj", ffn, hidden, config.mlp_bias),
        ("mlp.up_proj", ffn, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, ffn, config.mlp_bias),
    ]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "input_layernorm.weight"] = norm()
        tensors[prefix + "post_attention_layernorm.weight"] = norm()
        for name, rows, columns, bias in linears:
            tensors[f"{prefix}{name}.weight"] = normal(rows, columns, scale=2 / columns**0.5)
            if bias:
                tensors[f"{prefix}{name}.bias"] = normal(rows, scale=0.5)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return Tiny(folder, config.to_dict())


def provider(config: dict[str, Any], topology: Topology, **changes: Any) -> Any:
    """The provider for `config`, spelled out here so that these tests do not lean on the config translation."""
    from converters.megatron.provider import GPTModelProvider

    rope = config["rope_parameters"]
    fields: dict[str, Any] = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config["head_dim"],
        "vocab_size": config["vocab_size"],
        "layernorm_epsilon": config["rms_norm_eps"],
        "seq_length": config["max_position_embeddings"],
        "share_embeddings_and_output_weights": config["tie_word_embeddings"],
        "add_bias_linear": config["attention_bias"] or config["mlp_bias"],
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "rotary_base": rope["rope_theta"],
        "tensor_model_parallel_size": topology.tp,
        "pipeline_model_parallel_size": topology.pp,
        "virtual_pipeline_model_parallel_size": topology.vpp if topology.vpp > 1 else None,
        "context_parallel_size": topology.cp,
        "sequence_parallel": topology.sp,
        "num_layers_in_first_pipeline_stage": topology.first_stage_layers,
        "num_layers_in_last_pipeline_stage": topology.last_stage_layers,
        "account_for_embedding_in_pipeline_split": topology.count_embedding,
        "account_for_loss_in_pipeline_split": topology.count_loss,
    }
    if rope["rope_type"] == "llama3":
        fields |= {
            "rope_scaling": True,
            "rope_scaling_factor": rope["factor"],
            "rope_low_freq_factor": rope["low_freq_factor"],
            "rope_high_freq_factor": rope["high_freq_factor"],
            "rope_original_max_position_embeddings": rope["original_max_position_embeddings"],
        }
    elif rope["rope_type"] == "linear":
        fields["seq_len_interpolation_factor"] = rope["factor"]
    return GPTModelProvider(**{**fields, **changes})


def build(tiny: Tiny, topology: Topology, *, wrap_with_ddp: bool = False, **changes: Any) -> tuple[list[Any], Any]:
    """This rank's chunks with the weights that the statement gives them, loaded strictly, and their provider."""
    from megatron.core.distributed import DistributedDataParallelConfig

    from converters.megatron import runtime
    from converters.megatron.parallel import current_coord
    from parity.statement.weights import expected_shard

    if not torch.cuda.is_available():
        runtime.install()
    made = provider(tiny.config, topology, **changes)
    weights = tiny.weights()

    def load(chunks: list[Any]) -> None:
        for coord, chunk in zip(topology.chunks_of(current_coord()), chunks, strict=True):
            stated: dict[str, Any] = dict(
                expected_shard(
                    weights,
                    tiny.config,
                    topology,
                    coord,
                    make_vocab_size_divisible_by=made.make_vocab_size_divisible_by,
                )
            )
            assert all(torch.isfinite(tensor).all() for tensor in stated.values())
            shapes = {name: tuple(tensor.shape) for name, tensor in stated.items()}
            assert shapes == {name: tuple(p.shape) for name, p in chunk.named_parameters()}, str(coord)
            extra = {name: None for name in chunk.state_dict() if name.endswith("_extra_state")}
            chunk.load_state_dict({**stated, **extra}, strict=True)

    made.register_pre_wrap_hook(load)
    chunks = made.provide_distributed_model(
        DistributedDataParallelConfig() if wrap_with_ddp else None, wrap_with_ddp=wrap_with_ddp
    )
    return chunks, made


def probe(tiny: Tiny, batch: int = 3, length: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels, `[batch length]`, that include the first and the last row of the vocabulary."""
    vocab = tiny.config["vocab_size"]
    stream = torch.randint(vocab, (batch, length + 1), generator=torch.Generator().manual_seed(3))
    stream[0, :2] = torch.tensor([0, vocab - 1])
    stream[-1, -1] = vocab - 1
    return stream[:, :-1].contiguous(), stream[:, 1:].contiguous()


def asked(tiny: Tiny, length: int = 16, positions: torch.Tensor | None = None) -> Probe:
    """The same as a probe."""
    tokens, labels = (part.numpy() for part in probe(tiny, length=length))
    places = None if positions is None else positions.numpy()
    return Probe(name="tiny", tokens=tokens, labels=labels, positions=places)


def backward(tiny: Tiny, topology: Topology) -> float:
    """Loss gradients by Megatron-Core (its schedule, DDP, `finalize_model_grads`) against those of transformers.

    The HF gradients are cut up by the statement, as the weights were. Returns the worst parameter's
    max |difference| / max |expected|.
    """
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from converters.megatron.parallel import current_coord
    from converters.megatron.provider import unwrap
    from converters.zigzag import zigzag_split
    from parity.statement.weights import expected_shard

    expected = hf_gradients(tiny)
    chunks, made = build(tiny, topology, wrap_with_ddp=True)
    made.finalize_model_grads_func = finalize_model_grads
    tokens, labels = probe(tiny, batch=4)
    cp, here = topology.cp, current_coord()
    microbatches = 4 if topology.pp > 1 else 1  # enough for stages to send both ways at once
    vocab = torch.arange(made.padded_vocab_size).chunk(topology.tp)[here.tp]

    def step(data: Any, chunk: Any) -> tuple[torch.Tensor, Any]:
        mine, targets = (zigzag_split(part, cp, here.cp) for part in next(data))
        places = zigzag_split(torch.arange(tokens.size(1)).expand(len(mine), -1), cp, here.cp)

        def loss(logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
            masked = logits.masked_fill(vocab >= made.vocab_size, float("-inf")).transpose(0, 1).contiguous()
            total = unwrap(chunk).compute_language_model_loss(targets, masked).sum()
            return total / (targets.numel() * cp), {}

        return chunk(mine, places, None), loss

    for chunk in chunks:
        chunk.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(zip(tokens.chunk(microbatches), labels.chunk(microbatches), strict=True)) for _ in chunks],
        model=chunks,
        num_microbatches=microbatches,
        seq_length=tokens.size(1),
        micro_batch_size=len(tokens) // microbatches,
    )
    worst = 0.0
    for coord, chunk in zip(topology.chunks_of(here), chunks, strict=True):
        stated = expected_shard(expected, tiny.config, topology, coord)
        found = {name: parameter.main_grad for name, parameter in unwrap(chunk).named_parameters()}
        assert set(stated) == set(found)
        for name, gradient in stated.items():
            off = (found[name] - gradient).abs().max() / gradient.abs().max()
            worst = max(worst, float(off))
    return worst


def hf_gradients(tiny: Tiny) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss by parameter, from transformers with eager attention in float32."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32, attn_implementation="eager")
    tokens, labels = probe(tiny, batch=4)
    logits = model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()  # type: ignore[no-untyped-call]
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest absolute difference; shapes must agree."""
    assert actual.shape == expected.shape
    return float(np.abs(actual.astype(np.float64) - expected).max())
