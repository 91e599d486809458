"""The first reading of a corpus: every document is decoded once, and a sample taken to train the tokenizer on.

What is wrong with a corpus (bad bytes, one id twice, no documents) shows here, before the slow work begins.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import xxhash

from brt_dist.data.errors import BadInput
from brt_dist.data.splits import split_of
from brt_dist.data.token_shards import SPLITS
from preprocessing.config import CorpusConfig, DocumentsConfig, SplitsConfig
from preprocessing.corpora import read_unit
from preprocessing.documents import LeftOut, decode
from preprocessing.repeats import CONTENT, content_hash
from preprocessing.report import Progress
from preprocessing.sample import Sample
from preprocessing.units import Unit


@dataclass(frozen=True)
class Survey:
    """What one unit of work holds.

    id_hashes   xxh3_64 of every document's id, uint64; those of documents that are left out too
    contents    of type `repeats.CONTENT`, of those that are not left out
    """

    id_hashes: np.ndarray
    contents: np.ndarray


def survey_unit(
    unit: Unit,
    corpora: Mapping[str, CorpusConfig],
    documents: DocumentsConfig,
    splits: SplitsConfig,
    sample: Sample,
    tell: Callable[[Progress], None],
) -> Survey:
    """Read one unit, and offer its train documents to the sample."""
    hashes = array("Q")
    contents: list[tuple[int, int, int, int, bool]] = []
    reached = 0
    for number, document in enumerate(read_unit(corpora, unit, documents)):
        tell(Progress(unit.corpus, document.reached - reached, 1, 0))
        reached = document.reached
        if isinstance(document, LeftOut):
            continue
        hashes.append(id_hash(document.id))
        decoded = decode(document, documents.invalid_utf8)
        if decoded.text is None:
            continue
        content = document.content if decoded.why is None else decoded.text.encode()
        split = document.split or split_of(document.id, splits.validation, splits.test)
        digest = content_hash(content)
        contents.append((*digest, number, SPLITS.index(split), document.split is not None))
        if split == "train":
            sample.offer(unit.number, number, document.id, digest, decoded.text)
    tell(Progress(unit.corpus, unit.size - reached, 0, 0))
    return Survey(np.array(hashes, np.uint64), np.array(contents, CONTENT))


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
