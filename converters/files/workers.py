"""A few threads over many tasks: what they get done comes back to one iterator, and so does how far they are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable
from queue import SimpleQueue
from typing import Generic, TypeVar

import numpy as np

from converters.errors import ConversionError
from converters.files.gather import BLOCK
from converters.files.mapped import Bits

Report = Callable[[int], None]
"""Told of bytes that are dealt with."""
NEWS = 1 << 24
"""Bytes after which a worker says how far it is."""
Task = TypeVar("Task")
Result = TypeVar("Result")


class Worker:
    """What a thread has to itself.

    Attributes:
        stage: `BLOCK` bytes of memory.
    """

    def __init__(self, stop: threading.Event, tell: Report) -> None:
        self.stage: Bits = np.empty(BLOCK, np.uint8)
        self._stop, self._tell, self._untold = stop, tell, 0

    def go_on(self, nbytes: int) -> None:
        """Say that so many bytes more are dealt with.

        Raises:
            Stopped: Nobody waits for the rest.
        """
        self._untold += nbytes
        if self._untold >= NEWS:
            self.tell()
        if self._stop.is_set():
            raise Stopped

    def tell(self) -> None:
        """Say how far it is."""
        self._tell(self._untold)
        self._untold = 0


class Stopped(Exception):
    """The run has ended before its tasks."""


class _Failed(Generic[Result]):
    def __init__(self, error: BaseException) -> None:
        self.error = error


class _Done(Generic[Result]):
    def __init__(self, result: Result) -> None:
        self.result = result


def in_threads(
    tasks: Iterable[Task], work: Callable[[Task, Worker], Result], *, workers: int, report: Report | None
) -> Generator[Result, None, None]:
    """The results of all tasks, in no particular order. However this ends, the threads have ended too.

    Args:
        tasks: Begun in this order.
        work: Does one of them; it should call `go_on` now and then.
        workers: Threads.
        report: Called from the thread that iterates.

    Raises:
        BaseException: The first error of a task.
        ConversionError: Less than one worker, who would do nothing.
    """
    if workers < 1:
        raise ConversionError(f"workers={workers}: expected 1 or more threads")
    left, lock, stop = iter(tasks), threading.Lock(), threading.Event()
    news: SimpleQueue[int | _Done[Result] | _Failed[Result] | None] = SimpleQueue()

    def take_on() -> None:
        worker = Worker(stop, news.put)
        try:
            while not stop.is_set():
                with lock:
                    task = next(left, None)
                if task is None:
                    break
                news.put(_Done(work(task, worker)))
                worker.tell()
        except Stopped:
            pass
        except BaseException as error:
            stop.set()
            news.put(_Failed(error))
        finally:
            news.put(None)

    threads = [threading.Thread(target=take_on, name=f"converter {number}") for number in range(workers)]
    for thread in threads:
        thread.start()
    running = workers
    try:
        while running:
            match news.get():
                case None:
                    running -= 1
                case _Failed(error=error):
                    raise error
                case _Done(result=result):
                    yield result
                case int(nbytes) if report is not None:
                    report(nbytes)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
