"""From corpora to units of work, and from one unit to its documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from brt_dist.data.errors import BadInput
from preprocessing.config import CorpusConfig, DocumentsConfig
from preprocessing.documents import Document, LeftOut
from preprocessing.storage import Storage
from preprocessing.units import Part, Unit, Units, parts_together
from preprocessing.walk import File, FileList, find_files, storage_of

# Where nobody says how large a unit of work is: enough units for many ranks, and no shard larger than 64 MB.
_UNITS = 32
_SMALLEST, _LARGEST = 2_000_000, 64_000_000


class Reader(Protocol):
    """What a module in preprocessing/readers must have."""

    def parts(
        self,
        storage: Storage,
        files: Iterable[File],
        corpus: CorpusConfig,
        unit_bytes: int,
        say: Callable[[str], None],
    ) -> Iterator[Part]:
        """The parts of the files, in order, none much larger than `unit_bytes` where a file can be cut."""

    def read(
        self, storage: Storage, parts: Sequence[Part], corpus: CorpusConfig, policy: DocumentsConfig
    ) -> Iterator[Document | LeftOut]:
        """The documents of parts that belong together, and what cannot be taken.

        `reached` counts from the first of these parts, and no document is longer than `policy.max_bytes`. What is
        damaged or too long is handed out as LeftOut even where `policy` forbids it: who asked for the unit ends the
        run then.
        """


def list_units(
    corpora: Mapping[str, CorpusConfig],
    unit_bytes: int | None,
    leave_out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Units:
    """All units of the corpora, in an order that depends on names alone; `leave_out` is a folder that is not read.

    Without `unit_bytes` the size of a unit follows from that of all corpora together. `say` is told, in lines of text,
    what else was left out. BadInput if a path does not exist, or no file matches its pattern.
    """
    _opened.cache_clear()
    found = {name: find_files(corpus, leave_out, say) for name, corpus in corpora.items()}
    if unit_bytes is None:
        unit_bytes = default_unit_bytes(sum(files.size for _, files in found.values()))
    listed = ((name, _parts(corpora[name], *found.pop(name), unit_bytes, say)) for name in corpora)
    return Units(listed, unit_bytes)


def default_unit_bytes(size: int) -> int:
    """How large a unit is, in bytes of work, for corpora of `size` bytes together."""
    return min(_LARGEST, max(_SMALLEST, size // _UNITS))


def read_unit(
    corpora: Mapping[str, CorpusConfig], unit: Unit, documents: DocumentsConfig
) -> Iterator[Document | LeftOut]:
    """The documents of a unit, in order, and in their places what is left out.

    The ids of a corpus that has a name begin with it and "/". BadInput names what cannot be read and the place in it.
    """
    corpus = corpora[unit.corpus]
    reader = _reader(corpus)
    before = 0
    try:
        storage = _opened(corpus)
        for parts in parts_together(unit.parts):
            for found in reader.read(storage, parts, corpus, documents):
                if isinstance(found, LeftOut):
                    _check_allowed(found, documents, corpus, storage)
                yield _in_unit(found, unit.corpus, before)
            before += sum(part.size for part in parts)
    except OSError as error:
        raise BadInput(f"the corpus cannot be read: {error}") from None


@lru_cache(maxsize=16)
def _opened(corpus: CorpusConfig) -> Storage:
    """Kept for the next units: the list of what is in an archive takes long to read."""
    return storage_of(corpus)


def _check_allowed(found: LeftOut, documents: DocumentsConfig, corpus: CorpusConfig, storage: Storage) -> None:
    policies = {"damaged": documents.damaged, "too_long": documents.too_long}
    if policies.get(found.why) == "fatal":
        place = f"{corpus.url}: {found.source}" if corpus.url else storage.shown(found.source)
        raise BadInput(f"{place} (documents.{found.why}: skip leaves it out)")


def _in_unit(found: Document | LeftOut, corpus: str, before: int) -> Document | LeftOut:
    if not corpus and not before:
        return found
    return replace(found, id=f"{corpus}/{found.id}" if corpus else found.id, reached=before + found.reached)


def _parts(
    corpus: CorpusConfig, storage: Storage, files: FileList, unit_bytes: int, say: Callable[[str], None]
) -> Iterator[Part]:
    try:
        yield from _reader(corpus).parts(storage, files, corpus, unit_bytes, say)
    except OSError as error:
        raise BadInput(f"the corpus cannot be read: {error}") from None


def _reader(corpus: CorpusConfig) -> Reader:
    """The module of a reader. Those that need pyarrow are its doors: a corpus of other files never opens one."""
    from preprocessing.readers import files, jsonl

    match corpus.reader:
        case "files":
            return files
        case "jsonl":
            return jsonl
        case "pg19":
            from preprocessing.readers import pg19

            return pg19
        case "arxiv":
            from preprocessing.readers import arxiv

            return arxiv
        case "parquet":
            from preprocessing.readers import parquet

            return parquet
        case "arrow":
            from preprocessing.readers import arrow

            return arrow
        case "huggingface":
            from preprocessing.readers import huggingface

            return huggingface
