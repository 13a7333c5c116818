"""Conversions in processes of their own, killed at their Nth call to the operating system.

Reads a JSON object a line, `{"source", "target", "kill", "exchange", ...options}`; answers each with how the process
ended, the calls that it made once it began to write, and the last of them.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import threading
from types import BuiltinFunctionType, FrameType
from typing import Any

from converters.convert import convert_folder
from converters.files import place
from converters.files.partial import Partial
from converters.files.stream import stream  # noqa: F401  so that no run has to import it

SYSTEM = {"posix", "fcntl", "_io"}


def run(say: int, *, kill: int | None, exchange: bool, **options: Any) -> None:
    """Convert, counting the calls of all threads; die at one of them."""
    count = itertools.count(1)
    last = [0, ""]

    def called(frame: FrameType, event: str, what: BuiltinFunctionType) -> None:
        if event == "c_call" and getattr(what, "__module__", None) in SYSTEM:
            last[:] = next(count), what.__name__
            if last[0] == kill:
                os.write(say, json.dumps(last).encode())
                os.kill(os.getpid(), signal.SIGKILL)

    lock = Partial.lock

    def begin(self: Partial) -> bool:
        threading.setprofile(called)
        sys.setprofile(called)
        return lock(self)

    Partial.lock = begin  # type: ignore[method-assign]
    if not exchange:
        place.exchange = lambda one, other: False
    convert_folder(**options)
    sys.setprofile(None)
    os.write(say, json.dumps(last).encode())


def main() -> None:
    for line in sys.stdin:
        listen, say = os.pipe()
        child = os.fork()
        if not child:
            try:
                run(say, **json.loads(line))
                os._exit(0)
            except BaseException as error:
                os.write(say, json.dumps([0, f"{type(error).__name__}: {error}"]).encode())
                os._exit(1)
        os.close(say)
        _, status = os.waitpid(child, 0)
        with os.fdopen(listen) as answer:
            print(json.dumps([os.waitstatus_to_exitcode(status), *json.load(answer)]), flush=True)


if __name__ == "__main__":
    main()
