"""Training steps of transformers: the reference, and how far its own evaluations lie from it.

In float32 the first step's gradients are expected as float64 gives them: evaluations in float32 on one machine share
rounding errors (of a long sum, of a kernel) that none of them can show of another. What is measured is how far each
float32 evaluation lies from float64, as the model under test does.

In bfloat16 the reference is the *oracle*: float32 arithmetic with rounded weights. What trains in bfloat16, here as in
Megatron-Core, has three things in float32: a master copy of the weights, of which the model has the rounded values, the
moments of AdamW, and the sum of gradients over micro-batches. A plain AdamW over bfloat16 parameters, which loses every
update smaller than half a rounding step, is what nobody means by training in bfloat16, and would be a wider reference.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor

from parity.backends import below_bf16
from parity.observation.lessons import Lesson, Recipe
from parity.observation.observe import cross_entropy
from parity.observation.quantised_hf import MOVES, moved, quantise
from parity.probes import IGNORED

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One of several evaluations that are equal in exact arithmetic.

    Args:
        weights: What weights are rounded to.
        arithmetic: What everything is computed in.
        attention: transformers' implementation.
        parts: A batch is taken in so many, the last first; gradients are added up in float32.
        split: Each matrix product is made of so many (see `_split_sums`).
        quantised: The precision of matrix products in layers, where they are.
        seed: Of what moves the numbers that enter them (see `parity.observation.quantised_hf.moved`), if anything does.
    """

    weights: torch.dtype = torch.float32
    arithmetic: torch.dtype = torch.float32
    attention: Literal["eager", "sdpa"] = "eager"
    parts: int = 1
    split: int = 1
    quantised: str | None = None
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Course:
    """A few training steps of one evaluation.

    Attributes:
        losses: For each step `[rows s]` float64: the loss of each token before it, in nats; 0 where unlabelled.
    """

    losses: list[Floats]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """transformers on a few batches.

    Attributes:
        expected: The losses of every step: plain attention and whole batches in float32; in bfloat16, of the oracle.
        others: Other evaluations, some of the first step only.
        norm: L2 norm of all expected gradients of the first step, which are in the file.
        norm_floor: The largest L2 norm of the difference of all gradients from those, which bounds that of their norms;
            or what torch's own float32 norm of them loses, if that is more.
        scales: For each Hugging Face key the size of the expected gradient: its largest element in float32, the root
            mean square in bfloat16.
        floors: For each key, the largest distance of another evaluation's gradient from it, measured likewise; at least
            what is typical of its kind.
    """

    expected: Course
    others: list[Course]
    norm: float
    norm_floor: float
    scales: Mapping[str, float]
    floors: Mapping[str, float]


def reference(
    folder: Path, batches: Sequence[Lesson], recipe: Recipe, file: Path, precision: str, parts: int
) -> Reference:
    """Train, in one process, without Megatron's runtime.

    Args:
        folder: The checkpoint.
        batches: One for each step.
        recipe: The optimizer's constants.
        file: Where the expected gradients of the first batch are written, as safetensors.
        precision: A name of `parity.backends.PRECISIONS`.
        parts: Backward passes that a batch takes in the layout under test; in bfloat16 each rounds its gradients.
    """
    first = batches[:1]
    if precision == "fp32":
        size, true = _largest, (Way(arithmetic=torch.float64, attention="sdpa"), first)
        ways = [
            (Way(), batches),
            (Way(attention="sdpa", parts=2, split=2), batches),
            (Way(parts=2, split=3), first),
        ]
    elif below_bf16(precision):
        half = torch.bfloat16
        size, true = _rms, (Way(weights=half), batches)
        ways = [
            (Way(weights=half, arithmetic=half, parts=parts, quantised=precision), batches),
            (Way(weights=half, arithmetic=half, parts=parts, quantised=precision, attention="sdpa"), batches),
            *(
                (Way(weights=half, arithmetic=half, parts=parts, quantised=precision, seed=n), first)
                for n in range(MOVES)
            ),
        ]
    else:
        half = torch.bfloat16
        size, true = _rms, (Way(weights=half), batches)
        ways = [
            (Way(weights=half, arithmetic=half, parts=parts), batches),
            (Way(weights=half, arithmetic=half, parts=parts, attention="sdpa", split=2), first),
        ]
    oracle, gradients = _course(folder, true[1], recipe, true[0])
    save_file(gradients, file)
    scales = {key: size(gradient) for key, gradient in gradients.items()}
    floors = dict.fromkeys(gradients, 0.0)
    norm_floor = 0.0
    others = []
    for way, some in ways:
        course, found = _course(folder, some, recipe, way)
        others.append(course)
        for key, gradient in found.items():
            gradient -= gradients[key]
            floors[key] = max(floors[key], size(gradient))
        norm_floor = max(norm_floor, _norm(found))
    norm = _norm(gradients)
    if precision == "fp32":  # float64 made the first step alone
        oracle, others[0] = others[0], oracle
    return Reference(
        expected=oracle,
        others=others,
        norm=norm,
        norm_floor=max(norm_floor, abs(float(torch.nn.utils.get_total_norm(list(gradients.values()))) - norm)),
        scales=scales,
        floors=_at_least_typical(floors, scales),
    )


