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
LINEARS = ("self_attention.layernorm_qkv", "self_attention.proj", "layernorm_mlp")
"""The parts of a layer that have scales."""


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
    states = first.extra_states()
    layers = range(len(first.model.layers))
    expected = [f"model.layers.{layer}.{linear}.{KEY}" for layer in layers for linear in LINEARS]
    lines = [f"{name}: nothing was written" for name in expected if name not in states]
    second.load_extra_states(states)
    with torch.no_grad():
        one, other = (said(model, call).float().cpu().numpy() for model in (first, second))
    if not np.array_equal(one, other):
        lines.append(f"logits differ after saving and loading, by up to {np.abs(one - other).max():.2e}")
    if first.model.te_layers.kind != "reference" or lines:
        return lines  # Transformer Engine itself takes any state
    name = expected[0]
    for what, value in (
        ("no state, where there was one", None),
        ("a state of version 99", _changed(states[name], b"extra_state_version", 99)),
        ("a scale of four times what its history allows", _scaled(states[name], 4.0)),
    ):
        try:
            given = {**states, name: value}
            second.load_extra_states({key: state for key, state in given.items() if state is not None})
        except ConversionError:
            continue
        lines.append(f"{name}: {what} was taken")
    return lines


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
