"""Training steps of transformers: the reference, evaluated several ways that are equal in exact arithmetic."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor

from parity.observation.lessons import Lesson, Recipe
from parity.probes import IGNORED

Attention = Literal["eager", "sdpa"]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Course:
    """A few training steps of one evaluation.

    Attributes:
        losses: For each step `[rows s]` float64: the loss of each token before it, in nats; 0 where unlabelled.
        norms: L2 norm of all gradients before each step.
    """

    losses: list[Floats]
    norms: list[float]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """transformers on a few batches.

    Attributes:
        eager: Whole batches, plain attention, the loss of float32 logits in float64. The gradients of its first batch
            are in the file.
        others: The same all in float32, half a batch at a time, the second half first, each matrix product in two (see
            `_split_sums`): fused attention; and plain attention, on the first batch only.
        scales: For each Hugging Face key, the largest absolute gradient.
        floors: For each key, the largest difference between the gradients of `eager` and of any other evaluation.
        norm_floor: The largest L2 norm of the difference of all gradients, which bounds the difference of their norms.
    """

    eager: Course
    others: list[Course]
    scales: Mapping[str, float]
    floors: Mapping[str, float]
    norm_floor: float


def reference(folder: Path, batches: Sequence[Lesson], recipe: Recipe, file: Path) -> Reference:
    """Train, in one process, without Megatron's runtime.

    Args:
        folder: The checkpoint.
        batches: One for each step.
        recipe: The optimizer's constants.
        file: Where the gradients of the first batch are written, as safetensors.
    """
    eager, gradients = _course(folder, batches, recipe, "eager", parts=1)
    save_file(gradients, file)
    floors = dict.fromkeys(gradients, 0.0)
    norm_floor = 0.0
    others = []
    ways: tuple[tuple[Attention, Sequence[Lesson]], ...] = (("sdpa", batches), ("eager", batches[:1]))
    for attention, some in ways:
        course, found = _course(folder, some, recipe, attention, parts=2)
        others.append(course)
        for key, gradient in found.items():
            gradient -= gradients[key]
            floors[key] = max(floors[key], float(gradient.abs().max()))
        norm_floor = max(norm_floor, float(torch.nn.utils.get_total_norm(list(found.values()))))
    return Reference(
        eager=eager,
        others=others,
        scales={key: float(gradient.abs().max()) for key, gradient in gradients.items()},
        floors=floors,
        norm_floor=norm_floor,
    )


def _course(
    folder: Path, batches: Sequence[Lesson], recipe: Recipe, attention: Attention, *, parts: int
) -> tuple[Course, dict[str, Tensor]]:
    """Train one step on each batch; the losses, and the gradients of the first."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    model.eval()  # as regards dropout
    if parts > 1:
        _split_sums(model)
    optimizer = adamw(model, recipe)
    first: dict[str, Tensor] = {}
    losses: list[Floats] = []
    norms = []
    for lesson in batches:
        optimizer.zero_grad()
        losses.append(backward(model, lesson, parts).numpy())
        if not first:
            first = {name: _gradient(parameter).clone() for name, parameter in model.named_parameters()}
        norms.append(float(torch.nn.utils.get_total_norm([_gradient(p) for p in model.parameters()])))
        optimizer.step()
    return Course(losses=losses, norms=norms), first


def backward(model: Any, lesson: Lesson, parts: int) -> Tensor:
    """Gradients of the mean loss over all labelled tokens, the batch in `parts`, the last first.

    Returns:
        The loss of each token, `[rows s]` float64, 0 where unlabelled.
    """
    tokens, labels = torch.from_numpy(lesson.tokens), torch.from_numpy(lesson.labels)
    labelled = (labels != IGNORED).sum()
    losses = torch.zeros(labels.shape, dtype=torch.float64)
    for part in reversed(torch.arange(len(tokens)).chunk(parts)):
        logits = model(tokens[part], attention_mask=torch.ones_like(tokens[part]), use_cache=False).logits
        loss = cross_entropy(logits, labels[part], torch.float64 if parts == 1 else torch.float32)
        (loss.sum() / labelled).backward()
        losses[part] = loss.detach().double()
    return losses


def cross_entropy(logits: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """The loss of each token, `[rows s]` in `dtype`, 0 where unlabelled.

    Not torch's own: its float32 log-softmax on the CPU adds up a vocabulary one by one, and what it loses (1e-5 nats of
    49,152 terms, always to one side, and 4e-4 of the gradients) is far above all other noise, in every evaluation.
    """
    wide = logits.to(dtype)
    picked = wide.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels != IGNORED, wide.logsumexp(dim=-1) - picked, 0.0)


def _split_sums(model: Any) -> None:
    """Have every matrix product made of two, cut where tensor parallelism cuts it: another order of summation.

    Attention and the batch alone would leave the first token of each sequence as it is, to the bit: it attends only to
    itself. Trained models keep their largest activations there, and most of the noise of their gradients.
    """

    def by_row(linear: torch.nn.Linear, tokens: Tensor) -> Tensor:
        middle = linear.in_features // 2
        weight = linear.weight
        halves = tokens[..., :middle] @ weight[:, :middle].T + tokens[..., middle:] @ weight[:, middle:].T
        return halves if linear.bias is None else halves + linear.bias

    def by_column(linear: torch.nn.Linear, tokens: Tensor) -> Tensor:
        middle = linear.out_features // 2
        weight = linear.weight
        output = torch.cat([tokens @ weight[:middle].T, tokens @ weight[middle:].T], dim=-1)
        return output if linear.bias is None else output + linear.bias

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            cut = by_row if name.endswith(("o_proj", "down_proj")) else by_column
            module.forward = functools.partial(cut, module)  # type: ignore[method-assign]


def adamw(model: Any, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW as torch has it, with Megatron-Core's groups: no weight decay for parameters of one dim, norms and biases.

    Source: NVIDIA/Megatron-LM core_v0.16.1, megatron/core/optimizer/__init__.py `get_standard_config_overrides`; the
        fallback to torch's AdamW without Transformer Engine and Apex is at the head of the same file.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps)


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "every parameter of a Llama is used"
    return parameter.grad
