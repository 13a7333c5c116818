"""Pickles read as data: no unpickler runs, nothing is imported, no class is made, no function of the bytes is called.

The opcodes are walked here, over a stack of plain values. A name in the bytes stays a name: the reader says which names
it knows, what it makes of some of them by functions of its own, and every other name is an error that tells it. What
it costs grows with the bytes and not with what they say: integers are short, nothing is copied twice, and a
dict's keys are of kinds that hash at once. The result is made of None, bool, int, float, str, bytes, tuple, list, dict,
`Symbol`, `Named`, and what the reader's functions return. It can be nested to any depth and share its parts: walk
it by the shape that is expected, never by recursion, and never print it whole.

Source: python/cpython 3.12, Lib/pickletools.py (what each opcode does to the stack), Lib/pickle.py (`_Pickler`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from converters.errors import CheckpointError
from converters.pickle_machine import Machine, key_of
from converters.pickle_names import Named, Names, Symbol, shown

__all__ = ["Named", "Names", "Outside", "Symbol", "parse", "shown", "write"]

MAX_BYTES = 1 << 28
"""Of a pickle that is read; what the largest jobs write into `.metadata` is less."""


def _ordered(pairs: list[tuple[Any, Any]] | None = None) -> dict[Any, Any]:
    out: dict[Any, Any] = {}
    for key, value in pairs or ():
        out[key_of(key)] = value
    return out


def _bytes(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 hold bytes."""
    if encoding != "latin1":
        raise ValueError("bytes in another encoding than latin1")
    return text.encode("latin1")


CONTAINERS = Names(calls={"collections.OrderedDict": _ordered, "_codecs.encode": _bytes})


def parse(
    content: bytes | memoryview, *, names: Names, where: str, persistent: Callable[[Any], Any] | None = None
) -> Any:
    """What the bytes stand for.

    Args:
        content: A pickle of protocol 2 to 5. What follows its end is not looked at.
        names: Those that it may use, besides the plain containers.
        where: What it is, for messages: `FILE: data.pkl`.
        persistent: Makes a value of the identity of an object that lies outside the pickle.

    Raises:
        CheckpointError: A name that is not known, an opcode that is not needed, or bytes that are no pickle.
    """
    if len(content) > MAX_BYTES:
        raise CheckpointError(f"{where} has a pickle of {len(content):,} bytes; no more than {MAX_BYTES:,} are read")
    machine = Machine(bytes(content), CONTAINERS | names, where, persistent)
    try:
        return machine.run()
    except CheckpointError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise CheckpointError(
            f"{where} is no pickle that can be read, or a damaged one (byte {machine.at:,} of {len(content):,}: "
            f"{str(error)[:120] or type(error).__name__})"
        ) from error


@dataclass(frozen=True, slots=True)
class Outside:
    """Written as an object that lies outside of the pickle, by its identity."""

    identity: tuple[Any, ...]


def write(value: Any) -> bytes:
    """A pickle of protocol 2 of plain values, `Symbol`, `Named` and `Outside`: the names in it are not looked up.

    As Python's own pickler writes it, each container being a new one.

    Raises:
        TypeError: A value of another kind.
    """
    writer = _Writer()
    writer.write(value)
    return b"\x80\x02" + b"".join(writer.out) + b"."


class _Writer:
    def __init__(self) -> None:
        self.out: list[bytes] = []
        self.memo: dict[Any, int] = {}
        self.puts = 0

    def write(self, value: Any) -> None:
        out = self.out.append
        kind = type(value)
        if kind in (bool, type(None)):
            out({None: b"N", True: b"\x88", False: b"\x89"}[value])
        elif kind is int:
            out(_integer(value))
        elif kind is float:
            out(b"G" + struct.pack(">d", value))
        elif kind is str or kind is Symbol or kind is Named:
            known = id(value) if kind is Named else value  # the caller holds it: its id stays its own
            if known in self.memo:
                index = self.memo[known]
                out(b"h" + bytes([index]) if index < 256 else b"j" + struct.pack("<I", index))
                return
            self._object(value)
        elif kind is tuple:
            self._tuple(value)
        elif kind is list:
            out(b"]")
            self.put()
            self._items(value, b"a", b"e")
        elif kind is dict:
            out(b"}")
            self.put()
            self._items([each for item in value.items() for each in item], b"s", b"u")
        elif kind is Outside:
            self.write(value.identity)
            out(b"Q")
        else:
            raise TypeError(f"expected plain values to pickle, found a {kind.__name__}")

    def put(self, known: Any = None) -> None:
        if known is not None:
            self.memo[known] = self.puts
        self.out.append(b"q" + bytes([self.puts]) if self.puts < 256 else b"r" + struct.pack("<I", self.puts))
        self.puts += 1

    def _object(self, value: str | Symbol | Named) -> None:
        if isinstance(value, str):
            text = value.encode("utf-8", "surrogatepass")
            self.out.append(b"X" + struct.pack("<I", len(text)) + text)
            self.put(value)
        elif isinstance(value, Symbol):
            self.out.append(f"c{value.module}\n{value.name}\n".encode())
            self.put(value)
        else:
            self.write(value.symbol)
            self.write(value.arguments)
            self.out.append(b"\x81" if value.new else b"R")
            self.put(id(value))
            if value.state is not None:
                self.write(value.state)
                self.out.append(b"b")

    def _tuple(self, value: tuple[Any, ...]) -> None:
        if not value:
            self.out.append(b")")
            return
        if len(value) > 3:
            self.out.append(b"(")
        for each in value:
            self.write(each)
        self.out.append(b"t" if len(value) > 3 else (b"\x85", b"\x86", b"\x87")[len(value) - 1])
        self.put()

    def _items(self, items: list[Any], one: bytes, many: bytes) -> None:
        if not items:
            return
        single = len(items) == (1 if one == b"a" else 2)
        if not single:
            self.out.append(b"(")
        for each in items:
            self.write(each)
        self.out.append(one if single else many)


def _integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if 0 <= value < 65536:
        return b"M" + struct.pack("<H", value)
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    content = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content
