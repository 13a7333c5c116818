"""Faults in what a model on Transformer Engine's layers computes, in the process of a rank.

A patch is put on the models that a converter returned, and on the modules that they run in: the torch reference of the
layers, which is what runs without a GPU. It lives as long as the rank.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from parity.faults import te_quantising
from parity.faults.breaks import NotHereError
from parity.faults.patches import in_module, on_ranks

REFERENCE = "converters.te.reference"
Patched = Callable[[Sequence[Any]], None]


def _each(models: Sequence[Any], path: str) -> Iterator[Any]:
    """The part of every layer at `path`, such as `self_attention.core_attention`."""
    for layer in (layer for model in models for layer in model.model.layers):
        part = layer
        for step in path.split("."):
            part = getattr(part, step, None)
        if part is None:
            raise NotHereError(f"layers of {type(layer).__name__} have no {path}")
        yield part


def _frequencies(change: Callable[[Tensor], Tensor]) -> Patched:
    def patch(models: Sequence[Any]) -> None:
        for model in models:
            angles = model.model.rotary_emb
            angles.inv_freq = change(angles.inv_freq)

    return patch


def _eps_outside(_: Sequence[Any]) -> None:
    def wrong(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, **_: Any) -> Tensor:
        wide = x.float()
        return (wide / (wide.pow(2).mean(-1, keepdim=True).sqrt() + eps) * weight.float()).to(x.dtype)

    for name in ("norm", "layernorm_linear", "layernorm_mlp"):
        module: Any = importlib.import_module(f"{REFERENCE}.{name}")
        module.normalize = wrong


def _eps_default(models: Sequence[Any]) -> None:
    for module in (module for model in models for module in model.modules()):
        if isinstance(getattr(module, "eps", None), float):
            module.eps = 1e-6


def _scaled_by_hidden(models: Sequence[Any]) -> None:
    for model in models:
        config = model.config
        for core in _each([model], "self_attention.core_attention"):
            core.softmax_scale = 1 / math.sqrt(config.hidden_size / config.num_attention_heads)


def _seen(allowed: Callable[[Tensor, Tensor], Tensor]) -> Patched:
    """A query sees the keys that `allowed(query, key)` says, wherever layers make a causal mask."""

    def wrong(s: int, t: int, *, bottom_right: bool, device: torch.device) -> Tensor:
        query = torch.arange(s, device=device)[:, None] + (t - s if bottom_right else 0)
        return ~allowed(query, torch.arange(t, device=device))

    return in_module(f"{REFERENCE}.attention", "causal_mask", lambda right: wrong)


def _gelu(models: Sequence[Any]) -> None:
    for mlp in _each(models, "layernorm_mlp"):
        mlp.activation = "geglu"


def _interleaved(models: Sequence[Any]) -> None:
    for attention in _each(models, "self_attention"):
        attention.rotary_pos_interleaved = True


def _without(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function that is not told some of its arguments."""
    return lambda right: lambda *given, **named: right(*given, **named | dict.fromkeys(names))


def _unmasked(right: Callable[..., Any]) -> Callable[..., Any]:
    """Padding is not masked; a mask that masks nothing stays."""

    def wrong(*given: Any, attention_mask: Tensor | None = None, **named: Any) -> Any:
        masked = attention_mask is not None and not bool(attention_mask.all())
        return right(*given, attention_mask=None if masked else attention_mask, **named)

    return wrong


def _one_sequence(right: Callable[..., Any]) -> Callable[..., Any]:
    """Packed sequences are taken for one."""

    def wrong(total: int, cu_seqlens: Tensor, *_: Any, **__: Any) -> Any:
        return right(total, torch.tensor([0, total], dtype=torch.int32), None)

    return wrong


