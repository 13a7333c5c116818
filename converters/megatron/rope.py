"""Rotary frequencies as transformers computes them, for every factor that a config can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from converters.errors import ConfigError

if TYPE_CHECKING:
    from converters.megatron.provider import GPTModelProvider


def frequencies_of(provider: GPTModelProvider) -> torch.Tensor:
    """Inverse frequencies of the RoPE that `provider` describes, `[rotated channels / 2]` float32, on the CPU."""
    dim, theta = int(provider.kv_channels * provider.rotary_percent), float(provider.rotary_base)
    if provider.rope_scaling:
        return llama3_frequencies(
            dim,
            theta,
            factor=provider.rope_scaling_factor,
            low_freq_factor=provider.rope_low_freq_factor,
            high_freq_factor=provider.rope_high_freq_factor,
            original_max_position_embeddings=provider.rope_original_max_position_embeddings,
        )
    if provider.seq_len_interpolation_factor is not None:
        return linear_frequencies(dim, theta, factor=provider.seq_len_interpolation_factor)
    return default_frequencies(dim, theta)


def frequencies_of_fields(hf: Mapping[str, Any]) -> torch.Tensor:
    """Inverse frequencies of a model by its Hugging Face fields (`FieldTable.read`), `[head_dim / 2]` float32.

    Raises:
        ConfigError: A rope type that is not known here.
    """
    dim, theta = hf["head_dim"], float(hf["rope_theta"])
    if hf["rope_type"] == "default":
        return default_frequencies(dim, theta)
    if hf["rope_type"] == "linear":
        return linear_frequencies(dim, theta, factor=hf["rope_factor"])
    if hf["rope_type"] == "llama3":
        return llama3_frequencies(
            dim,
            theta,
            factor=hf["rope_factor"],
            low_freq_factor=hf["rope_low_freq_factor"],
            high_freq_factor=hf["rope_high_freq_factor"],
            original_max_position_embeddings=hf["rope_original_length"],
        )
    raise ConfigError(f"rope_type={hf['rope_type']!r}: its frequencies are not known here")


def are_frequencies(stored: torch.Tensor, hf: Mapping[str, Any]) -> bool:
    """Whether a stored buffer holds the frequencies of a model, or those before positions are divided by a factor.

    Versions of transformers that stored the buffer divided the positions, not the frequencies. They computed it on
    whatever device was at hand: a power and a division apart by some units in the last place are the same.

    Args:
        stored: `[head_dim / 2]`, of any float dtype.
        hf: The model's fields.

    Source: huggingface/transformers v4.31, models/llama/modeling_llama.py `LlamaLinearScalingRotaryEmbedding`; CUDA C++
        Programming Guide, mathematical functions: `powf` within 4 units.
    """
    allowed = [frequencies_of_fields(hf)]
    if hf["rope_type"] == "linear":
        allowed.append(default_frequencies(hf["head_dim"], float(hf["rope_theta"])))
    if not stored.is_floating_point():
        return False
    own = torch.finfo(stored.dtype)
    unit, least = own.eps + 8 * torch.finfo(torch.float32).eps, own.eps * own.tiny
    return any(
        stored.shape == each.shape and bool(((stored.double() - each).abs() <= unit * each + least).all())
        for each in allowed
    )


def default_frequencies(head_dim: int, theta: float) -> torch.Tensor:
    """Inverse frequencies of plain RoPE, `[head_dim / 2]` float32.

    Source: huggingface/transformers v5, models/llama/modeling_llama.py `compute_default_rope_parameters`.
    """
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))


def linear_frequencies(head_dim: int, theta: float, *, factor: float) -> torch.Tensor:
    """Inverse frequencies of positions divided by `factor`, `[head_dim / 2]` float32.

    Source: huggingface/transformers v5, modeling_rope_utils.py `_compute_linear_scaling_rope_parameters`.
    """
    return default_frequencies(head_dim, theta) / factor


def llama3_frequencies(
    head_dim: int,
    theta: float,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> torch.Tensor:
    """Inverse frequencies of Llama 3.1's RoPE, `[head_dim / 2]` float32.

    Wavelengths longer than `original / low` are stretched by `factor`, those shorter than `original / high` are kept,
    and those between are interpolated.

    Source: huggingface/transformers v5, modeling_rope_utils.py `_compute_llama3_parameters`.
    """
    frequencies = default_frequencies(head_dim, theta)
    wavelengths = 2 * math.pi / frequencies
    longest = original_max_position_embeddings / low_freq_factor
    shortest = original_max_position_embeddings / high_freq_factor
    stretched = torch.where(wavelengths > longest, frequencies / factor, frequencies)
    share = (original_max_position_embeddings / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)
    between = (1 - share) * stretched / factor + share * stretched
    return torch.where((wavelengths >= shortest) & (wavelengths <= longest), between, stretched)
