"""A corpus of Parquet files: a column with the documents' texts, and perhaps one with their ids. A door of pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from brt_dist.data.errors import BadInput
from preprocessing.documents import Document, printable_name
from preprocessing.units import Part, Unit

# Rows decoded at a time: documents may be long, and only one batch of them is in memory.
_ROWS = 64


def parts(folder: Path, names: Sequence[str], text_key: str) -> Iterator[Part]:
    """One part for each row group; its size is that of the text column before compression."""
    for name in names:
        with _open(folder / name) as file:
            column = _text_column(file, folder / name, text_key)
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                yield Part(name, number, number + 1, group.column(column).total_uncompressed_size)


def read(folder: Path, unit: Unit, text_key: str, id_key: str) -> Iterator[Document]:
    """The documents of a unit. Without the column `id_key` a document's id is its file and row; a null text is empty.

    Texts are taken as bytes, whatever the column says of them, so that the policy for bad bytes sees them.
    """
    for part in unit.parts:
        path, shown = folder / part.file, printable_name(part.file)
        with _open(path) as file:
            columns = [text_key, *([id_key] if _has_column(file, path, id_key, "corpus.id_key") else [])]
            row = sum(file.metadata.row_group(number).num_rows for number in range(part.first))
            groups = list(range(part.first, part.stop))
            try:
                for batch in file.iter_batches(batch_size=_ROWS, row_groups=groups, columns=columns):
                    texts = _as_bytes(batch.column(text_key), path, text_key)
                    names = _as_names(batch.column(id_key), path, id_key) if len(columns) > 1 else [None] * len(texts)
                    for text, name in zip(texts, names, strict=True):
                        place = f"{shown}:{row}"
                        yield Document(place if name is None else name, place, text or b"")
                        row += 1
            except (pa.ArrowException, OSError) as error:
                raise BadInput(f"{path} cannot be read near row {row}: {error}") from None


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{path} is not a Parquet file that can be read: {error}") from None


def _text_column(file: pq.ParquetFile, path: Path, text_key: str) -> int:
    """The number of the text column among the file's stored columns; BadInput if it is not one column of text."""
    if not _has_column(file, path, text_key, "corpus.text_key"):
        found = ", ".join(map(repr, file.schema_arrow.names)) or "no columns"
        raise BadInput(f"{path} has no column {text_key!r}; found {found} (see corpus.text_key)")
    _check_text(file.schema_arrow.field(text_key).type, path, text_key)
    return next(number for number in range(len(file.schema)) if file.schema.column(number).path == text_key)


def _has_column(file: pq.ParquetFile, path: Path, key: str, setting: str) -> bool:
    count = file.schema_arrow.names.count(key)
    if count > 1:
        raise BadInput(f"{path} has {count} columns named {key!r} (see {setting})")
    return count == 1


def _check_text(kind: pa.DataType, path: Path, key: str) -> None:
    if not _holds_text(kind.value_type if pa.types.is_dictionary(kind) else kind):
        raise BadInput(f"{path}: column {key!r} must hold text, found {kind}")


def _as_bytes(column: pa.Array, path: Path, key: str) -> list[bytes | None]:
    _check_text(column.type, path, key)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary()).to_pylist()


def _as_names(column: pa.Array, path: Path, key: str) -> list[str | None]:
    if pa.types.is_integer(column.type):
        return [None if value is None else str(value) for value in column.to_pylist()]
    return [
        None if value is None else printable_name(value.decode("utf-8", "surrogateescape"))
        for value in _as_bytes(column, path, key)
    ]


def _holds_text(kind: pa.DataType) -> bool:
    """Text, bytes, or a column of nothing but nulls, which has no other type."""
    types = pa.types
    strings = (types.is_string, types.is_large_string, types.is_string_view)
    binaries = (types.is_binary, types.is_large_binary, types.is_binary_view)
    return any(test(kind) for test in (*strings, *binaries, types.is_null))
