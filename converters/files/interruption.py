"""Being told to stop: Ctrl-C, or SIGTERM from a scheduler or from torchrun."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Interrupted(KeyboardInterrupt):
    """A conversion was told to stop; what it has written is kept for a resumed run."""


@contextmanager
def told_to_stop() -> Iterator[Callable[[], None]]:
    """Let SIGTERM, which schedulers and torchrun send, end the work as Ctrl-C does: once.

    Yields:
        To be called when the work is ending anyway: a SIGTERM must not disturb that.
    """

    def no_more() -> None:
        if signal.getsignal(signal.SIGTERM) == stop:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def stop(number: int, frame: object) -> None:
        no_more()
        raise KeyboardInterrupt(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield lambda: None
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield no_more
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
