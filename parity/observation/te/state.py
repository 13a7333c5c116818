"""The state of delayed scaling, saved and loaded: the same answers, and no state of other weights is taken."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from converters.errors import ConversionError
from parity.converter import Converter, Settings
from parity.observation import backend
from parity.observation.te.feeding import calls
from parity.observation.te.observe import said
from parity.probes import Probe

KEY = "_extra_state"


def reloaded(converter: Converter, folder: Path, settings: Settings, probe: Probe) -> list[str]:
    """What is wrong with the state of a model that has run, as lines. Collective.

    A second model, of the same checkpoint, that is given the state must say what the first says next, to the bit. A
    state that is missing, of another version, or whose scales its history does not allow must be refused.
    """
    side = backend.of(settings)
    (first,), (second,) = (side.built(converter, folder, settings) for _ in range(2))
    here = settings.topology.coord(torch.distributed.get_rank())
    (call, *_) = calls(probe, settings, here.cp)
    for model in (first, second):
        model.eval()
    with torch.enable_grad():
        for _ in range(2):
            said(first, call)
    saved = first.state_dict()
    states = {name: value for name, value in saved.items() if name.endswith(KEY) and torch.is_tensor(value)}
    lines = [f"{name}: nothing was written" for name, value in states.items() if _scales(name) and not value.numel()]
    second.load_state_dict(saved)
    with torch.no_grad():
        one, other = (said(model, call).float().cpu().numpy() for model in (first, second))
    if not np.array_equal(one, other):
        lines.append(f"logits differ after saving and loading, by up to {np.abs(one - other).max():.2e}")
    if first.model.te_layers.kind != "reference" or lines:
        return lines  # Transformer Engine itself takes any state
    name = next(name for name in states if _scales(name))
    for what, value in (
        ("no state, where there was one", torch.empty(0, dtype=torch.uint8)),
        ("a state of version 99", _changed(states[name], b"extra_state_version", 99)),
        ("a scale of four times what its history allows", _scaled(states[name], 4.0)),
    ):
        try:
            second.load_state_dict({**saved, name: value})
        except ConversionError:
            continue
        lines.append(f"{name}: {what} was taken")
    return lines


def _scales(name: str) -> bool:
    return name.endswith((f"layernorm_qkv.{KEY}", f"proj.{KEY}", f"layernorm_mlp.{KEY}"))


def _changed(state: torch.Tensor, field: bytes, value: int) -> torch.Tensor:
    """The bytes with a whole number of one byte, after the name of its field, replaced."""
    content = bytearray(state.numpy().tobytes())
    at = content.index(field) + len(field)
    at = content.index(pickle.BININT1, at) + 1
    content[at] = value
    return torch.frombuffer(content, dtype=torch.uint8).clone()


def _scaled(state: torch.Tensor, by: float) -> torch.Tensor:
    """The state with its first scales multiplied."""
    from converters.te.quantization import extra_state

    live: Any = extra_state.read(state, _gemms(state), None, where="a state")
    live.forward.scale.mul_(by)
    return extra_state.write(live)


def _gemms(state: torch.Tensor) -> int:
    content = state.numpy().tobytes()
    at = content.index(b"num_gemms")
    return content[content.index(pickle.BININT1, at) + 1]

