"""What `prepare` shows: progress by corpus, bars on a terminal and plain lines elsewhere, and tables at the end."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Column, Table

from preprocessing.lengths import FAR, share_beyond

# Seconds between two plain lines of progress.
_PAUSE = 5.0
# Columns that the tables may take where nobody has said how many there are, as in a file.
_WIDTH = 160
# Documents named one by one on the console; the manifest names all.
_NAMED = 20


class Progress(NamedTuple):
    """What was done since the last word of it: bytes of one corpus as they lie there, documents and tokens."""

    corpus: str
    bytes: int
    documents: int
    tokens: int


class Reporter:
    """Tells the user how the work goes."""

    def __init__(self, console: Console | None = None):
        self._console = console or Console()
        if not self._console.is_terminal:
            self._console.width = max(self._console.width, _WIDTH)

    def say(self, line: str) -> None:
        """One plain line."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def steps(self, title: str, sizes: Mapping[str, int]) -> Iterator[Steps]:
        """A stretch of work over corpora of so many bytes."""
        if self._console.is_terminal:
            # The figures last, and all else as wide as it is: where a terminal is narrow their end is cut.
            names = max((len(f"{title} {corpus}".strip()) for corpus in sizes), default=0)
            columns = (
                TextColumn("{task.description}", table_column=Column(min_width=min(names, 30), no_wrap=True)),
                BarColumn(bar_width=10, table_column=Column(min_width=10)),
                TimeRemainingColumn(table_column=Column(min_width=7, no_wrap=True)),
                TextColumn("{task.fields[figures]}"),
            )
            with Bars(*columns, console=self._console) as bars:
                yield _BarSteps(bars, title, sizes)
        else:
            steps = _LineSteps(self, title, sizes)
            yield steps
            steps.say()

    def summary(self, manifest: dict[str, Any], lengths: Mapping[str, np.ndarray]) -> None:
        """Tables of what the shards hold, and by name what was left out or changed.

        lengths: tokens of every document of each corpus.
        """
        self._console.print(_split_table(manifest))
        self._console.print(_length_table(lengths))
        left_out = ", ".join(f"{count:,} {why}" for why, count in manifest["skipped"].items() if count)
        if left_out:
            self.say(f"left out: {left_out}")
        self._name_documents("left out", manifest["skipped_documents"])
        self._name_documents("changed (U+FFFD for bad bytes)", manifest["replaced_documents"])
        if moved := manifest["moved"]["duplicate"]:
            self.say(f"{moved:,} documents went into the split of another one with the same text")
        if not manifest["tokenizer"]["lossless"]:
            count = manifest["tokenizer"]["inexact_documents"]
            self.say(f"the tokenizer is not lossless: {count} documents do not come back from their tokens unchanged")

    def _name_documents(self, title: str, named: list[dict[str, str]] | dict[str, Any]) -> None:
        if isinstance(named, dict):
            self.say(f"{named['entries']:,} documents {title}, all named in {named['file']}")
            return
        if not named:
            return
        self.say(f"{len(named)} {'document' if len(named) == 1 else 'documents'} {title}:")
        # Empty ones last: they are many, and no one misses them.
        for entry in sorted(named, key=lambda entry: entry["why"] == "empty")[:_NAMED]:
            place = entry["source"] if entry["id"] in entry["source"] else f"{entry['id']}, {entry['source']}"
            self.say(f"  {entry['why']}: {place}")
        if len(named) > _NAMED:
            self.say(f"  ... and {len(named) - _NAMED} more, all named in the manifest")


def _table(name: str, *figures: str) -> Table:
    table = Table(name, *figures)
    for column in table.columns[1:]:
        # A figure too wide for a terminal goes on in the next line: one that is cut says nothing.
        column.justify, column.overflow = "right", "fold"
    return table


def _split_table(manifest: dict[str, Any]) -> Table:
    table = _table("split", "documents", "tokens", "bytes", "bytes per token")
    for name, counts in [*manifest["splits"].items(), ("all", manifest)]:
        ratio = f"{counts['bytes'] / counts['tokens']:.3f}" if counts["tokens"] else "-"
        table.add_row(name, *(f"{counts[key]:,}" for key in ("documents", "tokens", "bytes")), ratio)
    return table


def _length_table(lengths: Mapping[str, np.ndarray]) -> Table:
    """Tokens of a document, and how much of each corpus lies far behind a document's beginning."""
    names = ("10 %", "median", "90 %", "99 %", "longest", *(f"> {far // 1024}k" for far in FAR))
    table = _table("corpus", *names)
    table.title = "tokens in a document; share of all tokens behind so many of their document"
    for corpus, length_D in lengths.items():
        if len(length_D):
            # Not interpolated: these are lengths of documents that there are.
            points = np.quantile(length_D, (0.1, 0.5, 0.9, 0.99, 1.0), method="inverted_cdf")
            shares = [f"{share_beyond(length_D, far):.1%}" for far in FAR]
            table.add_row(corpus or "all", *(f"{int(point):,}" for point in points), *shares)
    return table


class Steps(ABC):
    """A stretch of work in progress."""

    def __init__(self, sizes: Mapping[str, int]):
        self._sizes = sizes
        self._done: dict[str, Counter[str]] = {corpus: Counter() for corpus in sizes}

    def advance(self, news: Progress) -> None:
        """So much more is done."""
        self._done[news.corpus].update(bytes=news.bytes, documents=news.documents, tokens=news.tokens)
        self._show(news.corpus)

    def figures(self, corpora: Mapping[str, int]) -> str:
        """Bytes, documents and tokens done of some corpora."""
        done = sum((self._done[corpus] for corpus in corpora), Counter())
        text = f"{done['bytes'] / 1e6:,.1f} of {sum(corpora.values()) / 1e6:,.1f} MB, {done['documents']:,} documents"
        return f"{text}, {done['tokens']:,} tokens" if done["tokens"] else text

    @abstractmethod
    def _show(self, corpus: str) -> None:
        """Show that there is news of a corpus."""


class _BarSteps(Steps):
    def __init__(self, bars: Bars, title: str, sizes: Mapping[str, int]):
        super().__init__(sizes)
        self._bars = bars
        self._tasks: dict[str, TaskID] = {
            corpus: bars.add_task(f"{title} {corpus}".strip(), total=max(1, size), figures="")
            for corpus, size in sizes.items()
        }

    def _show(self, corpus: str) -> None:
        figures = self.figures({corpus: self._sizes[corpus]})
        self._bars.update(self._tasks[corpus], completed=self._done[corpus]["bytes"], figures=figures)


class _LineSteps(Steps):
    def __init__(self, reporter: Reporter, title: str, sizes: Mapping[str, int]):
        super().__init__(sizes)
        self._reporter, self._title = reporter, title
        self._began = self._said = time.monotonic()

    def _show(self, corpus: str) -> None:
        if time.monotonic() - self._said >= _PAUSE:
            self.say(corpus)

    def say(self, corpus: str | None = None) -> None:
        """One line of where the work stands; corpus: which of them is worked on now."""
        self._said = time.monotonic()
        seconds = self._said - self._began
        done = sum(counts["bytes"] for counts in self._done.values())
        line = (
            f"{self._title}: {self.figures(self._sizes)}, {seconds:.0f} s, {done / 1e6 / max(seconds, 1e-3):.1f} MB/s"
        )
        left = sum(self._sizes.values()) - done
        if corpus is not None and done:
            line += f", {left * seconds / done:.0f} s left"
            if len(self._sizes) > 1:
                line += f" ({corpus}: {self.figures({corpus: self._sizes[corpus]})})"
        self._reporter.say(line)
