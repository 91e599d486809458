"""How far scoring has come: a bar on a terminal, a line now and then elsewhere. On standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def scoring_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function to call with the tokens scored so far and their total."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(f"scoring {label}", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        yield _Lines(label, console)


class _Lines:
    """A line at the end, and before it whenever the last one is old enough."""

    def __init__(self, label: str, console: Console):
        self.label, self.console = label, console
        self.began = self.last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self.last < SECONDS_BETWEEN_LINES:
            return
        self.last = now
        speed = done / max(now - self.began, 1e-9)
        line = f"scoring {self.label}: {done:,} of {total:,} tokens ({done / total:.0%}), {speed:,.0f} tokens/s"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
