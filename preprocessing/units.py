"""Units of work: independent pieces of a corpus, small to describe, each of which becomes one shard."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, overload

import xxhash

from preprocessing.compact import rows_of, squeeze


class Part(NamedTuple):
    """A stretch of one file: `first` to `stop` are bytes, or row groups, or record batches, as the reader counts.

    `file` is relative to the corpus folder, `size` the bytes of work in the part. Neighbouring parts with the same
    `document` belong to one document and stay in one unit; "" where the reader finds the documents inside the part.
    """

    file: str
    first: int
    stop: int
    size: int
    document: str = ""


@dataclass(frozen=True)
class Unit:
    """What becomes one shard: parts of one corpus."""

    number: int
    corpus: str
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Bytes of work."""
        return sum(part.size for part in self.parts)


def parts_together(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """The parts of one document after another; a part with documents inside it stands alone."""
    for _, members in groupby(parts, key=lambda part: part.document or (part.file, part.first)):
        yield list(members)


class Units(Sequence[Unit]):
    """All units, numbered from 0 through all corpora, in little memory: about ten bytes for each file.

    A unit is made anew whenever it is asked for. `sizes` has the bytes of work of each corpus by its name.
    """

    def __init__(self, corpora: Iterable[tuple[str, Iterable[Part]]], unit_bytes: int):
        """Lay the parts of each corpus into units, in order.

        A unit is full when it holds `unit_bytes` or more; documents stay whole, and no unit has parts of two corpora.
        """
        self.sizes: dict[str, int] = {}
        self._parts: list[bytes] = []
        self._corpora: list[str] = []
        self._unit_sizes = array("q")
        for corpus, parts in corpora:
            self.sizes[corpus] = 0
            unit: list[Part] = []
            size = 0
            for members in parts_together(parts):
                unit += members
                size += sum(part.size for part in members)
                if size >= unit_bytes:
                    self._add(corpus, unit, size)
                    unit, size = [], 0
            if unit:
                self._add(corpus, unit, size)

    def _add(self, corpus: str, unit: list[Part], size: int) -> None:
        self._parts.append(squeeze(unit))
        self._corpora.append(corpus)
        self._unit_sizes.append(size)
        self.sizes[corpus] += size

    @property
    def size(self) -> int:
        """Bytes of work in all units."""
        return sum(self.sizes.values())

    def __len__(self) -> int:
        return len(self._parts)

    @overload
    def __getitem__(self, number: int) -> Unit: ...
    @overload
    def __getitem__(self, number: slice) -> list[Unit]: ...
    def __getitem__(self, number: int | slice) -> Unit | list[Unit]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        return Unit(number, self._corpora[number], tuple(Part(*row) for row in rows_of(self._parts[number])))

    def size_of(self, number: int) -> int:
        """Bytes of work in unit `number`, without making it."""
        return self._unit_sizes[number]

    def fingerprint(self) -> dict[str, Any]:
        """A cheap mark of what the corpora are: the number and bytes of their files, a hash of names and sizes."""
        digest = xxhash.xxh3_128()
        files = 0
        before = None
        for number, (corpus, parts) in enumerate(zip(self._corpora, self._parts, strict=True)):
            named = f"{corpus}/" if corpus else ""
            for file, first, stop, size, document in rows_of(parts):
                # The parts of a file are neighbours: no need to remember ten million names.
                files += (corpus, file) != before
                before = (corpus, file)
                line = f"{number} {first} {stop} {size} {document} {named}{file}\n"
                digest.update(line.encode("utf-8", "surrogateescape"))
        return {"files": files, "bytes": self.size, "hash": digest.hexdigest()}
