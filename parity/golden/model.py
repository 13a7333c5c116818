"""What transformers says of a model for its golden. Runs in a fresh process, without Megatron-Core and without a group.

Everything is evaluated on the CPU three times: plainly, which is what is kept; with fused attention, one sequence at a
time; and in float64. These are equal in exact arithmetic, and how far they differ is the noise floor. float64 has a
part in it because two float32 evaluations on one machine share its kernels, and do not show what these round alike: on
a machine with narrower vectors, gradients of a norm's weight differ by twenty times as much.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from parity.golden.file import Quantity, Values, digest_of_array
from parity.golden.values import from_logits, relative_floor, signs, top
from parity.probes import IGNORED, Probe
from parity.shards import read_entries

STEPS = 5
CURVE_TOKENS = 8
"""Of each sequence: what the loss curve is trained on."""
LEARNING_RATE = 1e-4
TRAIN_ALL_UP_TO = 10_000_000
"""Parameters. Of a larger model the loss curve trains the first and the last layer and the final norm: memory for
gradients and moments of all of it would take longer than everything else."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one process found.

    Attributes:
        places: As in a golden.
        quantities: The values of plain attention, with the floors measured here.
        digests: Of the weights, and of all logits to the bit.
        versions: Of what computed them.
    """

    places: npt.NDArray[np.int64]
    quantities: dict[str, Quantity] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def evaluate(folder: Path, probe: Probe, places: npt.NDArray[np.int64] | None = None) -> Evaluation:
    """Measure every quantity of the model in `folder`.

    Args:
        folder: A Hugging Face checkpoint.
        probe: Tokens and labels; whole sequences.
        places: Which logits to keep; by default the largest ones of each token.
    """
    import transformers
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    trained = _trained(model)
    before = [parameter.detach().clone() for parameter in trained]
    said = _Said(probe, places, at_once=len(probe.tokens))
    said.all(model, trained)
    others = []
    for attention, dtype in (("sdpa", torch.float32), ("eager", torch.float64)):
        with torch.no_grad():
            for parameter, value in zip(trained, before, strict=True):
                parameter.copy_(value)
        model.set_attn_implementation(attention)
        model.zero_grad()  # their memory goes first
        other = _Said(probe, said.places, at_once=1)
        other.all(model.to(dtype), trained)
        others.append(other)

    layers = model.config.num_hidden_layers
    points = (*(f"into layer {i}" for i in range(layers)), "out of the final norm")
    kinds: dict[str, dict[str, Any]] = {
        "logits, largest": {"axes": ("sequence", "token", "place")},
        "logits, log-sum-exp": {"axes": ("sequence", "token")},
        "logits, signed sums": {"axes": ("sequence", "token", "sum")},
        "loss": {"axes": ("sequence", "token")},
        "layers": {"axes": ("point", "mean, rms, largest"), "alike": 1, "names": points},
        "activations": {"axes": ("point", "sequence", "token", "rms, signed sum"), "alike": 3, "names": points},
        "gradients": {
            "axes": ("key", "norm, signed sum"),
            "alike": 1,
            "names": tuple(name for name, _ in model.named_parameters()),
        },
        "loss curve": {"axes": ("step",)},
    }
    quantities = {}
    for name, kind in kinds.items():
        spread = relative_floor([one.values[name] for one in (said, *others)], kind.get("alike", 0))
        quantities[name] = Quantity(values=said.values[name], floor=spread, **kind)
    return Evaluation(
        places=said.places,
        quantities=quantities,
        digests={"weights": weights_digest(folder), "logits": said.logits_digest},
        versions={
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
    )


def weights_digest(folder: Path) -> str:
    """sha256 over every tensor in the order of keys: key, dtype, shape, bytes. Over files, a stream of pieces."""
    digest = hashlib.sha256()
    for key, entry in sorted(read_entries(folder).items()):
        digest.update(f"{key} {entry.dtype} {list(entry.shape)}\n".encode())
        for piece in entry.chunks():
            digest.update(piece)
    return digest.hexdigest()


def _trained(model: Any) -> list[torch.nn.Parameter]:
    """What the loss curve trains."""
    if model.num_parameters() <= TRAIN_ALL_UP_TO:
        return list(model.parameters())
    ends = (model.model.layers[0], model.model.layers[-1], model.model.norm)
    return [parameter for module in ends for parameter in module.parameters()]


class _Said:
    """The values of one way to evaluate."""

    def __init__(self, probe: Probe, places: npt.NDArray[np.int64] | None, *, at_once: int) -> None:
        self.tokens, self.labels = torch.from_numpy(probe.tokens), torch.from_numpy(probe.labels)
        self.values: dict[str, Values] = {}
        self._places = places
        self._at_once = at_once
        self.logits_digest = ""

    @property
    def places(self) -> npt.NDArray[np.int64]:
        assert self._places is not None, "known once there are logits"
        return self._places

    def all(self, model: Any, trained: Sequence[torch.nn.Parameter]) -> None:
        """Every quantity; changes the weights of what is `trained`."""
        self.backward(model)
        self.curve(model, trained)

    def backward(self, model: Any) -> None:
        """Logits, loss, activations, and the gradient of the mean loss."""
        model.zero_grad()
        said = []
        for tokens, labels in self._rows(None):
            logits, states, loss = _run(model, tokens, labels)
            (loss.sum() / (self.labels != IGNORED).sum()).backward()
            said.append((logits.detach(), states, loss.detach()))
        self._keep(said)
        rows = [_norm_and_sum(name, parameter.grad) for name, parameter in model.named_parameters()]
        self.values["gradients"] = np.array(rows, dtype=np.float64)

    def curve(self, model: Any, trained: Sequence[torch.nn.Parameter]) -> None:
        """The mean loss before each step of AdamW and after the last; changes the weights."""
        count = (self.labels[:, :CURVE_TOKENS] != IGNORED).sum()
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
        losses = []
        for step in range(STEPS + 1):
            optimizer.zero_grad()
            total = 0.0
            for tokens, labels in self._rows(CURVE_TOKENS):
                loss = _run(model, tokens, labels)[2].sum() / count
                total += loss.item()
                if step < STEPS:
                    loss.backward(inputs=list(trained))
            losses.append(total)
            if step < STEPS:
                optimizer.step()
        self.values["loss curve"] = np.array(losses, dtype=np.float32)

    def _rows(self, length: int | None) -> list[tuple[Tensor, Tensor]]:
        """Tokens and labels of the first `length` places, as many sequences together as are run at once."""
        parts = (whole[:, :length].split(self._at_once) for whole in (self.tokens, self.labels))
        return list(zip(*parts, strict=True))

    def _keep(self, said: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        logits, states, loss = (
            torch.cat(parts, dim) for parts, dim in zip(zip(*said, strict=True), (0, 1, 0), strict=True)
        )
        found = logits.numpy()
        self.logits_digest = digest_of_array(found)
        if self._places is None:
            self._places = top(found)
        self.values |= from_logits(found, loss.numpy(), self._places)
        wide = states.double()  # [point b s h]
        rms = wide.square().mean(-1).sqrt()
        sums = wide @ torch.from_numpy(signs("activations", wide.size(-1))).double() / wide.size(-1) ** 0.5
        self.values["activations"] = torch.stack([rms, sums], dim=-1).float().numpy()
        flat = wide.flatten(1)
        layers = [flat.mean(1), flat.square().mean(1).sqrt(), flat.abs().amax(1)]
        self.values["layers"] = torch.stack(layers, dim=-1).float().numpy()


def _run(model: Any, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[b s v]`, hidden states `[layers + 1, b s h]` (the last one behind the final norm), loss `[b s]`."""
    output = model(
        input_ids=tokens,
        position_ids=torch.arange(tokens.size(1)).expand_as(tokens),
        attention_mask=torch.ones_like(tokens),  # without one, transformers looks for the seams of packed sequences
        use_cache=False,
        output_hidden_states=True,
    )
    logits = output.logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED
    )
    return logits, torch.stack([state.detach() for state in output.hidden_states]), loss.view_as(labels)


def _norm_and_sum(name: str, gradient: Tensor) -> tuple[float, float]:
    """The norm, and the sum under signs that are a product over axes: it feels every element."""
    total = gradient.double()
    for size in reversed(gradient.shape):
        total = total @ torch.from_numpy(signs(f"{name} {size}", size)).double()
    return float(torch.linalg.vector_norm(gradient, dtype=torch.float64)), float(total)
