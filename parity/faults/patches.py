"""Faults on the Megatron side, in the process of a rank: of a model's parameters, and of what it computes.

A patch is put on the chunks that a converter returned, and lives as long as the rank.
"""

from __future__ import annotations

import copy
import importlib
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from converters.topology import Coord, Topology
from parity.faults import mutations
from parity.faults.breaks import NotHereError
from parity.faults.mutate import value


def bare(chunk: Any) -> Any:
    """The `GPTModel` in a chunk."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def apply_live(mutation: mutations.Live, chunks: Sequence[Any], vocab: int, topology: Topology) -> None:
    """Change parameters of this rank's models, of either backend.

    Raises:
        NotHereError: No rank holds a parameter that the mutation names.
    """
    place = topology.coord(torch.distributed.get_rank())
    last = {dim: getattr(place, dim) == topology.size(dim) - 1 for dim in ("tp", "pp", "cp")} | {"all": True}
    found = 0
    for chunk in chunks if last[mutation.where] else ():
        for name, parameter in bare(chunk).named_parameters():
            if re.search(mutation.pattern, name):
                found += 1
                with torch.no_grad():
                    _change(mutation.how, parameter.data, vocab, place)
    if torch.distributed.is_initialized():
        count = torch.tensor([found])
        torch.distributed.all_reduce(count)
        found = int(count)
    if not found:
        raise NotHereError(f"no parameter matches {mutation.pattern!r}")


def _change(how: str, data: Tensor, vocab: int, place: Coord) -> None:
    if how == "row below":
        data.copy_(data.roll(-1, dims=0))
    elif how == "padding":
        behind = max(0, len(data) - max(0, vocab - len(data) * place.tp))
        if behind:
            data[-behind:] = 0.5
    elif how == "last row":
        data[-1] = 0.5
    else:
        data.copy_(value(how, data.cpu()))


def _models(chunks: Sequence[Any]) -> list[Any]:
    return [bare(chunk) for chunk in chunks]


def _parts(chunks: Sequence[Any], name: str) -> Iterator[Any]:
    """The parts of every layer at the path `name`, such as `self_attention.core_attention`."""
    layers = [layer for model in _models(chunks) for layer in model.decoder.layers]
    for layer in layers:
        part = layer
        for step in name.split("."):
            part = getattr(part, step, None)
        if part is None:
            raise NotHereError(f"layers of {type(layer).__name__} have no {name}")
        yield part


def _norms(chunks: Sequence[Any]) -> list[Any]:
    found = [
        m for model in _models(chunks) for m in model.modules() if "Norm" in type(m).__name__ and hasattr(m, "eps")
    ]
    if not found:
        raise NotHereError("no norms of their own")
    return found


def _rounded_frequencies(chunks: Sequence[Any]) -> None:
    for model in _models(chunks):
        model.rotary_pos_emb.inv_freq = model.rotary_pos_emb.inv_freq.bfloat16().float()


def _eps_outside(chunks: Sequence[Any]) -> None:
    for norm in _norms(chunks):

        def forward(x: Tensor, norm: Any = norm) -> Tensor:
            wide = x.float()
            root = wide.pow(2).mean(-1, keepdim=True).sqrt() + norm.eps
            return (wide / root).to(x) * norm.weight  # type: ignore[no-any-return]

        norm.forward = forward


def _eps_default(chunks: Sequence[Any]) -> None:
    for norm in _norms(chunks):
        norm.eps = 1e-6


def _scaled_by_hidden(chunks: Sequence[Any]) -> None:
    """Scores over the root of hidden / heads where head_dim is another."""
    for core in _parts(chunks, "self_attention.core_attention"):
        name = next((name for name in ("softmax_scale", "scale") if isinstance(getattr(core, name, None), float)), None)
        if name is None:
            raise NotHereError(f"{type(core).__name__} has no scale")
        config = core.config
        setattr(core, name, 1 / math.sqrt(config.hidden_size / config.num_attention_heads))


Allowed = Callable[[Tensor, Tensor], Tensor]


def _seen(allowed: Allowed, *, own_mask: bool = True) -> Callable[[Sequence[Any]], None]:
    """A patch of attention: a query sees the keys that `allowed(query, key)` says, and what a given mask leaves."""

    def patch(chunks: Sequence[Any]) -> None:
        for softmax in _parts(chunks, "self_attention.core_attention.scale_mask_softmax"):

            def forward(scores: Tensor, mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
                queries, keys = scores.shape[-2:]
                at = torch.arange(queries)[:, None] + keys - queries
                hidden = ~allowed(at, torch.arange(keys))
                if mask is not None and own_mask:
                    hidden = hidden | mask
                return torch.softmax(scores.float().masked_fill(hidden, -10000.0), dim=-1).to(scores)

            softmax.forward = forward

    return patch


def _rounded_softmax(chunks: Sequence[Any]) -> None:
    for softmax in _parts(chunks, "self_attention.core_attention.scale_mask_softmax"):
        right = softmax.forward
        softmax.forward = lambda *given, right=right, **named: right(*given, **named).bfloat16().to(given[0])


def _interleaved_rope(chunks: Sequence[Any]) -> None:
    for model in _models(chunks):
        model.rotary_pos_emb.rotary_interleaved = True
    for attention in _parts(chunks, "self_attention"):
        attention.config = copy.copy(attention.config)
        attention.config.rotary_interleaved = True


def _no_rope(chunks: Sequence[Any]) -> None:
    for model in _models(chunks):
        model.rotary_pos_emb.inv_freq = torch.zeros_like(model.rotary_pos_emb.inv_freq)


def _gelu(chunks: Sequence[Any]) -> None:
    for mlp in _parts(chunks, "mlp"):
        mlp.activation_func = torch.nn.functional.gelu
        mlp.config = copy.copy(mlp.config)
        mlp.config.activation_func = torch.nn.functional.gelu


def _moved_positions(chunks: Sequence[Any]) -> None:
    """Every position is three further on. Attention by differences of positions does not see it."""
    for model in _models(chunks):
        rope = model.rotary_pos_emb
        right = rope.get_freqs_non_repeated
        rope.get_freqs_non_repeated = lambda count, offset=0, right=right: right(count, offset + 3)


def _contiguous_positions(chunks: Sequence[Any]) -> None:
    """Under context parallelism a rank rotates as if it held one run of tokens, not two."""
    rope = importlib.import_module("megatron.core.models.common.embeddings.rotary_pos_embedding")

    def run(angles: Tensor, dim: int, group: Any) -> Tensor:
        mine: Tensor = angles.chunk(group.size(), dim)[group.rank()]
        return mine

    rope.get_pos_emb_on_this_cp_rank = run  # type: ignore[attr-defined]  # a module of Megatron-Core


def _is_last() -> bool:
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


def _dies(_: Sequence[Any]) -> None:
    if _is_last():
        os._exit(3)


def _hangs(_: Sequence[Any]) -> None:
    if _is_last():
        time.sleep(3600)


def _raises(_: Sequence[Any]) -> None:
    if _is_last():
        raise RuntimeError("a fault of the self-test")


def in_module(where: str, name: str, wrong: Callable[[Any], Any]) -> Callable[[Sequence[Any]], None]:
    """A patch of what running stands on, in a module or `module:class`: `wrong` is made of the right one."""

    def patch(_: Sequence[Any]) -> None:
        module, _, kind = where.partition(":")
        found = importlib.import_module(module)
        found = getattr(found, kind) if kind else found
        if not hasattr(found, name):
            raise NotHereError(f"{where} has no {name}")
        setattr(found, name, wrong(getattr(found, name)))

    return patch


def _rank_mean(right: Callable[..., Any]) -> Callable[..., Any]:
    """Each rank's mean counts as much as another's, however many tokens it stands for."""

    def wrong(losses: Tensor, labels: Tensor) -> Any:
        total, tokens, both = right(losses, labels)
        return total / tokens.clamp(min=1), torch.ones_like(tokens), both

    return wrong


def _no_p2p_options(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda topology: right(topology) | {"overlap_p2p_comm": False, "batch_p2p_comm": True}


def _untied_gradients(_: Sequence[Any]) -> None:
    """The first and the last stage keep their own gradients of the one matrix."""
    finalize = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    names = [name for name in dir(finalize) if "embedding_grad" in name and name.startswith("_allreduce")]
    if not names:
        raise NotHereError("gradients of a tied embedding are added up elsewhere")
    for name in names:
        setattr(finalize, name, lambda *_, **__: None)


on_ranks = {"a rank dies": _dies, "a rank hangs": _hangs, "a rank raises": _raises}
"""Patches of a process, whatever it computes."""
GENERATION, TRAINING = "converters.megatron.generation", "parity.observation.megatron.training"
PATCHES: Mapping[str, Callable[[Sequence[Any]], None]] = {
    "inv_freq in bf16": _rounded_frequencies,
    "eps outside the root": _eps_outside,
    "eps 1e-6": _eps_default,
    "scale by hidden": _scaled_by_hidden,
    "no causal mask": _seen(lambda query, key: key >= 0),
    "one token ahead": _seen(lambda query, key: key <= query + 1),
    "sliding window": _seen(lambda query, key: (key <= query) & (key > query - 64)),
    "mask ignored": _seen(lambda query, key: key <= query, own_mask=False),
    "softmax in bf16": _rounded_softmax,
    "rope interleaved": _interleaved_rope,
    "no rope": _no_rope,
    "gelu": _gelu,
    "positions moved": _moved_positions,
    "contiguous cp positions": _contiguous_positions,
    **on_ranks,
    "cp loss averaged": in_module(TRAINING, "token_mean", _rank_mean),
    "default p2p": in_module(TRAINING, "schedule_options", _no_p2p_options),
    "tied gradients not added": _untied_gradients,
    "cache stale by one": in_module(
        GENERATION, "cache_length", lambda right: lambda context: max(0, right(context) - 1)
    ),
    "decode positions off by one": in_module(
        GENERATION,
        "decode_positions",
        lambda right: lambda start, count, padding: right(start - 1 if start else 0, count, padding),
    ),
    "padding ignored in decode": in_module(
        GENERATION, "hidden_slots", lambda right: lambda start, count, _: right(start, count, None)
    ),
    "padding rows chosen": in_module(
        GENERATION, "next_tokens", lambda right: lambda logits, vocab: right(logits, logits.size(-1))
    ),
}
