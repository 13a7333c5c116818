"""The pickle that Transformer Engine writes as `_extra_state`, read as data: no unpickler runs.

The opcodes are walked here, over a stack of plain values. An opcode, or a name, that no FP8 state needs is refused.
Nothing is imported and no class is made: an object of Transformer Engine becomes a `Named`, of this one reading.
Storages lie inside as bytes of `torch.save`, which `torch.load` reads with `weights_only`.

Source: python/cpython 3.12, Lib/pickletools.py (`genops`, what each opcode does to the stack); pytorch 2.13,
    torch/_utils.py (`_rebuild_tensor_v2`), torch/storage.py (`TypedStorage.__reduce__`).
"""

from __future__ import annotations

import io
import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from converters.errors import ConversionError

RECIPES = "transformer_engine.common.recipe"


@dataclass(frozen=True, kw_only=True)
class Symbol:
    """A name in the bytes: what it stands for is never looked up."""

    module: str
    name: str


@dataclass(frozen=True, kw_only=True)
class Named:
    """An object of the recipe module: its class by name, what it was made of, its fields."""

    name: str
    made_of: tuple[Any, ...]
    fields: dict[str, Any] = field(default_factory=dict)


def parse(content: bytes) -> Any:
    """What the bytes stand for: numbers, texts, tensors, `Named` objects, and containers of them.

    Raises:
        ConversionError: An opcode or a name that no FP8 state needs.
        ValueError: No pickle, or a damaged one; other errors of Python, where values do not fit their opcode.
    """
    return _Machine().run(content)


def _bytes(text: str, encoding: str) -> bytes:
    # How the pickles of protocol 2 hold bytes.
    if encoding != "latin1":
        raise ConversionError(f"`_extra_state` has bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _storage(content: bytes) -> Any:
    # `weights_only`: tensors and plain values, nothing that runs.
    found = torch.load(io.BytesIO(content), weights_only=True)
    if not isinstance(found, torch.storage.TypedStorage):
        raise ConversionError(f"`_extra_state` has a {type(found).__name__} where a storage belongs")
    return found


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    held = storage._untyped_storage.nbytes() // storage.dtype.itemsize
    if math.prod(size) > held:  # by strides of zero, a few bytes could ask for any amount of memory
        raise ConversionError(f"`_extra_state` has a tensor of {list(size)} over {held} elements")
    flat = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)
    return flat.as_strided(size, stride, offset).clone()


_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("collections", "OrderedDict"): lambda: {},
    ("_codecs", "encode"): _bytes,
}
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_PLAIN: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


class _Machine:
    """The stack and the memo of one reading."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(content):
            self._step(opcode.name, argument)
        (found,) = self.stack
        return found

    def _step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        if opcode in ("PROTO", "FRAME", "STOP"):
            return
        if opcode in _VALUES:
            stack.append(argument)
        elif opcode in _PLAIN:
            stack.append(_PLAIN[opcode]())
        elif opcode == "MARK":
            stack.append(_MARK)
        elif opcode in _SHORT_TUPLES:
            stack.append(tuple(self._pop(_SHORT_TUPLES[opcode])))
        elif opcode == "TUPLE":
            stack.append(tuple(self._to_mark()))
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif opcode == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif opcode in ("APPEND", "APPENDS"):
            items = self._pop(1) if opcode == "APPEND" else self._to_mark()
            self._top(list).extend(items)
        elif opcode in ("SETITEM", "SETITEMS"):
            items = self._pop(2) if opcode == "SETITEM" else self._to_mark()
            self._top(dict).update(zip(items[::2], items[1::2], strict=True))
        elif opcode == "GLOBAL":
            stack.append(_symbol(*argument.split(" ", 1)))
        elif opcode == "STACK_GLOBAL":
            stack.append(_symbol(*self._pop(2)))
        elif opcode in ("REDUCE", "NEWOBJ"):
            stack.append(_made(*self._pop(2)))
        elif opcode == "BUILD":
            (state,) = self._pop(1)
            self._top(Named).fields.update(state)
        else:
            raise ConversionError(f"`_extra_state` has the pickle opcode {opcode}, which no FP8 state needs")

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("the stack of the pickle runs empty")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def _to_mark(self) -> list[Any]:
        at = max((i for i, value in enumerate(self.stack) if value is _MARK), default=None)
        if at is None:
            raise ValueError("the pickle has no mark")
        taken = self.stack[at + 1 :]
        del self.stack[at:]
        return taken

    def _top(self, kind: type) -> Any:
        """The top of the stack, which only a value that was made here may be changed as."""
        if type(self.stack[-1]) is not kind:
            raise ConversionError(
                f"`_extra_state` changes a {type(self.stack[-1]).__name__} as if it were a {kind.__name__}"
            )
        return self.stack[-1]


def _symbol(module: str, name: str) -> Symbol:
    if module != RECIPES and (module, name) not in _CALLS:
        raise ConversionError(f"`_extra_state` calls {module}.{name}, which no FP8 state needs: it is not read")
    return Symbol(module=module, name=name)


def _made(symbol: Any, arguments: Any) -> Any:
    if type(symbol) is not Symbol or type(arguments) is not tuple:
        raise ConversionError(f"`_extra_state` calls a {type(symbol).__name__}: it is not read")
    if symbol.module == RECIPES:
        return Named(name=symbol.name, made_of=arguments)
    return _CALLS[symbol.module, symbol.name](*arguments)
