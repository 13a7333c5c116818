"""Training steps of Megatron-Core: its schedules, its DDP, its finalisation of gradients, its optimizer.

The decisions that a trainer takes, and can take wrongly, are small functions of this module: `schedule_options`,
`ddp_options`, `token_mean`, `optimizer_options`, `scheduler_options`, `finalize`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from converters.megatron import runtime
from converters.topology import Topology
from parity.converter import Settings
from parity.observation import gradients
from parity.observation.lessons import Deal, Lesson, Recipe
from parity.observation.megatron.gradients import held as held_of
from parity.observation.observe import DTYPES
from parity.observation.training import Trained
from parity.probes import IGNORED


def train(
    models: Sequence[Any],
    config: Mapping[str, Any],
    settings: Settings,
    batches: Sequence[Lesson],
    recipe: Recipe,
    expected: Path | None,
) -> Trained | None:
    """Compare the gradients of the first batch, and take an optimizer step on each. Collective.

    Without `expected` the optimizer is the distributed one, which leaves each rank the reduced gradients of its shard
    alone: there are none to compare.

    Returns:
        What was found, on rank 0; `None` on every other rank.
    """
    topology = settings.topology
    held = held_of(models, config, topology)
    frozen = gradients.freeze(held)
    for part in held:
        _silence_dropout(part.model, config)
        _leave_out_padding(part.model, config["vocab_size"])
    distributed = expected is None
    chunks = wrapped([part.model for part in held], topology, distributed)
    optimizer, scheduler = optimizer_of(chunks, recipe, len(batches), settings.precision, distributed)
    totals, norms, compared = [], [], None
    for step, lesson in enumerate(batches):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        totals.append(forward_backward(chunks, lesson, topology))
        if step == 0 and expected is not None:
            compared = gradients.compare(held, expected, settings.precision)
        optimizer.step()
        norms.append(float(optimizer.get_grad_norm()))
        scheduler.step(increment=1)
    if dist.get_rank() != 0:
        return None
    outer = optimizer.chained_optimizers[0]
    inner = type(outer.optimizer)
    return Trained(
        rows=[float(total / tokens) for total, tokens in totals[0]],
        curve=[float(found[:, 0].sum() / found[:, 1].sum()) for found in totals],
        norms=norms,
        gradients=compared,
        frozen=frozen,
        optimizer=f"{type(outer).__qualname__} over {inner.__module__}.{inner.__qualname__}",
    )


def wrapped(models: Sequence[Any], topology: Topology, distributed: bool) -> list[Any]:
    """Bare model chunks in Megatron-Core's DDP, their config set for training."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    for model in models:
        for name, value in schedule_options(topology).items():
            setattr(model.config, name, value)
        model.train()
    return [
        # Chunks after the first reduce while earlier ones still compute, so only the first may be bucketed.
        DistributedDataParallel(
            model.config, DistributedDataParallelConfig(**ddp_options(distributed)), model, disable_bucketing=index > 0
        )
        for index, model in enumerate(models)
    ]


def schedule_options(topology: Topology) -> dict[str, Any]:
    """What a trainer sets on the model's config for the schedules.

    With two stages the next and the previous rank are the same: batched, an activation and a gradient in flight between
    them can be taken for one another under interleaving, and gradients are wrong without an error.
    """
    options: dict[str, Any] = {"calculate_per_token_loss": True, "finalize_model_grads_func": finalize}
    if topology.vpp > 1:
        options |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return options


def ddp_options(distributed: bool) -> dict[str, Any]:
    """What a trainer sets on Megatron-Core's `DistributedDataParallelConfig`.

    Args:
        distributed: Gradients are reduced and scattered, for the distributed optimizer (ZeRO-1).
    """
    return {"grad_reduce_in_fp32": True, "use_distributed_optimizer": distributed}


