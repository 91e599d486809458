"""Units of work: independent pieces of a corpus, small to describe, each of which becomes one shard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import xxhash


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of one file: bytes first..stop of a text file, or row groups first..stop of a Parquet file.

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
    """What becomes one shard."""

    number: int
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Bytes of work."""
        return sum(part.size for part in self.parts)


def pack(parts: Iterable[Part], unit_bytes: int) -> Iterator[Unit]:
    """Lay parts into units, in order: a unit is full when it holds `unit_bytes` or more, and documents stay whole."""
    number = size = 0
    unit: list[Part] = []
    for _, group in groupby(parts, key=lambda part: part.document or (part.file, part.first)):
        members = list(group)
        unit += members
        size += sum(part.size for part in members)
        if size >= unit_bytes:
            yield Unit(number, tuple(unit))
            number, size, unit = number + 1, 0, []
    if unit:
        yield Unit(number, tuple(unit))


def fingerprint(units: Iterable[Unit]) -> dict[str, int | str]:
    """A cheap mark of what the corpus is: the number and bytes of its files, and a hash of their names and sizes."""
    digest = xxhash.xxh3_128()
    files: set[str] = set()
    size = 0
    for unit in units:
        for part in unit.parts:
            files.add(part.file)
            size += part.size
            line = f"{unit.number} {part.first} {part.stop} {part.size} {part.document} {part.file}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    return {"files": len(files), "bytes": size, "hash": digest.hexdigest()}
