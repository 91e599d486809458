"""A corpus of Parquet files: a column with the documents' texts, and perhaps one with their ids. A door of pyarrow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import BinaryIO

import pyarrow.parquet as pq

from brt_dist.data.errors import BadInput
from preprocessing.config import CorpusConfig, DocumentsConfig
from preprocessing.documents import Document, LeftOut, printable_name
from preprocessing.readers.text_column import DamagedTableError, check_columns, damage_named, documents, sound
from preprocessing.storage import Storage
from preprocessing.units import Part
from preprocessing.walk import File

# Rows decoded at a time, or fewer where so many are more than these bytes: only one batch of them is in memory.
_ROWS = 64
_BATCH = 1 << 23
# Bytes fetched at a time, so that a row group need not be in memory.
_BUFFER = 1 << 20
# In place of the row groups of a file that cannot be opened.
_UNKNOWN = 0


def parts(
    storage: Storage, files: Iterable[File], corpus: CorpusConfig, unit_bytes: int, say: Callable[[str], None]
) -> Iterator[Part]:
    """One part for each row group; its size is that of the text column before compression.

    A file that cannot be opened is one part too, so that it is counted when it is read.
    """
    for name, size in files:
        with storage.open(name) as file:
            try:
                table = _opened(file)
            except DamagedTableError:
                yield Part(name, 0, _UNKNOWN, size)
            else:
                yield from _groups(table, name, storage.shown(name), corpus)


def read(
    storage: Storage, parts: Sequence[Part], corpus: CorpusConfig, policy: DocumentsConfig
) -> Iterator[Document | LeftOut]:
    """The documents of a row group. Damage in it loses the rows from there to its end."""
    (part,) = parts
    shown = printable_name(part.file)
    with storage.open(part.file) as file:
        try:
            table = _opened(file)
        except DamagedTableError as error:
            yield LeftOut(shown, f"{shown} is not a Parquet file that can be read: {error}", "damaged", part.size)
        else:
            if part not in _groups(table, part.file, storage.shown(part.file), corpus):
                raise BadInput(f"{storage.shown(part.file)} changed while it was read")
            yield from _rows(table, part, corpus, policy)


def _groups(file: pq.ParquetFile, name: str, shown: str, corpus: CorpusConfig) -> Iterator[Part]:
    check_columns(file.schema_arrow, corpus, shown)
    columns = range(len(file.schema))
    column = next(number for number in columns if file.schema.column(number).path == corpus.text_key)
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        yield Part(name, number, number + 1, group.column(column).total_uncompressed_size)


def _rows(
    file: pq.ParquetFile, part: Part, corpus: CorpusConfig, policy: DocumentsConfig
) -> Iterator[Document | LeftOut]:
    shown = printable_name(part.file)
    columns = [key for key in (corpus.text_key, corpus.id_key) if key in file.schema_arrow.names]
    first = sum(file.metadata.row_group(number).num_rows for number in range(part.first))
    count = file.metadata.row_group(part.first).num_rows
    at_once = max(1, min(_ROWS, _BATCH * count // max(part.size, 1)))
    row = first
    batches = file.iter_batches(batch_size=at_once, row_groups=[part.first], columns=columns)
    try:
        for batch in sound(batches):
            yield from documents(
                batch, corpus, shown, row, policy.max_bytes, lambda row: part.size * (row + 1 - first) // count
            )
            row += batch.num_rows
    except DamagedTableError as error:
        reason = f"{shown} cannot be read near row {row}: {error}; lost to row {first + count - 1}"
        yield LeftOut(f"{shown}:{row}", reason, "damaged", part.size)


def _opened(file: BinaryIO) -> pq.ParquetFile:
    with damage_named():
        return pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True)
