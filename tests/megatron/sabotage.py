"""Trainers that go wrong in one thing. A converter is called in each rank before training, and plants the fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parity.converter import Own, Settings
from parity.observation import gradients
from parity.observation.megatron import training


def local_mean(losses: torch.Tensor, labels: torch.Tensor) -> Any:
    """Each rank's and each micro-batch's own mean, all of one weight."""
    total, tokens, report = training_token_mean(losses, labels)
    return total / tokens, torch.ones_like(tokens), report


training_token_mean = training.token_mean


def plant_local_mean() -> None:
    training.token_mean = local_mean  # type: ignore[assignment]


def plant_default_p2p() -> None:
    right = training.schedule_options
    default = {"overlap_p2p_comm": False, "batch_p2p_comm": True}
    training.schedule_options = lambda topology: {**right(topology), **default}


def plant_without(name: str) -> None:
    """Leave out one step of the finalisation of gradients."""
    import importlib

    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    setattr(module, name, lambda *_, **__: None)


def plant_no_data_parallel_reduction() -> None:
    right = training.wrapped

    def wrapped(*arguments: Any) -> list[Any]:
        chunks = right(*arguments)
        for chunk in chunks:
            chunk.finish_grad_sync = lambda *_, **__: None
        return chunks

    training.wrapped = wrapped


def plant_no_gather_of_parameters() -> None:
    """Each rank keeps the weights that it stepped, and the others' as they were."""
    right = training.wrapped

    def wrapped(*arguments: Any) -> list[Any]:
        chunks = right(*arguments)
        for chunk in chunks:
            for group in chunk.bucket_groups:
                group.start_param_sync = lambda *_, **__: None
        return chunks

    training.wrapped = wrapped


def plant_optimizer(**changes: Any) -> None:
    right = training.optimizer_options
    training.optimizer_options = lambda *arguments: {**right(*arguments), **changes}


def plant_decay_of_all() -> None:
    right = training.optimizer_of

    def optimizer_of(*arguments: Any) -> tuple[Any, Any]:
        optimizer, scheduler = right(*arguments)
        for group in optimizer.param_groups:
            group["wd_mult"] = 1.0
        scheduler.step(0)
        return optimizer, scheduler

    training.optimizer_of = optimizer_of


def plant_rounded_masters() -> None:
    """Lose after each step what the model's precision cannot hold, as AdamW over bfloat16 parameters does."""
    right = training.optimizer_of

    def optimizer_of(*arguments: Any) -> tuple[Any, Any]:
        optimizer, scheduler = right(*arguments)
        step = optimizer.step

        def wrong() -> Any:
            done = step()
            for group in optimizer.param_groups:
                for master in group["params"]:
                    master.data.copy_(master.data.bfloat16())
            return done

        optimizer.step = wrong
        return optimizer, scheduler

    training.optimizer_of = optimizer_of


def plant_k_for_v() -> None:
    right = gradients.assembled

    def assembled(mine: Any, *rest: Any) -> torch.Tensor:
        halves = {"k_proj": "v_proj", "v_proj": "k_proj"}
        for _, copy in mine:
            for name, other in halves.items():
                if name in copy.target.key:
                    key = copy.target.key.replace(name, other)
                    mine = [(part, one) for part, _ in mine for one in part.part.copies if one.target.key == key]
                    return right(mine, *rest)
        return right(mine, *rest)

    gradients.assembled = assembled


FAULTS: dict[str, Callable[[], None]] = {
    "local mean": plant_local_mean,
    "default p2p": plant_default_p2p,
    "no reduction over data parallelism": plant_no_data_parallel_reduction,
    "no reduction of norms": lambda: plant_without("_allreduce_non_tensor_model_parallel_grads"),
    "no reduction of tied embeddings": lambda: plant_without("_allreduce_word_embedding_grads"),
    "padding in the loss": lambda: setattr(training, "_leave_out_padding", lambda *_: None),
    "learning rate": lambda: plant_optimizer(lr=2.1e-3),
    "beta1": lambda: plant_optimizer(adam_beta1=0.9),
    "beta2": lambda: plant_optimizer(adam_beta2=0.95),
    "eps": lambda: plant_optimizer(adam_eps=1e-8),
    "weight decay of norms": plant_decay_of_all,
    "no gather of parameters": plant_no_gather_of_parameters,
    "rounded masters": plant_rounded_masters,
    "k for v": plant_k_for_v,
}


@dataclass(frozen=True)
class Sabotaged(Own):
    """This package's converter; training goes wrong afterwards."""

    fault: str

    def to_megatron(self, folder: Path, settings: Settings) -> Any:
        FAULTS[self.fault]()
        return super().to_megatron(folder, settings)