def _at_least_typical(floors: Mapping[str, float], scales: Mapping[str, float]) -> dict[str, float]:
    """Each floor, or what is typical of its kind where that is more: relative to its scale, the median over layers.

    Where one element stands out, as trained models have in their norms, a floor is a few draws of one rounding error,
    and by chance nearly nothing in some layer of many.
    """
    kinds: dict[str, list[float]] = {}
    for key, floor in floors.items():
        kinds.setdefault(_kind(key), []).append(floor / scales[key] if scales[key] else 0.0)
    typical = {kind: float(np.median(relative)) for kind, relative in kinds.items()}
    return {key: max(floor, typical[_kind(key)] * scales[key]) for key, floor in floors.items()}


def _kind(key: str) -> str:
    return re.sub(r"layers\.\d+\.", "layers.", key)


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _norm(gradients: Mapping[str, Tensor]) -> float:
    """The L2 norm of all, summed up in float64: torch's own loses 1e-3 of it over a large vocabulary on the CPU."""
    return float(
        np.linalg.norm([float(torch.linalg.vector_norm(one, dtype=torch.float64)) for one in gradients.values()])
    )


def _course(folder: Path, batches: Sequence[Lesson], recipe: Recipe, way: Way) -> tuple[Course, dict[str, Tensor]]:
    """Train one step on each batch; the losses, and the gradients of the first in float32."""
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=way.weights, attn_implementation=way.attention)
    model.to(way.arithmetic).eval()  # as regards dropout
    if way.split > 1:
        _split_sums(model, way.split)
    if way.quantised:
        quantise(model, way.quantised)
    masters = _Masters(model, way.weights)
    if way.quantised == "fp8-delayed":  # scales come from what was seen before, of gradients too
        backward(model, masters, batches[0], way)
    optimizer = adamw(list(masters.of.values()), recipe)
    first: dict[str, Tensor] = {}
    losses: list[Floats] = []
    for step, lesson in enumerate(batches):
        optimizer.zero_grad()
        with contextlib.nullcontext() if way.seed is None else moved(model, way.seed):
            losses.append(backward(model, masters, lesson, way).numpy())
        if step == 0:
            first = {name: _gradient(master).to(torch.float32, copy=True) for name, master in masters.of.items()}
        if step < len(batches) - 1:
            optimizer.step()
            masters.round()
    return Course(losses=losses), first


class _Masters:
    """What the optimizer steps: the parameters themselves, or where weights are rounded, float32 copies of them.

    Attributes:
        of: By the name of the parameter.
    """

    def __init__(self, model: Any, weights: torch.dtype) -> None:
        self._model = dict(model.named_parameters())
        self._weights = weights
        self._apart = weights != torch.float32
        self.of = {
            name: torch.nn.Parameter(parameter.detach().to(torch.float32, copy=True)) if self._apart else parameter
            for name, parameter in self._model.items()
        }

    def gather(self) -> None:
        """Add the gradients of one backward pass to the masters'."""
        for name, parameter in self._model.items() if self._apart else ():
            found, master = _gradient(parameter).float(), self.of[name]
            master.grad = found if master.grad is None else master.grad + found
            parameter.grad = None

    @torch.no_grad()
    def round(self) -> None:
        """Give the model the rounded masters."""
        for name, parameter in self._model.items() if self._apart else ():
            parameter.copy_(self.of[name].to(self._weights))


def backward(model: Any, masters: _Masters, lesson: Lesson, way: Way) -> Tensor:
    """Gradients of the mean loss over all labelled tokens.

    Returns:
        The loss of each token, `[rows s]` float64, 0 where unlabelled.
    """
    tokens, labels = torch.from_numpy(lesson.tokens), torch.from_numpy(lesson.labels)
    labelled = (labels != IGNORED).sum()
    losses = torch.zeros(labels.shape, dtype=torch.float64)
    for part in reversed(torch.arange(len(tokens)).chunk(way.parts)):
        logits = model(tokens[part], attention_mask=torch.ones_like(tokens[part]), use_cache=False).logits
        loss = cross_entropy(logits, labels[part], torch.float32 if way.split > 1 else torch.float64)
        (loss.sum() / labelled).backward()
        masters.gather()
        losses[part] = loss.detach().double()
    return losses


def _split_sums(model: Any, pieces: int) -> None:
    """Have every matrix product made of several, cut where tensor parallelism cuts it: another order of summation.

    Attention and the batch alone would leave the first token of each sequence as it is, to the bit: it attends only to
    itself. Trained models keep their largest activations there, and most of the noise of their gradients.
    """

    def by_row(linear: torch.nn.Linear, tokens: Tensor) -> Tensor:
        inputs, weights = tokens.tensor_split(pieces, dim=-1), linear.weight.tensor_split(pieces, dim=1)
        output = sum(part @ weight.T for part, weight in zip(inputs, weights, strict=True))
        return output if linear.bias is None else output + linear.bias

    def by_column(linear: torch.nn.Linear, tokens: Tensor) -> Tensor:
        output = torch.cat([tokens @ weight.T for weight in linear.weight.tensor_split(pieces)], dim=-1)
        return output if linear.bias is None else output + linear.bias

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            cut = by_row if name.endswith(("o_proj", "down_proj")) else by_column
            module.forward = functools.partial(cut, module)  # type: ignore[method-assign]


def adamw(parameters: Sequence[torch.nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    """AdamW as torch has it, with Megatron-Core's groups: no weight decay for parameters of one dim, norms and biases.

    Source: NVIDIA/Megatron-LM core_v0.16.1, megatron/core/optimizer/__init__.py `get_standard_config_overrides`; the
        fallback to torch's AdamW without Transformer Engine and Apex is at the head of the same file.
    """
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "every parameter of a Llama is used"
    return parameter.grad
