"""How far long work on shards has come: a bar on a terminal, a line now and then elsewhere. On standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[int], None]

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(title: str, total: int, unit: str, console: Console | None = None) -> Iterator[Advance]:
    """Gives a function to call with every amount that is done, of `total` bytes, tokens or whatever `unit` says."""
    console = console or Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(title, total=max(total, 1))
            yield lambda amount: bar.advance(task, amount)
    else:
        yield _Lines(title, total, unit, console)


class _Lines:
    """A line whenever the last one is old enough: short work says nothing."""

    def __init__(self, title: str, total: int, unit: str, console: Console):
        self._title, self._total, self._unit, self._console = title, total, unit, console
        self._done = 0
        self._began = self._said = time.monotonic()

    def __call__(self, amount: int) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._said < _SECONDS_BETWEEN_LINES:
            return
        self._said = now
        share, speed = self._done / max(self._total, 1), self._done / (now - self._began)
        figures = f"{self._done:,} of {self._total:,} {self._unit} ({share:.0%}), {speed:,.0f} {self._unit}/s"
        self._console.print(f"{self._title}: {figures}", markup=False, highlight=False, soft_wrap=True)
