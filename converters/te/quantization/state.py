"""Which recipe is in force, and when the scales of delayed scaling are made.

Source: TransformerEngine 2.20.2, transformer_engine/pytorch/quantization.py (`autocast`, `quantized_model_init`,
`FP8GlobalStateManager`).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from converters.errors import ConversionError
from converters.te.quantization.delayed import DelayedState
from converters.te.quantization.recipes import DelayedScaling, formats_of, scheme_of


@dataclass(frozen=True, kw_only=True)
class Context:
    """What an `autocast` has set.

    Attributes:
        enabled: Whether GEMMs are quantised.
        calibrating: Whether the largest magnitudes are recorded although they are not.
        recipe: The recipe; None outside any autocast.
        group: The ranks that share the scales of delayed scaling.
    """

    enabled: bool = False
    calibrating: bool = False
    recipe: Any = None
    group: Any = None


class _Manager:
    """The state of the process; as in Transformer Engine, there is one."""

    def __init__(self) -> None:
        self.context = Context()
        self.depth = 0
        self.first = False
        self.parameters: Any = None
        self.registered: weakref.WeakKeyDictionary[DelayedState, tuple[Any, Any]] = weakref.WeakKeyDictionary()


_manager = _Manager()


def current() -> Context:
    """What is in force here."""
    return _manager.context


def parameter_recipe() -> Any:
    """The recipe of the enclosing `quantized_model_init`, or None."""
    return _manager.parameters


def default_recipe() -> Any:
    """The recipe where none is given: Transformer Engine's choice on a GPU before Blackwell."""
    return DelayedScaling()


class autocast(contextlib.ContextDecorator):
    """GEMMs of the reference layers inside run in `recipe`, forward and backward.

    Args:
        enabled: False switches an enclosing autocast off.
        calibrating: Where not enabled, record the largest magnitudes for delayed scaling all the same.
        recipe: `DelayedScaling()` by default.
        amax_reduction_group: The ranks that share the scales of delayed scaling; by default all.

    Raises:
        ConversionError: A recipe that the reference does not compute.
    """

    def __init__(
        self,
        enabled: bool = True,
        calibrating: bool = False,
        recipe: Any = None,
        amax_reduction_group: Any = None,
    ) -> None:
        recipe = default_recipe() if recipe is None else recipe
        if enabled:
            scheme_of(recipe)
        self.context = Context(enabled=enabled, calibrating=calibrating, recipe=recipe, group=amax_reduction_group)
        self.outer: Context | None = None

    def _recreate_cm(self) -> autocast:
        c = self.context
        return autocast(c.enabled, c.calibrating, c.recipe, c.group)

    def __enter__(self) -> autocast:
        if self.outer is not None:
            raise ConversionError("this autocast is already in force: make another one to nest it")
        self.outer, _manager.context = _manager.context, self.context
        if _manager.depth == 0:
            _manager.first = True
        _manager.depth += 1
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.outer is not None
        _manager.context, self.outer = self.outer, None
        _manager.depth -= 1
        # After an error other ranks may never come here, and would be waited for.
        whole = exception[0] is None
        if whole and self.context.enabled and _manager.depth == 0 and torch.is_grad_enabled():
            update(forward=True)


@contextlib.contextmanager
def quantized_model_init(
    enabled: bool = True, recipe: Any = None, preserve_high_precision_init_val: bool = False
) -> Iterator[None]:
    """Layers made inside hold weights that are rounded to the recipe's grid.

    Raises:
        ConversionError: A recipe that the reference does not compute, or high-precision copies are asked for.
    """
    if preserve_high_precision_init_val:
        raise ConversionError(
            "the reference keeps no high-precision copy of quantised weights: keep the weights before they are loaded"
        )
    recipe = default_recipe() if recipe is None else recipe
    if enabled:
        scheme_of(recipe)
    before, _manager.parameters = _manager.parameters, recipe if enabled else None
    try:
        yield
    finally:
        _manager.parameters = before


def register(state: DelayedState) -> None:
    """Have `state` updated at the end of steps from now on, with the recipe and the group of its first step."""
    context = _manager.context
    _manager.registered.setdefault(state, (context.recipe, context.group))


def take_first() -> bool:
    """True once in each outermost autocast: the first layer's backward is the last, and ends the backward step."""
    first, _manager.first = _manager.first, False
    return first


def update(*, forward: bool) -> None:
    """End a step in one direction: reduce the largest magnitudes over ranks, make scales of them.

    Every rank of a group must have run the same layers in the same order, as in Transformer Engine.
    """
    groups: dict[tuple[str, int], list[DelayedState]] = {}
    settings = {}
    for each, (recipe, group) in _manager.registered.items():
        key = (repr(recipe), id(group))
        settings[key] = recipe, group
        groups.setdefault(key, []).append(each)
    for key, members in groups.items():
        recipe, group = settings[key]
        directions = [each.forward if forward else each.backward for each in members]
        newest = [direction.amax_history[0] for direction in directions]
        if recipe.reduce_amax and torch.distributed.is_initialized() and torch.distributed.get_world_size(group) > 1:
            joined = torch.cat(newest)
            torch.distributed.all_reduce(joined, op=torch.distributed.ReduceOp.MAX, group=group)
            newest = list(joined.split([len(each) for each in newest]))
        largest = formats_of(recipe)[not forward].largest
        for direction, values in zip(directions, newest, strict=True):
            direction.update(recipe, largest, values.clone())


def reset() -> None:
    """Forget every layer and every context."""
    _manager.__init__()  # type: ignore[misc]