def _padding_uncounted(right: Callable[..., Any]) -> Callable[..., Any]:
    """Positions of packed sequences go by their lengths, where ranks have them with their padding."""

    def wrong(*given: Any, **named: Any) -> Any:
        attention, hidden = given[:2]
        if named.get("pad_between_seqs"):
            starts = named["cu_seqlens_q"].clone()
            starts[-1] = named["cu_seqlens_q_padded"][-1]  # the last one takes what is left over
            size = 2 * attention.cp_group.size()
            starts[1:-1] = starts[1:-1] // size * size
            rope: Any = importlib.import_module(f"{REFERENCE}.multi_head_attention")
            turn = rope.apply_rotary_pos_emb
            rope.apply_rotary_pos_emb = lambda *x, **options: turn(*x, **options | {"cu_seqlens": starts})
            try:
                return right(attention, hidden, *given[2:], **named)
            finally:
                rope.apply_rotary_pos_emb = turn
        return right(*given, **named)

    return wrong


def _contiguous(_: Callable[..., Any]) -> Callable[..., Any]:
    """Under context parallelism a rank rotates as if it held one run of tokens, not two."""
    return lambda local, length, cp_size, cp_rank: local + cp_rank * length


def _rank_mean(_: Callable[..., Any]) -> Callable[..., Any]:
    """Each rank's mean counts as much as another's, however many tokens it stands for."""
    ignored = importlib.import_module("converters.te.parallel").IGNORED
    return lambda self, labels: (labels != ignored).sum().clamp(min=1) * self.cp_size


def _stale(right: Callable[..., Any]) -> Callable[..., Any]:
    """A sequence that goes on does not see its newest token."""

    def wrong(self: Any, *given: Any, **named: Any) -> Any:
        keys, values, queries, lengths, *rest = right(self, *given, **named)
        held = self.get_seqlens_pre_step()
        each = lengths.diff() - (held > 0).to(lengths)
        return keys, values, queries, torch.cat([lengths[:1], each.cumsum(0).to(lengths)]), *rest

    return wrong


CACHE = f"{REFERENCE}.inference:InferenceParams"
MODEL, PARALLEL = "converters.te.modeling", "converters.te.parallel"
PATCHES: Mapping[str, Patched] = {
    "inv_freq in bf16": _frequencies(lambda right: right.bfloat16().float()),
    "no rope": _frequencies(torch.zeros_like),
    "rope interleaved": _interleaved,
    "eps outside the root": _eps_outside,
    "eps 1e-6": _eps_default,
    "scale by hidden": _scaled_by_hidden,
    "no causal mask": _seen(lambda query, key: (key >= 0) & (query >= 0)),
    "one token ahead": _seen(lambda query, key: key <= query + 1),
    "sliding window": _seen(lambda query, key: (key <= query) & (key > query - 64)),
    "gelu": _gelu,
    "left padding ignored": in_module(MODEL, "arrange", _unmasked),
    "packed sequences leak": in_module(f"{REFERENCE}.attention", "packed_spans", _one_sequence),
    "padded tail uncounted": in_module(
        f"{REFERENCE}.multi_head_attention:MultiheadAttention", "forward", _padding_uncounted
    ),
    "contiguous cp positions": in_module(f"{REFERENCE}.rope", "_global_position", _contiguous),
    "vocabulary halves exchanged": in_module(
        f"{PARALLEL}:Parallel",
        "gather_logits",
        lambda right: lambda self, logits, size: right(self, logits.roll(1, dims=-1), size),
    ),
    "cp loss averaged": in_module(f"{PARALLEL}:Parallel", "count", _rank_mean),
    "gradients of norms not added": in_module(PARALLEL, "REPLICATED", lambda right: ()),
    "cache stale by one": in_module(CACHE, "step", _stale),
    "decode positions off by one": in_module(
        CACHE, "get_seqlens_pre_step", lambda right: lambda self: (right(self) - 1).clamp(min=0)
    ),
    "beam cache not reordered": in_module(
        "converters.te.generation:HFInferenceParams", "reorder_cache", lambda right: lambda self, order: None
    ),
    "padding ignored in decode": in_module(MODEL, "cached", _without("attention_mask", "position_ids")),
    **on_ranks,
    **te_quantising.PATCHES,
}
"""By name, as `parity.faults.patches.PATCHES`: what has one name in both is one fault on two backends."""
