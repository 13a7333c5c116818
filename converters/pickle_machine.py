"""The machine that a pickle is a program of, with plain values on its stack and nothing that runs.

Source: python/cpython 3.12, Lib/pickletools.py (`opcodes`: what each does to the stack and the memo).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NoReturn

from converters.errors import CheckpointError
from converters.pickle_names import Named, Names, Symbol, shown

_MAX_INTEGER = 17  # bytes: 128 bits and a sign, which states of random generators have
_MAX_NAME = 512  # characters of a module and a name in it
_CALL_BUDGET = 4  # times the bytes of the pickle: so many values and characters may calls be given


def key_of(value: Any) -> Any:
    """A dict's key: of a kind whose hash takes no time and that cannot be made to collide."""
    if type(value) in (str, bytes, bool, float, type(None), Named) or (
        type(value) is int and -(2**63) <= value < 2**64
    ):
        return value
    raise ValueError(f"a {type(value).__name__} as the key of a dict")


class Machine:
    """The stack and the memo of one reading."""

    def __init__(self, content: bytes, names: Names, where: str, persistent: Callable[[Any], Any] | None) -> None:
        self.content, self.names, self.where, self.persistent = content, names, where, persistent
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.ordered: dict[int, dict[Any, Any]] = {}
        self.budget = _CALL_BUDGET * len(content)

    def run(self) -> Any:
        steps, content = _STEPS, self.content
        while True:
            code = content[self.at]
            self.at += 1
            if code == _STOP:
                break
            step = steps.get(code)
            if step is None:
                self.refuse(f"has the pickle opcode {code:#04x}, which nothing here needs")
            step(self)
        if len(self.stack) != 1 or self.marks:
            raise ValueError(f"{len(self.stack)} values at its end")
        return self.stack[0]

    def refuse(self, why: str) -> NoReturn:
        raise CheckpointError(f"{self.where} {why}: it is not read")

    # What follows an opcode.

    def take(self, count: int) -> bytes:
        start, self.at = self.at, self.at + count
        if self.at > len(self.content):
            raise ValueError("its end is missing")
        return self.content[start : self.at]

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        end = self.content.index(b"\n", self.at)
        text = self.content[self.at : end].decode()
        self.at = end + 1
        return text

    # The stack.

    def pop(self, count: int) -> list[Any]:
        floor = self.marks[-1] if self.marks else 0
        if len(self.stack) - count < floor:
            raise ValueError("its stack runs empty")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def peek(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("its stack runs empty")
        return self.stack[-1]

    def to_mark(self) -> list[Any]:
        at = self.marks.pop()
        taken = self.stack[at:]
        del self.stack[at:]
        return taken

    def top(self, kind: type) -> Any:
        """The top of the stack, which only a value that was made here may be changed as."""
        value = self.peek()
        if type(value) is not kind:
            told = f"{value} (a name)" if type(value) is Symbol else type(value).__name__
            self.refuse(f"changes a {shown(told)} as if it were a {kind.__name__.lower()}")
        return value

    def push_text(self, content: bytes) -> None:
        self.stack.append(content.decode("utf-8", "surrogatepass"))

    def integer(self, width: int) -> None:
        if width > _MAX_INTEGER:
            self.refuse(f"has an integer of {width:,} bytes")
        self.stack.append(int.from_bytes(self.take(width), "little", signed=True))

    def extend(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def update(self, items: list[Any]) -> None:
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key_of(key)] = value

    # Names and objects.

    def symbol(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name that is no text")
        if len(module) + len(name) > _MAX_NAME:
            raise ValueError("a name without end")
        found = Symbol(module, name)
        if not self.names.known(found):
            self.refuse(f"calls {shown(found)}, which nothing here needs")
        self.stack.append(found)

    def spend(self, arguments: tuple[Any, ...]) -> None:
        self.budget -= len(arguments)
        for value in arguments:
            if type(value) in (str, bytes, tuple, list, dict):
                self.budget -= len(value)
        if self.budget < 0:
            self.refuse("asks for more work than its size allows")

    def make(self, called: list[Any], new: bool) -> None:
        symbol, arguments = called
        if type(symbol) is not Symbol or type(arguments) is not tuple:
            self.refuse(f"calls a {type(symbol).__name__}")
        call = self.names.calls.get(str(symbol))
        if call is None:
            self.stack.append(Named(symbol, arguments, None, new))
            return
        self.spend(arguments)
        try:
            made = call(*arguments)
        except CheckpointError as error:
            raise CheckpointError(f"{self.where}: {error}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{self.where} calls {symbol} with what does not fit it ({shown(error)}): it is not read"
            ) from error
        if str(symbol) == "collections.OrderedDict":
            self.ordered[id(made)] = made
        self.stack.append(made)

    def build(self) -> None:
        (state,) = self.pop(1)
        if self.stack and id(self.stack[-1]) in self.ordered:
            return  # attributes of an OrderedDict: `_metadata`, the versions of the modules of a state dict
        target = self.top(Named)
        if target.state is not None:
            self.refuse(f"gives a {shown(target.symbol)} its state twice")
        target.state = state

    def instance(self) -> NoReturn:
        found = Symbol(self.line(), self.line())
        self.refuse(f"calls {shown(found)}, by the opcode INST, which nothing here needs")

    def outside(self) -> None:
        (identity,) = self.pop(1)
        if self.persistent is None:
            self.refuse("has an object that lies outside of it")
        if type(identity) is tuple:
            self.spend(identity)
        self.stack.append(self.persistent(identity))

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def put(self, index: int) -> None:
        self.memo[index] = self.peek()


_STOP = ord(".")
_STEPS: dict[int, Callable[[Machine], Any]] = {
    0x80: lambda m: m.take(1),  # PROTO
    0x95: lambda m: m.take(8),  # FRAME
    ord("("): Machine.mark,
    ord("N"): lambda m: m.stack.append(None),
    0x88: lambda m: m.stack.append(True),
    0x89: lambda m: m.stack.append(False),
    ord("K"): lambda m: m.stack.append(m.number(1)),
    ord("M"): lambda m: m.stack.append(m.number(2)),
    ord("J"): lambda m: m.integer(4),
    0x8A: lambda m: m.integer(m.number(1)),  # LONG1
    0x8B: lambda m: m.integer(m.number(4)),  # LONG4
    ord("G"): lambda m: m.stack.append(struct.unpack(">d", m.take(8))[0]),
    ord("X"): lambda m: m.push_text(m.take(m.number(4))),
    0x8C: lambda m: m.push_text(m.take(m.number(1))),
    0x8D: lambda m: m.push_text(m.take(m.number(8))),
    ord("B"): lambda m: m.stack.append(m.take(m.number(4))),
    ord("C"): lambda m: m.stack.append(m.take(m.number(1))),
    0x8E: lambda m: m.stack.append(m.take(m.number(8))),
    ord(")"): lambda m: m.stack.append(()),
    0x85: lambda m: m.stack.append(tuple(m.pop(1))),
    0x86: lambda m: m.stack.append(tuple(m.pop(2))),
    0x87: lambda m: m.stack.append(tuple(m.pop(3))),
    ord("t"): lambda m: m.stack.append(tuple(m.to_mark())),
    ord("]"): lambda m: m.stack.append([]),
    ord("}"): lambda m: m.stack.append({}),
    ord("a"): lambda m: m.extend(m.pop(1)),
    ord("e"): lambda m: m.extend(m.to_mark()),
    ord("s"): lambda m: m.update(m.pop(2)),
    ord("u"): lambda m: m.update(m.to_mark()),
    ord("q"): lambda m: m.put(m.number(1)),
    ord("r"): lambda m: m.put(m.number(4)),
    0x94: lambda m: m.put(len(m.memo)),  # MEMOIZE
    ord("h"): lambda m: m.stack.append(m.memo[m.number(1)]),
    ord("j"): lambda m: m.stack.append(m.memo[m.number(4)]),
    ord("c"): lambda m: m.symbol(m.line(), m.line()),
    0x93: lambda m: m.symbol(*m.pop(2)),  # STACK_GLOBAL
    ord("R"): lambda m: m.make(m.pop(2), new=False),
    0x81: lambda m: m.make(m.pop(2), new=True),  # NEWOBJ
    ord("b"): Machine.build,
    ord("Q"): Machine.outside,
    ord("i"): Machine.instance,
}
