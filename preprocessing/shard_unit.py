"""One unit of work becomes one shard."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from brt_dist.data.splits import split_of
from brt_dist.data.token_shards import SPLITS, ShardEntry, ShardRow, write_shard
from brt_dist.data.tokenizer import Tokenizer, line_chunks, portions
from preprocessing.config import CorpusConfig, DocumentsConfig, SplitsConfig
from preprocessing.corpora import read_unit
from preprocessing.documents import Document, LeftOut, decode
from preprocessing.repeats import Repeats, content_hash
from preprocessing.report import Progress
from preprocessing.round_trip import find_difference, is_checked
from preprocessing.units import Unit

# Characters encoded in one call for each thread: few, so that rank 0 looks for messages of the others often.
_TOGETHER = 1 << 16


@dataclass(frozen=True)
class ShardReport:
    """What was made of a unit: its shard, what each split got, and by name what was left out or changed.

    splits     documents, tokens and bytes of each
    skipped, replaced, moved, inexact
               id, source and reason of each document that was left out, had bad bytes replaced, went into the split of
               a document with the same text, or does not come back from its tokens
    checked    documents whose tokens were decoded again; all_checked: that was all of them, from beginning to end
    """

    shard: ShardEntry
    splits: dict[str, dict[str, int]]
    skipped: list[dict[str, str]]
    replaced: list[dict[str, str]]
    moved: list[dict[str, str]]
    inexact: list[dict[str, str]]
    checked: int
    all_checked: bool


@dataclass(frozen=True)
class Recipe:
    """How documents become rows of a shard; the same for all units."""

    corpora: Mapping[str, CorpusConfig]
    documents: DocumentsConfig
    splits: SplitsConfig
    tokenizer: Tokenizer
    repeats: Repeats
    check_all: bool = False
    threads: int = 1


@dataclass
class _Tally:
    splits: dict[str, dict[str, int]] = field(
        default_factory=lambda: {name: {"documents": 0, "tokens": 0, "bytes": 0} for name in SPLITS}
    )
    skipped: list[dict[str, str]] = field(default_factory=list)
    replaced: list[dict[str, str]] = field(default_factory=list)
    moved: list[dict[str, str]] = field(default_factory=list)
    inexact: list[dict[str, str]] = field(default_factory=list)
    checked: int = 0


@dataclass(frozen=True)
class _Text:
    """A document that will be a row."""

    document: Document
    split: str
    text: str
    bytes: int


def shard_name(unit: Unit) -> str:
    return f"shard-{unit.number:06d}.arrow"


def write_unit(unit: Unit, recipe: Recipe, folder: Path, tell: Callable[[Progress], None]) -> ShardReport:
    """Read the unit's documents, encode them and write the shard into `folder`; `tell` hears how far it is.

    Depends on nothing but its arguments and the corpus files, and gives the same bytes whenever and wherever it runs.
    """
    tally = _Tally()
    rows = _rows(_texts(unit, recipe, tally), unit, recipe, tally, tell)
    shard = write_shard(folder / shard_name(unit), rows, recipe.tokenizer.vocab_size, unit.corpus)
    lists = tally.splits, tally.skipped, tally.replaced, tally.moved, tally.inexact
    return ShardReport(shard, *lists, tally.checked, recipe.check_all)


def _texts(unit: Unit, recipe: Recipe, tally: _Tally) -> Iterator[_Text]:
    """The documents that become rows; the others are tallied."""
    for number, found in enumerate(read_unit(recipe.corpora, unit, recipe.documents)):
        if isinstance(found, LeftOut):
            tally.skipped.append(_named(found, found.source, found.why))
            continue
        decoded = decode(found, recipe.documents.invalid_utf8)
        if decoded.text is None:
            tally.skipped.append(_named(found, decoded.place, str(decoded.why)))
            continue
        content = found.content
        if decoded.why is not None:
            tally.replaced.append(_named(found, decoded.place, decoded.why))
            content = decoded.text.encode()
        split = own_split = found.split or split_of(found.id, recipe.splits.validation, recipe.splits.test)
        if repeat := recipe.repeats.find(content_hash(content)):
            split, kept = repeat
            if recipe.documents.duplicates == "drop" and kept != (unit.number, number):
                tally.skipped.append(_named(found, found.source, "duplicate"))
                continue
            if split != own_split:
                tally.moved.append(_named(found, found.source, f"duplicate of a {split} document"))
        yield _Text(found, split, decoded.text, len(content))
        # Let go of before the next one is read: both may be very long.
        del found, decoded, content


def _named(found: Document | LeftOut, place: str, why: str) -> dict[str, str]:
    return {"id": found.id, "source": place, "why": why}


def _rows(
    texts: Iterable[_Text], unit: Unit, recipe: Recipe, tally: _Tally, tell: Callable[[Progress], None]
) -> Iterator[ShardRow]:
    reached = 0
    for together in portions(texts, lambda each: len(each.text), _TOGETHER * recipe.threads):
        encoded = recipe.tokenizer.encode_all([each.text for each in together], recipe.threads)
        last, count, size = together[-1].document.reached, len(together), sum(map(len, encoded))
        # Every document is let go of before the next ones are read: one may be very long.
        together.reverse()
        encoded.reverse()
        while together:
            yield _row(together.pop(), encoded.pop(), recipe, tally)
        tell(Progress(unit.corpus, last - reached, count, size))
        reached = last
    # What was no text (documents left out, whatever stands behind the last) is done too.
    tell(Progress(unit.corpus, unit.size - reached, 0, 0))


def _row(each: _Text, tokens: np.ndarray, recipe: Recipe, tally: _Tally) -> ShardRow:
    _check(each, tokens, recipe, tally)
    counts = tally.splits[each.split]
    for name, count in (("documents", 1), ("tokens", len(tokens)), ("bytes", each.bytes)):
        counts[name] += count
    document = each.document
    return ShardRow(document.id, document.source, each.split, each.bytes, count_words(each.text), tokens)


def _check(each: _Text, tokens: np.ndarray, recipe: Recipe, tally: _Tally) -> None:
    """The round trip of a document, if it is this one's turn."""
    if not is_checked(each.document.id, recipe.check_all):
        return
    tally.checked += 1
    place = find_difference(recipe.tokenizer, each.text, tokens, whole=recipe.check_all)
    if place is not None:
        why = f"differs from its tokens at character {place}"
        tally.inexact.append(_named(each.document, each.document.source, why))


def count_words(text: str) -> int:
    """len(text.split()), without a list of all words of a long document, or of a long line."""
    return sum(
        len(chunk.split()) if len(chunk) < 1 << 20 else sum(1 for _ in re.finditer(r"\S+", chunk))
        for chunk in line_chunks(text, 1 << 16)
    )
