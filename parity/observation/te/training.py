"""Training steps of a model on Transformer Engine's layers: its own loss and reduction of gradients, torch's AdamW.

Parameters in bfloat16 have float32 copies, which the optimizer steps, and gradients of micro-batches are added up in
float32, as trainers do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from parity.converter import Settings
from parity.observation import gradients
from parity.observation.lessons import Deal, Lesson, Recipe
from parity.observation.observe import cross_entropy
from parity.observation.te.feeding import Call, calls
from parity.observation.te.gradients import held as held_of
from parity.observation.te.observe import said
from parity.observation.training import Trained
from parity.probes import IGNORED, Probe

WHOLE = ("layer_norm_weight", "norm.weight", "proj.bias", "fc2_bias")
"""Ends of the names of parameters that every tensor-parallel rank has whole."""


def train(
    models: Sequence[Any],
    config: Mapping[str, Any],
    settings: Settings,
    batches: Sequence[Lesson],
    recipe: Recipe,
    expected: Path | None,
) -> Trained | None:
    """Compare the gradients of the first batch, and take an optimizer step on each. Collective.

    Returns:
        What was found, on rank 0; `None` on every other rank.
    """
    (model,) = models
    held = held_of(model, config, settings.topology)
    frozen = gradients.freeze([held])
    silence_dropout(model, config)
    model.loss_function = token_mean
    model.train()
    masters = masters_of(model)
    optimizer = optimizer_of(list(masters.values()), recipe)
    if settings.precision == "fp8-delayed":  # scales come from what was seen before, of gradients too
        forward_backward(model, masters, batches[0], settings)
    rows, curve, norms, compared = list[float](), list[float](), list[float](), None
    for step, lesson in enumerate(batches):
        optimizer.zero_grad()
        losses = forward_backward(model, masters, lesson, settings)
        rows = rows or [total / tokens for total, tokens in losses]
        curve.append(sum(total for total, _ in losses) / sum(tokens for _, tokens in losses))
        if step == 0 and expected is not None:
            for name, master in masters.items():
                model.get_parameter(name).main_grad = master.grad
            compared = gradients.compare([held], expected, settings.precision)
        norms.append(norm_of(masters, settings))
        optimizer.step()
        for name, master in masters.items():
            parameter = model.get_parameter(name)
            if parameter is not master:
                parameter.data.copy_(master.data)
    if dist.get_rank() != 0:
        return None
    return Trained(
        rows=rows,
        curve=curve,
        norms=norms,
        gradients=compared,
        frozen=frozen,
        optimizer=f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
    )


def token_mean(
    logits: Tensor, labels: Any, vocab_size: int, *, shift_labels: Tensor, num_items_in_batch: Any = None, **_: Any
) -> Tensor:
    """The loss of the tokens that this rank has of a micro-batch, over the number of all, in the model's own forward.

    In the place of transformers' own, whose kernel adds up a vocabulary one by one on the CPU: that loses 4e-4 of the
    gradients of a large one. How tokens are counted, and shares added up, is the model's.
    """
    return cross_entropy(logits, shift_labels, torch.float64).sum() / (
        num_items_in_batch or (shift_labels != IGNORED).sum()
    )


def masters_of(model: Any) -> dict[str, torch.nn.Parameter]:
    """What the optimizer steps: the parameters, or float32 copies of them."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        name: parameter if parameter.dtype == torch.float32 else torch.nn.Parameter(parameter.detach().float())
        for name, parameter in trained.items()
    }


def optimizer_of(parameters: Sequence[torch.nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW, without weight decay for parameters of one dim."""
    groups = [
        {"params": [one for one in parameters if one.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [one for one in parameters if one.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps)


def forward_backward(
    model: Any, masters: Mapping[str, torch.nn.Parameter], lesson: Lesson, settings: Settings
) -> list[tuple[float, int]]:
    """Gradients of the mean loss over a batch, in the masters; the sum of losses and the tokens of each micro-batch."""
    from converters.te.parallel import reduce_gradients

    deal = Deal.of(settings.topology)
    labelled = int((lesson.labels != IGNORED).sum())
    sums: dict[str, Tensor] = {}
    found = []
    for at in range(0, len(lesson.tokens), deal.size):
        rows = slice(at, at + deal.size)
        labels = lesson.labels[rows]
        tokens = int((labels != IGNORED).sum())
        for parameter in model.parameters():
            parameter.grad = None
        for call, part in _fed(Lesson(tokens=lesson.tokens[rows], labels=labels), settings):
            loss = said(model, call, shift_labels=part).loss
            (loss * (tokens / labelled)).backward()
        reduce_gradients(model)
        found.append((float(loss.detach()) * tokens, tokens))
        for name in masters:
            gradient = model.get_parameter(name).grad.float()
            sums[name] = sums[name] + gradient if name in sums else gradient.clone()
    for name, master in masters.items():
        master.grad = sums[name]
    return found


def _fed(lesson: Lesson, settings: Settings) -> Iterator[tuple[Call, Tensor]]:
    """The one call of a micro-batch, with this rank's part of its labels."""
    here = settings.topology.coord(dist.get_rank())
    probe = Probe(name="lesson", tokens=lesson.tokens, labels=lesson.labels)
    for call in calls(probe, settings, here.cp):
        at = call.at.numpy()
        labels = np.where(at < 0, IGNORED, lesson.labels.reshape(-1)[at])
        yield call, torch.from_numpy(labels)[:, call.here]


def norm_of(masters: Mapping[str, torch.nn.Parameter], settings: Settings) -> float:
    """The L2 norm of all gradients, each element counted once. Collective."""
    tp = settings.topology.coord(dist.get_rank())
    own = torch.zeros((), dtype=torch.float64)
    for name, master in masters.items():
        assert master.grad is not None, "every parameter of a Llama is used"
        if tp.cp == 0 and (tp.tp == 0 or not name.endswith(WHOLE)):
            own += torch.linalg.vector_norm(master.grad, dtype=torch.float64).cpu() ** 2
    everyones = [0.0] * dist.get_world_size()
    dist.all_gather_object(everyones, float(own))
    return float(np.sqrt(sum(everyones)))


def silence_dropout(model: Any, config: Mapping[str, Any]) -> None:
    """Switch off the attention dropout that the config asks for: two random masks cannot be compared.

    Where it asks for none, dropout in the model is a fault, and stays.
    """
    if config.get("attention_dropout"):
        for layer in model.model.layers:
            layer.self_attention.core_attention.attention_dropout = 0.0