def finalize(*arguments: Any, **options: Any) -> None:
    """Megatron-Core's own: DP and CP reduction, norms under sequence parallelism, tied embeddings, 1 / tokens."""
    from megatron.core.distributed import finalize_model_grads

    finalize_model_grads(*arguments, **options)


def token_mean(losses: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of this rank's part of a micro-batch, such that gradients are those of the mean over the global batch.

    The sum and the number of tokens, each of this rank alone: `finalize_model_grads` adds up both over all CP and DP
    ranks and micro-batches, and divides once. A mean taken here would weigh tokens by the luck of their rank.

    Args:
        losses: `[b s]` of this rank.
        labels: `[b s]` of this rank.

    Returns:
        The sum, the number of labelled tokens, and both, `[2]` float64, for the report.

    Source: NVIDIA/Megatron-LM core_v0.16.1, megatron/core/pipeline_parallel/schedules.py `forward_step_calc_loss`.
    """
    counted = labels != IGNORED
    labelled, tokens = torch.where(counted, losses, 0.0), counted.sum()
    return labelled.sum(), tokens.int(), torch.stack([labelled.detach().double().sum(), tokens.double()])


def forward_backward(chunks: Sequence[Any], lesson: Lesson, topology: Topology) -> Tensor:
    """One pass of the schedule over a global batch; gradients end in each parameter's `main_grad`, reduced.

    Sequences are extended by unlabelled zeros to what CP and sequence parallelism divide: masks are causal.

    Returns:
        `[microbatches 2]` float64 on every rank: summed loss and labelled tokens of each micro-batch of the global
        batch, in the order of its rows.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from converters.zigzag import zigzag_split

    deal, cp, tp = Deal.of(topology), topology.cp, topology.tp
    multiple = math.lcm(2 * cp if cp > 1 else 1, cp * tp if topology.sp else 1)
    missing = -lesson.tokens.shape[1] % multiple
    mine = slice(parallel_state.get_data_parallel_rank() * deal.microbatches * deal.size, None)
    rank, device = parallel_state.get_context_parallel_rank(), torch.cuda.current_device()

    def microbatches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        tokens = np.pad(lesson.tokens, ((0, 0), (0, missing)))[mine]
        labels = np.pad(lesson.labels, ((0, 0), (0, missing)), constant_values=IGNORED)[mine]
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        for at in range(0, deal.microbatches * deal.size, deal.size):
            rows = slice(at, at + deal.size)
            parts = (torch.from_numpy(whole[rows].copy()) for whole in (tokens, positions, labels))
            first, second, third = (zigzag_split(part, cp, rank).to(device) for part in parts)
            yield first, second, third

    def step(data: Iterator[tuple[Tensor, Tensor, Tensor]], chunk: Any) -> tuple[Tensor, Any]:
        tokens, positions, labels = next(data)
        output = chunk(tokens, positions, None, labels=labels.clamp(min=0))
        return output, lambda losses: token_mean(losses, labels)

    found: list[Tensor] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[microbatches() for _ in chunks],
        model=list(chunks),
        num_microbatches=deal.microbatches,
        seq_length=lesson.tokens.shape[1] + missing,
        micro_batch_size=deal.size,
        forward_only=False,
    )
    return _everyones(found, deal)


def _everyones(found: Sequence[Tensor], deal: Deal) -> Tensor:
    """Sums and tokens of each micro-batch, from the ranks of the last stage, CP ranks added up."""
    from megatron.core import parallel_state

    own = torch.zeros(deal.dp, deal.microbatches, 2, dtype=torch.float64, device=torch.cuda.current_device())
    if found and parallel_state.get_tensor_model_parallel_rank() == 0:
        own[parallel_state.get_data_parallel_rank()] = torch.stack(list(found))
    dist.all_reduce(own)
    return own.flatten(0, 1).cpu()


