"""One zygote, and checkpoints whose axes, shards and files leave nothing to chance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.sources import read_config
from converters.topology import Topology
from parity.ranks import Zygote
from parity.seeded import write_checkpoint
from parity.tiny import odd_config, shrink, with_layers

TIED = with_layers(shrink(read_config("meta-llama/Llama-3.2-1B")), 4)
CONFIGS: dict[str, tuple[dict[str, Any], int]] = {
    "odd": (odd_config(), 3),
    "attention-biased": (with_layers(odd_config() | {"mlp_bias": False}, 2), 1),
    "mlp-biased": (with_layers(odd_config() | {"attention_bias": False}, 2), 1),
    "tied": (TIED, 1),
}
Run = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    torch.set_num_threads(1)
    with Zygote() as running:
        yield running


@pytest.fixture
def in_ranks(zygote: Zygote) -> Run:
    """Calls `function(folder, topology, ...)` on every rank of the topology, without a GPU; what each returned."""

    def run(function: Callable[..., Any], folder: Path, topology: Topology, *arguments: Any, **named: Any) -> list[Any]:
        return zygote.run(
            function,
            folder,
            topology,
            *arguments,
            world=topology.world_size,
            coords=topology.coords(),
            timeout=60,
            env={"CUDA_VISIBLE_DEVICES": ""},
            **named,
        )

    return run


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Seeded checkpoints in float32, with a tokenizer and what else a folder has; `odd` over three files."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: write_checkpoint(config, root / name, shards=shards) for name, (config, shards) in CONFIGS.items()}


@pytest.fixture
def changed(checkpoints: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a one-file checkpoint with tensors added, replaced, or (`None`) left out."""

    def make(name: str, **tensors: torch.Tensor | None) -> Path:
        folder = tmp_path / f"changed-{name}"
        folder.mkdir()
        for file in checkpoints[name].iterdir():
            if file.suffix != ".safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        held = {**load_file(checkpoints[name] / "model.safetensors"), **tensors}
        kept = {key: tensor for key, tensor in held.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make
