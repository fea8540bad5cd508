"""Progress on stderr: bars on a terminal, one line at the end of long work elsewhere. Data never
comes here.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Work shorter than this leaves no trace in a log file.
LONG_SECONDS = 2.0

console = Console(stderr=True)

T = TypeVar("T")


class Bar(Protocol):
    def advance(self, amount: float = 1) -> None: ...

    def describe(self, text: str) -> None: ...


class _TerminalBar:
    def __init__(self, progress: Progress, description: str, total: float | None) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=total)

    def advance(self, amount: float = 1) -> None:
        self._progress.advance(self._task, amount)

    def describe(self, text: str) -> None:
        self._progress.update(self._task, description=text)


class _SilentBar:
    def advance(self, amount: float = 1) -> None:
        return

    def describe(self, text: str) -> None:
        return


@contextmanager
def bar(description: str, total: float | None = None) -> Iterator[Bar]:
    """A progress bar; ``total`` None for work of unknown length."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            yield _TerminalBar(progress, description, total)
        return
    started = time.monotonic()
    yield _SilentBar()
    seconds = time.monotonic() - started
    if seconds >= LONG_SECONDS:
        console.print(f"{description}: done in {seconds:.1f} s", highlight=False)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a bar."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with bar(description, total) as shown:
        for item in items:
            yield item
            shown.advance()
