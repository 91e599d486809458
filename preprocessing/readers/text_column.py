"""A column of a table that holds texts or ids, of any of the types that people use. A door of pyarrow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat

import pyarrow as pa

from brt_dist.data.errors import BadInput
from preprocessing.config import CorpusConfig
from preprocessing.documents import Document, LeftOut, printable_name, too_long

_AS_BYTES = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
}


class DamagedTableError(Exception):
    """A file of a table that cannot be read, as pyarrow says."""


@contextmanager
def damage_named() -> Iterator[None]:
    """What pyarrow cannot read is a DamagedTableError; what the storage cannot give stays an OSError."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DamagedTableError(str(error)) from None


def sound(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The batches up to the first that cannot be read, which is a DamagedTableError."""
    while True:
        with damage_named():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def check_columns(schema: pa.Schema, corpus: CorpusConfig, shown: str) -> None:
    """BadInput, naming the file `shown`, where the text's column is missing or holds no text, or two have one name."""
    if not _has_column(schema, corpus.text_key, "corpus.text_key", shown):
        found = ", ".join(map(repr, schema.names)) or "no columns"
        raise BadInput(f"{shown} has no column {corpus.text_key!r}; found {found} (see corpus.text_key)")
    _check_text(schema.field(corpus.text_key).type, corpus.text_key, shown)
    if _has_column(schema, corpus.id_key, "corpus.id_key", shown):
        kind = schema.field(corpus.id_key).type
        if not pa.types.is_integer(kind):
            _check_text(kind, corpus.id_key, shown)


def documents(
    batch: pa.RecordBatch, corpus: CorpusConfig, place: str, row: int, most: int, reached: Callable[[int], int]
) -> Iterator[Document | LeftOut]:
    """One for each row. Without an id it is `place` and the row, of which the first here is number `row`.

    A null text is empty. Texts are taken as bytes, whatever the column says of them, so that the policy for bad bytes
    sees them; those of more than `most` bytes are not taken at all. `reached` tells what is done behind a row.
    DamagedTableError if the batch is not what its type says.
    """
    texts = _bytes_of(batch.column(corpus.text_key))
    ids = _names(batch.column(corpus.id_key)) if corpus.id_key in batch.schema.names else repeat(None, batch.num_rows)
    for number, (text, name) in enumerate(zip(texts, ids, strict=True), row):
        source = f"{place}:{number}"
        if text is not None and text.size > most:
            yield too_long(name or source, source, text.size, most, reached(number))
        else:
            content = b"" if text is None else text.to_pybytes()
            yield Document(source if name is None else name, source, content, reached=reached(number))


def _has_column(schema: pa.Schema, key: str, setting: str, shown: str) -> bool:
    count = schema.names.count(key)
    if count > 1:
        raise BadInput(f"{shown} has {count} columns named {key!r} (see {setting})")
    return count == 1


def _check_text(kind: pa.DataType, key: str, shown: str) -> None:
    if not _holds_text(kind.value_type if pa.types.is_dictionary(kind) else kind):
        raise BadInput(f"{shown}: column {key!r} must hold text, found {kind}")


def _bytes_of(column: pa.Array) -> Iterator[pa.Buffer | None]:
    """The bytes of each value, where they lie: none is copied, and no dictionary is spread out."""
    values, indices = column, range(len(column))
    if pa.types.is_dictionary(column.type):
        values, indices = column.dictionary, column.indices.to_pylist()
    with damage_named():
        # As bytes: that a text is not UTF-8 is no damage to the table.
        values.view(_AS_BYTES.get(values.type, values.type)).validate(full=True)
    for index in indices:
        if index is not None and not 0 <= index < len(values):
            raise DamagedTableError(f"its dictionary has {len(values)} values, and none with the number {index}")
        value = None if index is None else values[index]
        yield value.as_buffer() if value is not None and value.is_valid else None


def _names(column: pa.Array) -> Iterator[str | None]:
    if pa.types.is_integer(column.type):
        return (None if value is None else str(value) for value in column.to_pylist())
    return (
        None if value is None else printable_name(value.to_pybytes().decode("utf-8", "surrogateescape"))
        for value in _bytes_of(column)
    )


def _holds_text(kind: pa.DataType) -> bool:
    """Text, bytes, or a column of nothing but nulls, which has no other type."""
    types = pa.types
    strings = (types.is_string, types.is_large_string, types.is_string_view)
    binaries = (types.is_binary, types.is_large_binary, types.is_binary_view)
    return any(test(kind) for test in (*strings, *binaries, types.is_null))
