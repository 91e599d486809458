"""Small corpora for the tests of readers, and short ways to read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from preprocessing.config import CorpusConfig, DocumentsConfig
from preprocessing.corpora import list_units, read_unit
from preprocessing.documents import Document, LeftOut
from preprocessing.units import Unit, Units

EVERYTHING = 10**9
LENIENT = DocumentsConfig(damaged="skip", too_long="skip")


def listed(
    corpus: CorpusConfig,
    unit_bytes: int | None = EVERYTHING,
    leave_out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Units:
    return list_units({"": corpus}, unit_bytes, leave_out, say)


def read_one(corpus: CorpusConfig, unit: Unit, policy: DocumentsConfig | None = None) -> Iterator[Document | LeftOut]:
    return read_unit({"": corpus}, unit, policy or DocumentsConfig())


def read_all(
    corpus: CorpusConfig, unit_bytes: int | None = EVERYTHING, policy: DocumentsConfig | None = None
) -> list[Document]:
    """All documents; what is left out is no document."""
    found = (one for unit in listed(corpus, unit_bytes) for one in read_one(corpus, unit, policy))
    return [one for one in found if isinstance(one, Document)]


def left_out(
    corpus: CorpusConfig, policy: DocumentsConfig = LENIENT, unit_bytes: int | None = EVERYTHING
) -> list[LeftOut]:
    found = (one for unit in listed(corpus, unit_bytes) for one in read_one(corpus, unit, policy))
    return [one for one in found if isinstance(one, LeftOut)]


def contents(
    corpus: CorpusConfig, unit_bytes: int | None = EVERYTHING, policy: DocumentsConfig | None = None
) -> dict[str, bytes]:
    """Every document's content by its id."""
    return {document.id: document.content for document in read_all(corpus, unit_bytes, policy)}
