"""What `prepare` shows: a progress bar on a terminal, plain lines elsewhere, and a table at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

# Seconds between two plain lines of progress.
_PAUSE = 5.0
# Documents named one by one on the console; the manifest names all.
_NAMED = 20


class Reporter:
    """Tells the user how the work goes."""

    def __init__(self, console: Console | None = None):
        self._console = console or Console()

    def say(self, line: str) -> None:
        """One plain line."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def steps(self, title: str, total: int, done: int = 0) -> Iterator[Step]:
        """A stretch of `total` megabytes of work of which `done` are finished."""
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("MB"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self._console) as bar:
                yield _BarStep(bar, title, total, done)
        else:
            step = _LineStep(self, title, total, done)
            yield step
            step.say()

    def summary(self, manifest: dict[str, Any]) -> None:
        """Documents, tokens and bytes by split, and by name what was left out or changed."""
        table = Table("split", "documents", "tokens", "bytes", "bytes per token")
        for column in table.columns[1:]:
            column.justify = "right"
        for name, counts in [*manifest["splits"].items(), ("all", manifest)]:
            ratio = f"{counts['bytes'] / counts['tokens']:.3f}" if counts["tokens"] else "-"
            table.add_row(name, *(f"{counts[key]:,}" for key in ("documents", "tokens", "bytes")), ratio)
        self._console.print(table)
        self._name_documents("left out", manifest["skipped_documents"])
        self._name_documents("changed (U+FFFD for bad bytes)", manifest["replaced_documents"])
        if not manifest["tokenizer"]["lossless"]:
            count = manifest["tokenizer"]["inexact_documents"]
            self.say(f"the tokenizer is not lossless: {count} documents do not come back from their tokens unchanged")

    def _name_documents(self, title: str, named: list[dict[str, str]]) -> None:
        if not named:
            return
        self.say(f"{len(named)} {'document' if len(named) == 1 else 'documents'} {title}:")
        # Empty ones last: they are many, and no one misses them.
        for entry in sorted(named, key=lambda entry: entry["why"] == "empty")[:_NAMED]:
            place = entry["source"] if entry["id"] in entry["source"] else f"{entry['id']}, {entry['source']}"
            self.say(f"  {entry['why']}: {place}")
        if len(named) > _NAMED:
            self.say(f"  ... and {len(named) - _NAMED} more, all named in the manifest")


class Step:
    """A stretch of work in progress; `done` counts its finished bytes."""

    def __init__(self, done: int):
        self.done = done

    def advance(self, size: int) -> None:
        """`size` more bytes are done."""
        self.done += size
        self._show()

    def _show(self) -> None:
        raise NotImplementedError


class _BarStep(Step):
    def __init__(self, bar: Progress, title: str, total: int, done: int):
        super().__init__(done)
        self._bar = bar
        self._task = bar.add_task(title, total=max(1, round(total / 1e6)), completed=round(done / 1e6))

    def _show(self) -> None:
        self._bar.update(self._task, completed=round(self.done / 1e6))


class _LineStep(Step):
    def __init__(self, reporter: Reporter, title: str, total: int, done: int):
        super().__init__(done)
        self._reporter, self._title, self._total, self._first = reporter, title, total, done
        self._began = self._said = time.monotonic()

    def _show(self) -> None:
        if time.monotonic() - self._said >= _PAUSE:
            self.say()

    def say(self) -> None:
        """One line of where the work stands."""
        self._said = time.monotonic()
        seconds = self._said - self._began
        rate = (self.done - self._first) / 1e6 / max(seconds, 1e-3)
        figures = f"{self.done / 1e6:.1f} of {self._total / 1e6:.1f} MB, {seconds:.0f} s, {rate:.1f} MB/s"
        self._reporter.say(f"{self._title}: {figures}")