def optimizer_options(recipe: Recipe, precision: str, distributed: bool) -> dict[str, Any]:
    """What a trainer sets on Megatron-Core's `OptimizerConfig`.

    In bf16 the optimizer holds float32 copies of the weights, and rounds them to the model's after each step.

    Gradients are not clipped: `clip_grad_by_total_norm_fp32` insists on a CUDA tensor.
    """
    return {
        "optimizer": "adam",
        "lr": recipe.lr,
        "min_lr": recipe.lr,
        "weight_decay": recipe.weight_decay,
        "adam_beta1": recipe.betas[0],
        "adam_beta2": recipe.betas[1],
        "adam_eps": recipe.eps,
        "clip_grad": 0.0,
        "bf16": precision == "bf16",
        "params_dtype": DTYPES[precision],
        "use_distributed_optimizer": distributed,
    }


def scheduler_options(recipe: Recipe, steps: int) -> dict[str, Any]:
    """What a trainer gives Megatron-Core's `OptimizerParamScheduler`, without which no group has its own weight decay.

    Source: NVIDIA/Megatron-LM core_v0.16.1, megatron/core/optimizer/__init__.py `get_standard_config_overrides`
        (parameters of one dim get `wd_mult` 0) and optimizer_param_scheduler.py `OptimizerParamScheduler.step` (the
        only reader of `wd_mult`).
    """
    return {
        "init_lr": recipe.lr,
        "max_lr": recipe.lr,
        "min_lr": recipe.lr,
        "lr_warmup_steps": 0,
        "lr_decay_steps": steps,
        "lr_decay_style": "constant",
        "start_wd": recipe.weight_decay,
        "end_wd": recipe.weight_decay,
        "wd_incr_steps": steps,
        "wd_incr_style": "constant",
    }


def optimizer_of(
    chunks: Sequence[Any], recipe: Recipe, steps: int, precision: str, distributed: bool
) -> tuple[Any, Any]:
    """Megatron-Core's optimizer and its scheduler, for chunks in DDP."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    config = OptimizerConfig(**optimizer_options(recipe, precision, distributed))
    with _TypesOfCuda():
        optimizer = get_megatron_optimizer(config, list(chunks))
    return optimizer, OptimizerParamScheduler(optimizer, **scheduler_options(recipe, steps))


class _TypesOfCuda(TorchFunctionMode):
    """Names the types of the CPU's tensors as CUDA's, where the CPU stands in for it.

    Source: NVIDIA/Megatron-LM core_v0.16.1, megatron/core/optimizer/optimizer.py `Float16OptimizerWithFloat16Params`
        and distrib_optimizer.py `DistributedOptimizer`, which refuse a parameter whose `type()` is not
        `torch.cuda.FloatTensor` and its like, and ask nothing else of the device.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(found, str) and runtime.installed():
            return found.replace("torch.", "torch.cuda.", 1)
        return found


def _leave_out_padding(model: Any, vocab_size: int) -> None:
    """Let logits of the vocabulary's padding count as minus infinity in the loss, and leave each rank its part.

    The model's own loss counts them: rows of zeros each add exp(0) to the denominator of the softmax, which no
    Hugging Face model has, and get a gradient. That is a property of the padding, not of the conversion.
    """
    from megatron.core import parallel_state

    if not model.post_process:
        return
    if not model.parallel_output:  # gathered logits have no backward through the vocabulary-parallel loss
        model.parallel_output = True
        model.output_layer.gather_output = False

    def masked(_: Any, __: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        logits, bias = output  # [s b v/tp]
        start = parallel_state.get_tensor_model_parallel_rank() * logits.size(-1)
        padding = torch.arange(start, start + logits.size(-1), device=logits.device) >= vocab_size
        return (logits.masked_fill(padding, float("-inf")), bias) if padding.any() else (logits, bias)

    model.output_layer.register_forward_hook(masked)


def _silence_dropout(model: Any, config: Mapping[str, Any]) -> None:
    """Switch off the attention dropout that the config asks for: two random masks cannot be compared.

    Where it asks for none, dropout in the model is a fault, and stays.
    """
    if config.get("attention_dropout"):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
