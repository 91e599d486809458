"""One unit of work becomes one shard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from brt_dist.data.token_shards import SPLITS, ShardEntry, ShardRow, write_shard
from brt_dist.data.tokenizer import Tokenizer, line_chunks
from preprocessing.config import CorpusConfig, DocumentsConfig, SplitsConfig
from preprocessing.corpora import read_unit
from preprocessing.documents import DecodedText, Document, decode
from preprocessing.splits import split_of
from preprocessing.units import Unit

# Characters encoded in one call: enough to keep all threads busy.
_TOGETHER = 1 << 22
# Characters of each document that are decoded again and compared.
_CHECKED = 1 << 16


@dataclass(frozen=True)
class ShardReport:
    """What was made of a unit: its shard, what each split got, and by name what was left out or changed.

    `splits` has documents, tokens and bytes of each split; `skipped`, `replaced` and `inexact` (documents that do not
    come back from their tokens) have an id, a source and a reason for each document.
    """

    shard: ShardEntry
    splits: dict[str, dict[str, int]]
    skipped: list[dict[str, str]]
    replaced: list[dict[str, str]]
    inexact: list[dict[str, str]]


@dataclass
class _Tally:
    splits: dict[str, dict[str, int]] = field(
        default_factory=lambda: {name: {"documents": 0, "tokens": 0, "bytes": 0} for name in SPLITS}
    )
    skipped: list[dict[str, str]] = field(default_factory=list)
    replaced: list[dict[str, str]] = field(default_factory=list)
    inexact: list[dict[str, str]] = field(default_factory=list)


def shard_name(unit: Unit) -> str:
    return f"shard-{unit.number:06d}.arrow"


def write_unit(
    unit: Unit,
    corpus: CorpusConfig,
    documents: DocumentsConfig,
    splits: SplitsConfig,
    tokenizer: Tokenizer,
    folder: Path,
    threads: int,
    advance: Callable[[int], None] = lambda size: None,
) -> ShardReport:
    """Read the unit's documents, encode them and write the shard into `folder`; `advance` is told of bytes done.

    Depends on nothing but its arguments and the corpus files, and gives the same bytes whenever and wherever it runs.
    """
    tally = _Tally()
    texts = _texts(read_unit(corpus, unit), documents, tally)
    rows = _rows(texts, splits, tokenizer, threads, tally, advance)
    shard = write_shard(folder / shard_name(unit), rows, tokenizer.vocab_size)
    return ShardReport(shard, tally.splits, tally.skipped, tally.replaced, tally.inexact)


def _texts(found: Iterable[Document], policy: DocumentsConfig, tally: _Tally) -> Iterator[tuple[Document, str]]:
    for document in found:
        decoded = decode(document, policy.invalid_utf8)
        if decoded.text is None:
            tally.skipped.append(_named(document, decoded))
            continue
        if decoded.why is not None:
            tally.replaced.append(_named(document, decoded))
        yield document, decoded.text


def _named(document: Document, decoded: DecodedText) -> dict[str, str]:
    return {"id": document.id, "source": decoded.place, "why": str(decoded.why)}


def _rows(
    texts: Iterable[tuple[Document, str]],
    splits: SplitsConfig,
    tokenizer: Tokenizer,
    threads: int,
    tally: _Tally,
    advance: Callable[[int], None],
) -> Iterator[ShardRow]:
    for together in _batches(texts):
        encoded = tokenizer.encode_all([text for _, text in together], threads)
        for (document, text), tokens in zip(together, encoded, strict=True):
            if (place := _first_difference(tokenizer, text, tokens)) is not None:
                why = f"differs from its tokens at character {place}"
                tally.inexact.append({"id": document.id, "source": document.source, "why": why})
            row = ShardRow(
                id=document.id,
                source=document.source,
                split=split_of(document.id, splits),
                bytes=len(text.encode()),
                words=len(text.split()),
                tokens=tokens,
            )
            counts = tally.splits[row.split]
            counts["documents"] += 1
            counts["tokens"] += len(tokens)
            counts["bytes"] += row.bytes
            yield row
        advance(sum(len(document.content) for document, _ in together))


def _batches(texts: Iterable[tuple[Document, str]]) -> Iterator[list[tuple[Document, str]]]:
    batch: list[tuple[Document, str]] = []
    size = 0
    for document, text in texts:
        batch.append((document, text))
        size += len(text)
        if size >= _TOGETHER:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _first_difference(tokenizer: Tokenizer, text: str, tokens: np.ndarray) -> int | None:
    """Where the beginning of `text` differs from what its tokens decode to, or None if it comes back unchanged."""
    start = next(line_chunks(text, _CHECKED), "")
    # Mostly a token is at least a character; it is always at least a byte, and no character has more than four.
    for count in (len(start), 4 * len(start)):
        decoded = tokenizer.decode(tokens[:count])
        if decoded.startswith(start) and (count < len(tokens) or decoded == text):
            return None
    return next((at for at, (a, b) in enumerate(zip(decoded, start, strict=False)) if a != b), len(start))
