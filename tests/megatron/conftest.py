"""One zygote and one set of tiny checkpoints for these tests.

This folder must never have an `__init__.py`: it would be imported in place of NVIDIA's `megatron`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny_llama
import torch
from tiny_llama import Tiny

from parity.ranks import Zygote

MODELS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True, "rope_parameters": tiny_llama.LINEAR},
    "biased": {"attention_bias": True, "mlp_bias": True, "rope_parameters": tiny_llama.DEFAULT},
    "attention-biased": {"attention_bias": True},
    "mlp-biased": {"mlp_bias": True},
    "shallow": {"num_hidden_layers": 2},
}


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    torch.set_num_threads(1)
    with Zygote() as running:
        yield running


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tiny]:
    folder = tmp_path_factory.mktemp("llamas")
    return {name: tiny_llama.write(folder / name, **changes) for name, changes in MODELS.items()}
