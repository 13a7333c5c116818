"""Folders for the tests of FP8 checkpoints."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from converters.quantized.schemes import SCHEMES
from parity.seeded import write_checkpoint
from parity.tiny import odd_config

FORMATS = tuple(SCHEMES)
Q, K, UP = (f"model.layers.1.{name}_proj.weight" for name in ("self_attn.q", "self_attn.k", "mlp.up"))


def config(**changes: Any) -> dict[str, Any]:
    """Every size a multiple of 128, no two equal but that of the hidden states and nothing; biases; an untied head."""
    sizes = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 2, "vocab_size": 331}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    return odd_config() | sizes | heads | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | changes


def model(folder: Path, *, dtype: str = "bfloat16", shards: int = 1, **changes: Any) -> Path:
    """A checkpoint whose blocks differ in magnitude by many powers of two, so that no scale is like another."""
    write_checkpoint(config(**changes), folder, dtype=dtype, shards=shards)
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for key, value in tensors.items():
            if "_proj.weight" in key:
                rows, columns = (torch.arange(size) // 64 for size in value.shape)
                steps = (7 * rows[:, None] + 3 * columns[None, :] + rows[:, None] * columns[None, :]) % 9
                tensors[key] = (value.float() * torch.exp2(-steps.float())).to(value.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def rewritten(folder: Path, edit: Any) -> None:
    """Change the tensors of a folder of one file."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target
