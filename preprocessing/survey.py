"""The first reading of a corpus: every document is decoded once, and a sample taken to train the tokenizer on.

What is wrong with a corpus (bad bytes, one id twice, no documents) shows here, before the slow work begins.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import xxhash

from brt_dist.data.errors import BadInput
from brt_dist.data.tokenizer import line_chunks
from preprocessing.config import CorpusConfig, DocumentsConfig, SplitsConfig
from preprocessing.corpora import read_unit
from preprocessing.documents import decode
from preprocessing.splits import split_of
from preprocessing.units import Unit

# Characters in one block of the sample: short, so that a small sample still comes from many documents.
_BLOCK = 4096


@dataclass(frozen=True)
class Survey:
    """What one unit of work holds. `id_hashes` has the xxh3_64 of every document's id, uint64, skipped ones too."""

    id_hashes: np.ndarray
    kept: int
    train: int
    sample: list[str]


def survey_unit(
    unit: Unit, corpus: CorpusConfig, documents: DocumentsConfig, splits: SplitsConfig, fraction: float, seed: int
) -> Survey:
    """Read one unit; its sample has each block of its train documents with probability `fraction`, chosen by a hash."""
    hashes = array("Q")
    kept = train = 0
    sample: list[str] = []
    for document in read_unit(corpus, unit):
        hashes.append(id_hash(document.id))
        text = decode(document, documents.invalid_utf8).text
        if text is None:
            continue
        kept += 1
        if split_of(document.id, splits) != "train":
            continue
        train += 1
        for number, block in enumerate(line_chunks(text, _BLOCK)):
            if xxhash.xxh3_64_intdigest(f"{number}\n{document.id}".encode(), seed=seed) < fraction * 2**64:
                sample.append(block)
    return Survey(np.array(hashes, np.uint64), kept, train, sample)


def id_hash(document_id: str) -> int:
    """xxh3_64 of an id."""
    return xxhash.xxh3_64_intdigest(document_id.encode())


def check_ids_differ(id_hashes: np.ndarray, read_again: Callable[[], Iterable[tuple[str, str]]]) -> None:
    """BadInput if two documents have one id, with the id and both sources.

    `id_hashes` are those of all documents; `read_again` gives (id, source) of each, and is called only if two hashes
    are equal.
    """
    ordered = np.sort(id_hashes)
    repeated = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not repeated:
        return
    seen: dict[str, str] = {}
    for name, source in read_again():
        if id_hash(name) in repeated:
            if name in seen:
                raise BadInput(f"two documents have the id {name!r}: {seen[name]} and {source}")
            seen[name] = source
