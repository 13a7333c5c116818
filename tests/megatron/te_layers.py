"""Run in a rank without a GPU: the real Transformer Engine layers, constructed only, for their names and shapes."""

from __future__ import annotations

from typing import Any

import torch


def compare(config: dict[str, Any]) -> tuple[int, list[str]]:
    """Build Megatron's model on Transformer Engine's layers, and hold the table's names and shapes against it.

    Transformer Engine refuses to construct without CUDA, so a GPU is feigned for just that; nothing is computed.

    Returns:
        Parameters of the model, and what the table has otherwise.
    """
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # type: ignore[assignment,misc]
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()  # type: ignore[assignment,misc]
    torch.cuda.set_rng_state = lambda *_: None  # type: ignore[assignment,misc]
    torch.cuda.manual_seed = lambda _: None  # type: ignore[assignment,misc]

    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random

    from converters.bridge import AutoBridge
    from converters.megatron import runtime

    runtime.require = lambda: None
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda *_, **__: None
    parallel_state.initialize_model_parallel()
    random.model_parallel_cuda_manual_seed(1, force_reset_rng=True)

    bridge = AutoBridge.from_hf_config(config)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.layer_spec, provider.use_cpu_initialization = "te", True
    provider.finalize()
    model = provider.provide(pre_process=True, post_process=True)
    held = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    stated = bridge.plan(provider).target_tensors
    names = sorted(set(held) | set(stated))
    return len(held), [f"{n}: {held.get(n)}, {stated.get(n)}" for n in names if held.get(n) != stated.get(n)]
