"""What a built model is and computes, as each rank sees it: recorded for `exchange`.

All of it is read off the live model, by the independent statement: an import that is wrong by the converter's tables
would be read back by the same tables as if it were right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from converters.topology import Topology
from parity.diagnosis.pullback import Pullback
from parity.folders import read
from parity.observation import backend, observe, taps
from parity.observation.activations import LOGITS, Floats, everything
from parity.probes import Probe
from parity.statement.config import Facts


@dataclass(frozen=True, kw_only=True)
class Held:
    """What one rank's chunks are, and what they compute.

    Args:
        taps: Its stage's activations and, on the last one, logits; empty on ranks that have none whole.
        facts: What each of its chunks computes with (`parity.statement.config`).
        stray: What of its weights has no place in the checkpoint.
    """

    taps: Mapping[str, Floats]
    facts: tuple[Facts, ...]
    stray: tuple[str, ...]


def observed(converter: Any, folder: Path, settings: Any, probe: Probe, scratch: Path) -> Held:
    """Import `folder`, run `probe`, and say what the model is; wrong weights are left in `scratch`. Collective."""
    side = backend.of(settings)
    models = side.built(converter, folder, settings)
    topology: Topology = settings.topology
    config, source = taps.hf_config(folder), checkpoint(folder, settings.precision)
    whole, seen = side.tapped(models, probe, settings=settings, vocab_size=config["vocab_size"], wanted=everything)
    if seen is not None:
        whole[LOGITS] = seen.logits
    bare = side.bare(models)
    pulled = Pullback.of(scratch, source, config)
    if torch.distributed.get_rank() == 0:
        pulled.create()
    torch.distributed.barrier()
    stray = [
        f"{chunk.place}: {trace.kind}: {', '.join(trace.keys)}" + f": {trace.detail}" * bool(trace.detail)
        for chunk in side.beside(bare, source, config, topology)
        for trace in pulled.keep(chunk, config, topology)
    ]
    return Held(taps=whole, facts=tuple(map(side.answered, bare)), stray=tuple(stray))


def checkpoint(folder: Path, precision: str) -> dict[str, torch.Tensor]:
    """The model's own tensors of a checkpoint, in `precision`; no copy of a tied head, no buffers."""
    tied = taps.hf_config(folder)["tie_word_embeddings"]
    return {
        key: tensor.to(observe.DTYPES[precision])
        for key, tensor in read(folder).items()
        if not key.endswith("rotary_emb.inv_freq") and not (tied and key == "lm_head.weight")
    }
