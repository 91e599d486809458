"""A seeded sample of a corpus, to train a tokenizer on: every block of text has the same chance, whoever reads it.

A block's place in line is a hash of its document's id and its number. The sample is the front of that line, as long as
it fits, so it depends on neither the order of reading nor the number of ranks, and the size of the corpus need not be
known.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np
import xxhash

from brt_dist.data.tokenizer import line_chunks
from preprocessing.ranks import Ranks

# Characters in one block: few, so that a small sample still comes from many documents.
BLOCK = 4096


@dataclass(frozen=True, order=True)
class Block:
    """A stretch of a document; place: -1 - its place in line, so that the smallest is the first to go."""

    place: int
    unit: int
    number: int  # of the document in its unit
    offset: int  # of the block in its document
    content: tuple[int, int] = field(compare=False)  # the hash of its document's text
    text: str = field(compare=False)

    @property
    def size(self) -> int:
        """UTF-8 bytes."""
        return len(self.text.encode())


class Sample:
    """The front of the line among the blocks that were offered, of at most `room` bytes."""

    def __init__(self, room: int, seed: int):
        self._room, self._seed = room, seed
        self._held: list[Block] = []
        self._size = 0

    def offer(self, unit: int, number: int, document_id: str, content: tuple[int, int], text: str) -> None:
        """All blocks of one document; content: the hash of its text."""
        for offset, chunk in enumerate(line_chunks(text, BLOCK)):
            # A line may be as long as a document, and one block must never be the whole sample.
            for start in range(0, len(chunk), BLOCK):
                name = f"{offset} {start}\n{document_id}".encode()
                place = -1 - xxhash.xxh3_64_intdigest(name, seed=self._seed)
                if self._size >= self._room and (not self._held or place < self._held[0].place):
                    continue
                block = Block(place, unit, number, offset, content, chunk[start : start + BLOCK])
                heapq.heappush(self._held, block)
                self._size += block.size
        # One more block than fits stays, to show where the line was cut.
        while self._held and self._size - self._held[0].size >= self._room:
            self._size -= heapq.heappop(self._held).size

    def agreed(self, ranks: Ranks) -> list[Block]:
        """In rank 0 the front of the line over all ranks, in the order of the corpus. Called by all of them."""
        sizes = np.array([(-1 - block.place, block.size) for block in self._held], np.uint64).reshape(-1, 2)
        lines = ranks.gather(sizes)
        cut = ranks.lead(lambda: _cut(np.concatenate(lines), self._room))
        blocks: Iterable[list[Block]] = ranks.gather([block for block in self._held if -1 - block.place < cut])
        return sorted((block for each in blocks for block in each), key=attrgetter("unit", "number", "offset", "place"))


def _cut(line: np.ndarray, room: int) -> int:
    """The first place in line that does not fit any more; line: places and sizes, uint64, [blocks, 2]."""
    line = line[np.argsort(line[:, 0], kind="stable")]
    full = np.flatnonzero(np.cumsum(line[:, 1]) > room)
    return int(line[full[0], 0]) if len(full) else 1 << 64
