"""`_extra_state`: the state of delayed scaling as bytes in a checkpoint, exchanged with Transformer Engine.

Transformer Engine writes a Python pickle there: the recipe object, the scales, the histories. The same bytes are
written here, opcode by opcode, so that it reads them. Reading runs no unpickler: `pickled` walks the opcodes, refuses
all that no FP8 state needs, and makes plain data of the rest. Storages lie inside as bytes of `torch.save`, which
`torch.load` reads with `weights_only`.

Source: TransformerEngine 2.20.2, transformer_engine/pytorch/module/base.py (`get_extra_state`, `set_extra_state`),
transformer_engine/pytorch/_extra_state.py; pytorch 2.13, torch/_utils.py (`_rebuild_tensor_v2`), torch/storage.py
(`TypedStorage.__reduce__`).
"""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import torch
from torch import Tensor

from converters import pickled
from converters.errors import ConversionError, listing
from converters.pickled import Named, Names, Symbol
from converters.te.quantization import recipes
from converters.te.quantization.delayed import DelayedState
from converters.te.quantization.recipe_classes import fields_of
from converters.te.quantization.recipes import formats_of

VERSION = 1
RECIPES = "transformer_engine.common.recipe"
_TENSORS = ("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd")


def write(delayed: DelayedState | None) -> Tensor:
    """The bytes of a layer's state: uint8, empty where there is none, as other recipes have none.

    Raises:
        ConversionError: The recipe has an algorithm of the caller's own: code is not written into checkpoints.
    """
    if delayed is None:
        return torch.empty(0, dtype=torch.uint8)
    recipe = delayed.recipe
    called = [name for name in ("amax_compute_algo", "scaling_factor_compute_algo") if callable(getattr(recipe, name))]
    if called:
        raise ConversionError(
            f"DelayedScaling with a function as {' and '.join(called)} cannot be saved: a checkpoint holds no code. "
            "Save under one of the named algorithms, or strip `_extra_state`"
        )
    tensors = (
        delayed.forward.scale,
        delayed.forward.amax_history,
        delayed.backward.scale,
        delayed.backward.amax_history,
    )
    forward, backward = formats_of(recipe)
    extra = {
        "fp8_checkpoint": True,
        "num_gemms": delayed.gemms,
        "fp8_max_fwd": forward.largest,
        "fp8_max_bwd": backward.largest,
        "extra_state_version": VERSION,
    }
    items = b"".join(_bytes(name) + _bytes(value.clone()) for name, value in zip(_TENSORS, tensors, strict=True))
    content = _bytes("recipe") + _recipe_bytes(recipe) + items + _bytes("extra_fp8_variables") + _bytes(extra)
    # PROTO 2, EMPTY_DICT, MARK ... SETITEMS, STOP
    return torch.frombuffer(bytearray(b"\x80\x02}(" + content + b"u."), dtype=torch.uint8)


def _bytes(value: object) -> bytes:
    # Protocol 2 numbers its memo explicitly, so that whole fragments may follow each other in one pickle.
    content = pickle.dumps(value, protocol=2)[2:-1]
    # Megatron-Core 0.19 puts a function of its own in the place of torch's, and pickle would write that one's name.
    loads: Any = torch.storage._load_from_bytes
    return content.replace(_symbol(loads.__module__, loads.__qualname__), _symbol("torch.storage", "_load_from_bytes"))


