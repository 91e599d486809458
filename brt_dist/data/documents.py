"""Documents of mapped shards by number: columns as arrays, tokens as views, and the way back from an id."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from brt_dist.data.errors import BadInput

if TYPE_CHECKING:
    from brt_dist.data.token_shards import ShardBatch

# Ids that are compared letter by letter with one that is not there.
_COMPARED_IDS = 2000


class Documents:
    """Some of the documents of a shard folder, in the order of the shards."""

    def __init__(self, batches: list[ShardBatch], batch_of: np.ndarray, row_of: np.ndarray):
        """Document i is row `row_of[i]` of `batches[batch_of[i]]`; batch_of must not descend."""
        self._batches = batches
        self._batch_of = batch_of
        self._row_of = row_of

    def __len__(self) -> int:
        return len(self._row_of)

    @cached_property
    def ids(self) -> list[str]:
        return self._strings("id")

    @cached_property
    def sources(self) -> list[str]:
        return self._strings("source")

    @cached_property
    def splits(self) -> list[str]:
        return self._strings("split")

    @cached_property
    def corpora(self) -> tuple[str, ...]:
        """The names of the corpora, in the order of the shards; "" where the only one has none."""
        return tuple(dict.fromkeys(batch.corpus for batch in self._batches))

    @cached_property
    def corpus_of(self) -> np.ndarray:
        """For each document the number of its corpus in `corpora`; int64."""
        numbers = np.array([self.corpora.index(batch.corpus) for batch in self._batches], np.int64)
        return numbers[self._batch_of]

    @cached_property
    def bytes(self) -> np.ndarray:
        """UTF-8 bytes of each document's text, int64; 0 where only the tokens are known."""
        return self._gather(batch.numbers("bytes") for batch in self._batches)

    @cached_property
    def words(self) -> np.ndarray:
        """Words of each document, int64; 0 where only the tokens are known."""
        return self._gather(batch.numbers("words") for batch in self._batches)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, without EOS, int64."""
        return self._gather(np.diff(batch.offsets) for batch in self._batches)

    def tokens(self, index: int, first: int = 0, count: int | None = None) -> np.ndarray:
        """Tokens first .. first + count (to the end by default) of document `index`: a read-only view of the file."""
        batch = self._batches[self._batch_of[index]]
        row = self._row_of[index]
        start, stop = int(batch.offsets[row]), int(batch.offsets[row + 1])
        if first < 0 or (count is not None and count < 0):
            raise ValueError(f"tokens of document {index}: first {first} and count {count} must not be negative")
        if count is not None:
            stop = min(stop, start + first + count)
        return batch.values[start + first : max(stop, start + first)]

    def only(self, document_id: str) -> Documents:
        """The document of that id alone; BadInput, with the nearest ids of the whole folder, where there is none."""
        try:
            document_id.encode()
        except UnicodeEncodeError:
            raise BadInput(f"there is no document {document_id!r}: that is not Unicode text, and every id is") from None
        for number, batch in enumerate(self._batches):
            for row in batch.rows_where("id", document_id):
                found = np.flatnonzero((self._batch_of == number) & (self._row_of == row))
                if len(found):
                    return Documents(self._batches, self._batch_of[found[:1]], self._row_of[found[:1]])
        nearest = ", ".join(self._nearest_ids(document_id)) or "there are none at all"
        raise BadInput(f"there is no document {document_id!r} among {len(self)}; the nearest ids: {nearest}")

    def _nearest_ids(self, document_id: str, count: int = 3) -> list[str]:
        """Ids that contain `document_id`, or else the most similar of those that share its longest beginning."""

        def first_ids(most: int, **conditions: str) -> list[str]:
            found: list[str] = []
            for batch in self._batches:
                found += batch.first_ids(most - len(found), **conditions)
                if len(found) == most:
                    break
            return found

        if document_id and (containing := first_ids(count, part=document_id)):
            return containing
        shared, too_long = 0, len(document_id) + 1
        while too_long - shared > 1:
            middle = (shared + too_long) // 2
            shared, too_long = (middle, too_long) if first_ids(1, beginning=document_id[:middle]) else (shared, middle)
        candidates = first_ids(_COMPARED_IDS, beginning=document_id[:shared])
        return difflib.get_close_matches(document_id, candidates, count, cutoff=0)

    def _gather(self, columns: Iterable[np.ndarray]) -> np.ndarray:
        """One value of each document, out of a whole column of each batch; int64."""
        chosen = [column[rows] for column, rows in zip(columns, self._rows_by_batch(), strict=True)]
        return np.concatenate([np.zeros(0, np.int64), *chosen])

    def _strings(self, name: str) -> list[str]:
        chosen = zip(self._batches, self._rows_by_batch(), strict=True)
        return [text for batch, rows in chosen for text in batch.strings(name, rows)]

    def _rows_by_batch(self) -> list[np.ndarray]:
        """Views of the rows that the documents of each batch have there."""
        bounds = np.searchsorted(self._batch_of, np.arange(len(self._batches) + 1))
        return [self._row_of[first:stop] for first, stop in pairwise(bounds)]
