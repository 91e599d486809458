"""PG-19's layout: folders train, validation and test of books, one a file, and metadata.csv with their titles."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

from brt_dist.data.errors import BadInput
from preprocessing.config import CorpusConfig, DocumentsConfig
from preprocessing.documents import Document, LeftOut, printable_name, too_long
from preprocessing.readers.files import whole_file
from preprocessing.storage import DamagedFileError, Storage
from preprocessing.units import Part
from preprocessing.walk import File

_SPLITS = ("train", "validation", "test")
_METADATA = "metadata.csv"


def parts(
    storage: Storage, files: Iterable[File], corpus: CorpusConfig, unit_bytes: int, say: Callable[[str], None]
) -> Iterator[Part]:
    """One part for each book. BadInput for a file that lies in no folder of a split."""
    for name, size in files:
        if name.split("/")[0] not in _SPLITS:
            raise BadInput(f"{storage.shown(name)} lies in none of the folders {', '.join(_SPLITS)}")
        yield Part(name, 0, size, size, name)


def read(
    storage: Storage, parts: Sequence[Part], corpus: CorpusConfig, policy: DocumentsConfig
) -> Iterator[Document | LeftOut]:
    """One book: its id is the file's name without the suffix, its source has the title if the metadata do."""
    (part,) = parts
    shown = printable_name(part.file)
    book = shown.rpartition("/")[2].removesuffix(".txt")
    if part.size > policy.max_bytes:
        yield too_long(book, shown, part.size, policy.max_bytes, part.size)
        return
    try:
        content = whole_file(storage, part)
    except DamagedFileError as error:
        yield LeftOut(book, f"{shown}: {error}", "damaged", part.size)
        return
    title = _titles(storage).get(book)
    source = f"{shown} ({title})" if title else shown
    split = shown.split("/")[0]
    yield Document(book, source, content, ((0, shown),), split, part.size)


# A storage is used for many units of work, and the metadata are read once for it.
@lru_cache(maxsize=1)
def _titles(storage: Storage) -> dict[str, str]:
    """Title and year of each book; none where there is no metadata.csv."""
    try:
        with storage.open(_METADATA) as file:
            text = io.TextIOWrapper(file, "utf-8", "replace", newline="")
            rows = csv.reader(text)
            return {row[0]: ", ".join(filter(None, row[1:3])) for row in rows if len(row) > 1}
    except FileNotFoundError:
        return {}
    except csv.Error as error:
        raise BadInput(f"{storage.shown(_METADATA)} cannot be read: {error}") from None
