"""A bar over the bytes of a long run, drawn on standard error once it is worth its line."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

SOON = 1.0  # seconds of work after which a bar is worth its line


def speaks() -> bool:
    """Whether this process prints: of several that work on one folder, the first."""
    return os.environ.get("RANK", "0") == "0"


class Progress:
    """A bar over bytes; a context manager.

    Args:
        title: What is going on.
        total: Bytes of the whole run.
        done: Of them, those of an earlier run.
        quiet: Draw nothing.
    """

    def __init__(self, title: str, total: int, *, done: int = 0, quiet: bool = False) -> None:
        self._title, self._total, self._done = title, total, done
        self._quiet = quiet or not speaks()
        self._began = time.monotonic()
        self._bar: Bar | None = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """Tell it of so many bytes more."""
        self._done += count
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif time.monotonic() - self._began > SOON:
            self._bar = self._drawn()

    def _drawn(self) -> Bar:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn(self._title),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = bar.add_task("", total=self._total, completed=self._done)
        bar.start()
        return bar