def _symbol(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _recipe_bytes(recipe: Any) -> bytes:
    def name(symbol: str) -> bytes:
        return b"c" + RECIPES.encode() + b"\n" + symbol.encode() + b"\n"

    values = fields_of(recipe)
    # An enumeration is its class called with its value, a named tuple: NEWOBJ, TUPLE1, REDUCE.
    largest = _bytes(tuple(float(each) for each in recipe.fp8_format.value))
    kind = name("Format") + name("_FormatHelper") + largest + b"\x81\x85R"
    items = b"".join(
        _bytes(field) + (kind if field == "fp8_format" else _bytes(value)) for field, value in values.items()
    )
    # The class, no arguments, NEWOBJ, then its fields: BUILD.
    return name("DelayedScaling") + b")\x81" + b"}(" + items + b"u" + b"b"


def read(saved: Tensor | None, gemms: int, live: DelayedState | None, *, where: str) -> DelayedState | None:
    """The state that `write`, or Transformer Engine, saved.

    Args:
        saved: uint8, or None, or empty.
        gemms: Of the layer.
        live: The state that the layer has now.
        where: Which layer, for messages.

    Returns:
        A new state, or None where none was saved and none is there.

    Raises:
        ConversionError: Bytes of another kind, version, recipe or shape; values that cannot be or that are stale; or no
            state where the layer has one, whose scales belong to other weights.
    """
    if saved is None or saved.numel() == 0:
        if live is not None and not live.fresh:
            raise ConversionError(
                f"{where}: the checkpoint has no FP8 state, and the layer has scales and largest magnitudes of other "
                "weights. Call reset_quantization() on the layers first to start from nothing, or load a checkpoint "
                "that was saved under DelayedScaling"
            )
        return live
    content = _parse(saved, where)
    if "recipe" not in content:
        raise ConversionError(
            f"{where}: `_extra_state` has no recipe: Transformer Engine 1.x wrote it ({', '.join(sorted(content))}). "
            "Load and save the checkpoint once with Transformer Engine 2.x, or strip `_extra_state` from it"
        )
    extra = content.get("extra_fp8_variables", {})
    version = extra.get("extra_state_version", VERSION)
    if version != VERSION:
        raise ConversionError(
            f"{where}: `_extra_state` is of version {version}; this release reads version {VERSION}. Read it with the "
            "release that wrote it, or strip `_extra_state`"
        )
    recipe = content["recipe"]
    if not isinstance(recipe, Named):
        raise ConversionError(f"{where}: `_extra_state` has a {type(recipe).__name__} where a recipe belongs")
    if recipe.symbol.name != "DelayedScaling":
        raise ConversionError(
            f"{where}: `_extra_state` is of the recipe {recipe.symbol.name}, which keeps none; expected DelayedScaling"
        )
    state = DelayedState(recipes.DelayedScaling(**_fields(recipe)), gemms)
    wrong = _fill(state, content)
    if wrong:
        raise ConversionError(
            listing(f"{where}: `_extra_state` cannot be used", wrong)
            + "\nLoad the state that was saved with these weights, or strip `_extra_state` and calibrate anew"
        )
    return state


def _fill(state: DelayedState, content: dict[str, Any]) -> list[str]:
    """Copy the tensors into `state`; what is wrong with them."""
    wrong: list[str] = []
    targets = (
        (state.forward.scale, state.forward.amax_history),
        (state.backward.scale, state.backward.amax_history),
    )
    for suffix, (scale, history), kind in zip(("fwd", "bwd"), targets, formats_of(state.recipe), strict=True):
        found = True
        for name, target in ((f"scale_{suffix}", scale), (f"amax_history_{suffix}", history)):
            value = content.get(name)
            if not isinstance(value, Tensor):
                wrong.append(f"{name} is missing")
                found = False
            elif value.shape != target.shape or value.dtype != torch.float32:
                wrong.append(
                    f"{name} is {list(value.shape)} {value.dtype}, expected {list(target.shape)} torch.float32 "
                    f"(amax_history_len {state.recipe.amax_history_len}, {state.gemms} GEMMs)"
                )
                found = False
            else:
                target.copy_(value)
        if found:
            wrong += [f"{line} ({suffix})" for line in _stale(state.recipe, kind.largest, scale, history)]
    return wrong


def _stale(recipe: Any, largest: float, scale: Tensor, history: Tensor) -> list[str]:
    """What in the scales and the history cannot have come of steps."""
    wrong = []
    for slot in range(len(scale)):
        now, seen = float(scale[slot]), history[:, slot]
        if not (0 < now < float("inf")):
            wrong.append(f"scale {now} of slot {slot}")
            continue
        if bool((seen < 0).any() | seen.isnan().any()):
            wrong.append(f"a largest magnitude below zero or NaN in slot {slot}")
            continue
        if len(seen) == 1 or callable(recipe.scaling_factor_compute_algo):
            continue  # A history of one row is empty between steps.
        past = float(seen[1:].max())
        if now != 1 and past == 0 and float(seen[0]) == 0:
            wrong.append(f"scale {now:g} of slot {slot} with an empty history: missing amax")
        # `max` reckons with every row, and the one that dropped out since can only have made the scale smaller.
        limit = largest * 2.0**-recipe.margin / past if past > 0 else float("inf")
        if recipe.amax_compute_algo == "max" and past != float("inf") and now > limit * (1 + 2.0**-20):
            wrong.append(
                f"scale {now:g} of slot {slot} with magnitudes up to {past:g}, which allow {limit:g}: stale amax"
            )
    return wrong


def _fields(recipe: Named) -> dict[str, Any]:
    """The fields of a recipe that this release knows, the format as its enumeration.

    Raises:
        ConversionError: An object that is no format.
    """
    known = fields_of(recipes.DelayedScaling())
    found = {name: value for name, value in recipe.fields.items() if name in known}
    for name, value in found.items():
        if isinstance(value, Named):
            found[name] = _format(value)
    return found


def _format(value: Named) -> Any:
    for each in recipes.Format:
        match value.arguments:
            case (Named(symbol=Symbol(name="_FormatHelper"), arguments=largest),) if largest == tuple(each.value):
                return each
    raise ConversionError(f"`_extra_state` has a {value.symbol.name} of no known largest values in its recipe")


def _storage(content: bytes) -> Any:
    # `weights_only`: tensors and plain values, nothing that runs.
    found = torch.load(io.BytesIO(content), weights_only=True)
    if not isinstance(found, torch.storage.TypedStorage):
        raise ConversionError(f"`_extra_state` has a {type(found).__name__} where a storage belongs")
    return found


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    if not isinstance(storage, torch.storage.TypedStorage):
        raise ConversionError(f"`_extra_state` has a {type(storage).__name__} where a storage belongs")
    held = storage._untyped_storage.nbytes() // storage.dtype.itemsize
    if math.prod(size) > held:  # by strides of zero, a few bytes could ask for any amount of memory
        raise ConversionError(f"`_extra_state` has a tensor of {list(size)} over {held} elements")
    flat = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)
    return flat.as_strided(size, stride, offset)


_NAMES = Names(
    calls={"torch._utils._rebuild_tensor_v2": _tensor, "torch.storage._load_from_bytes": _storage},
    objects=frozenset([f"{RECIPES}.*"]),
)


def _parse(saved: Tensor, where: str) -> dict[str, Any]:
    try:
        content = pickled.parse(
            bytes(saved.cpu().contiguous().view(torch.uint8).numpy()), names=_NAMES, where="`_extra_state`"
        )
    except ConversionError as error:
        raise ConversionError(f"{where}: {error}") from error
    except Exception as error:
        raise ConversionError(
            f"{where}: `_extra_state` ({saved.numel()} bytes) is no FP8 state of Transformer Engine ({error}); strip "
            "it from the checkpoint to start from nothing"
        ) from error
    if not isinstance(content, dict):
        raise ConversionError(f"{where}: `_extra_state` holds a {type(content).__name__}, expected an FP8 state")
    return content
