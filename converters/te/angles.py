"""Rotary angles, as the layers take them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


class RotaryAngles(torch.nn.Module):
    """The angle of each position and channel, from the frequencies of transformers' own Llama.

    The frequencies are no parameter and no buffer: they come from the config alone, stay in float32 whatever the model
    is cast to, exist when the model is built on the meta device, and are never in a checkpoint.

    Attributes:
        inv_freq: `[d/2]` float32 on the CPU.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        with torch.device("cpu"):  # models are built on the meta device
            self.inv_freq: Tensor = LlamaRotaryEmbedding(config).inv_freq.detach().float().clone()

    def forward(self, positions: Tensor) -> Tensor:
        """The angles of `positions`.

        Args:
            positions: `[s]` integers.

        Returns:
            `[s 1 1 d]` float32 on the device of `positions`; the halves of a head rotate against each other, so the
            angles stand there twice.

        Source: transformer_engine 2.20.2, pytorch/attention/rope.py, RotaryPositionEmbedding.forward.
        """
        with torch.autocast(positions.device.type, enabled=False):
            half = positions[:, None].float() * self.inv_freq.to(positions.device, torch.float32)
        return torch.cat((half, half), dim=-1)[:, None, None, :]
