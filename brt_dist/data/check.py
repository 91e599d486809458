"""`brt data check`: every file of a shard folder against its manifest, and the first byte that is wrong."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from brt_dist.data.counts import Counts
from brt_dist.data.errors import BadInput
from brt_dist.data.manifest import MANIFEST, file_advice, listed_files, read_manifest
from brt_dist.data.progress import Advance, progress
from brt_dist.data.token_shards import PIECE_BYTES, SPLITS, ShardBatch, map_shard

# Tokens or ids that are looked at in one go.
_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Checked:
    """What a sound shard folder holds: files and their bytes on disk, documents, tokens; and how long it took."""

    folder: Path
    files: int
    documents: int
    tokens: int
    bytes: int
    seconds: float

    def __str__(self) -> str:
        counts = f"{self.files:,} files, {self.documents:,} documents, {self.tokens:,} tokens, {self.bytes:,} bytes"
        return f"{self.folder} is whole: {counts}, {self.seconds:.1f} s"


def check_shards(folder: Path) -> Checked:
    """Read every byte of a shard folder and compare it with what its manifest says.

    First the files, by their hashes; then what is in the shards: ids of tokens inside the vocabulary and none of them
    EOS, documents and tokens of every shard, split and of all together, no document's id twice. Memory stays small
    however large a shard is, but for 8 bytes a document. Raises BadInput for the first thing that is wrong, with the
    range of bytes (first and last) where that is known.
    """
    began = time.monotonic()
    manifest = read_manifest(folder)
    listed = listed_files(manifest)
    sizes = [_size(folder, entry, manifest) for entry in listed]
    with progress(f"checking {folder}", sum(sizes), "bytes") as advance:
        for entry, size in zip(listed, sizes, strict=True):
            if wrong := _difference(folder / entry["file"], entry, size, advance):
                raise BadInput(f"{folder / entry['file']} {wrong} ({file_advice(folder, manifest)})")
        counted = _Content(folder, manifest)
        for entry in manifest["shards"]:
            counted.add_shard(entry)
    counted.compare()
    total = counted.total
    files = len(listed) + 1
    read = sum(sizes) + (folder / MANIFEST).stat().st_size
    return Checked(folder, files, total.documents, total.tokens, read, time.monotonic() - began)


def _size(folder: Path, entry: dict[str, Any], manifest: dict[str, Any]) -> int:
    path = folder / entry["file"]
    try:
        return path.stat().st_size
    except OSError:
        advice = file_advice(folder, manifest)
        raise BadInput(f"{path} is missing, and {folder / MANIFEST} lists it ({advice})") from None


def _difference(path: Path, entry: dict[str, Any], found: int, advance: Advance) -> str | None:
    """How a file of `found` bytes differs from the one that was written, or None where it is the same."""
    size = int(entry.get("size", found))
    digest, pieces = _hashes(path, size, advance)
    for number, (written, read) in enumerate(zip(entry.get("pieces") or (), pieces, strict=False)):
        first = number * PIECE_BYTES
        last = min(first + PIECE_BYTES, size) - 1
        # The stretch in which a file was cut short is no longer the one that was hashed.
        if written != read and last < found:
            return f"was altered: bytes {first} to {last} are not those that were written"
    if found < size:
        return f"is truncated: bytes {found} to {size - 1} are missing"
    if found > size:
        return f"is too long: bytes {size} to {found - 1} do not belong to it"
    if digest != entry["hash"]:
        return f"was altered: somewhere in bytes 0 to {size - 1} (expected hash {entry['hash']}, found {digest})"
    return None


def _hashes(path: Path, size: int, advance: Advance) -> tuple[str, list[str]]:
    """xxh3_128 of the first `size` bytes of a file, and xxh3_64 of each of their stretches."""
    digest, pieces, first = xxhash.xxh3_128(), [], 0
    try:
        with path.open("rb") as file:
            while piece := file.read(min(PIECE_BYTES, size - first)):
                digest.update(piece)
                pieces.append(xxhash.xxh3_64_hexdigest(piece))
                first += len(piece)
                advance(len(piece))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise BadInput(f"{path} cannot be read from byte {first} on: {reason}") from None
    return digest.hexdigest(), pieces


@dataclass
class _Content:
    """What the shards hold, added up over all of them and compared with the manifest at the end."""

    folder: Path
    manifest: dict[str, Any]
    total: Counts = field(default_factory=Counts)
    splits: dict[str, Counts] = field(default_factory=lambda: {name: Counts() for name in SPLITS})
    corpora: dict[str, Counts] = field(default_factory=dict)
    ids: list[np.ndarray] = field(default_factory=list)

    def add_shard(self, entry: dict[str, Any]) -> None:
        """Looks at one shard; BadInput where something in it is wrong or does not agree with its entry."""
        path = self.folder / entry["file"]
        in_shard = Counts()
        for batch in map_shard(path):
            if wrong := batch.damage():
                raise BadInput(f"{path} does not hold together: {wrong}")
            _check_tokens(path, batch, self.manifest["vocab_size"], self.manifest["tokenizer"]["eos"])
            self._count(path, batch, in_shard)
            self.ids += [_id_hashes(ids) for ids in _ids(batch)]
        self._agree(f"'{entry['file']}'", entry, in_shard, ("documents", "tokens"))
        of_corpus = self.corpora.setdefault(entry.get("corpus", ""), Counts())
        of_corpus.add(in_shard.documents, in_shard.tokens, in_shard.bytes)

    def _count(self, path: Path, batch: ShardBatch, in_shard: Counts) -> None:
        lengths, sizes = np.diff(batch.offsets), batch.numbers("bytes")
        everything = len(batch), int(lengths.sum()), int(sizes.sum())
        in_shard.add(*everything)
        self.total.add(*everything)
        known = 0
        for name, counts in self.splits.items():
            rows = batch.rows_where("split", name)
            counts.add(len(rows), int(lengths[rows].sum()), int(sizes[rows].sum()))
            known += len(rows)
        if known != len(batch):
            raise BadInput(f"{path} has {len(batch) - known} documents in none of the splits {', '.join(SPLITS)}")

    def compare(self) -> None:
        """BadInput where the manifest counts otherwise, or where two documents have one id."""
        counts = ("documents", "tokens", "bytes")
        self._agree("all shards", self.manifest, self.total, counts)
        for name, split in self.splits.items():
            self._agree(f"split {name}", self.manifest.get("splits", {}).get(name, {}), split, counts)
        for name, written in self.manifest.get("corpora", {}).items():
            self._agree(f"corpus {name!r}" if name else "the corpus", written, self.corpora.get(name, Counts()), counts)
        sources = self.manifest.get("sources", {"entries": self.total.documents})
        entries = sources.get("entries") if isinstance(sources, dict) else len(sources)
        if entries != self.total.documents:
            path = self.folder / MANIFEST
            raise BadInput(f"{path} lists {entries} sources, its shards hold {self.total.documents} documents")
        self._check_ids_differ()

    def _agree(self, what: str, written: Any, counted: Counts, names: Iterable[str]) -> None:
        if not isinstance(written, dict):
            raise BadInput(f"{self.folder / MANIFEST} says {written!r} of {what}, which are no counts")
        for name in names:
            if name in written and written[name] != getattr(counted, name):
                found = f"counts {written[name]} {name} for {what}, found {getattr(counted, name)}"
                raise BadInput(f"{self.folder / MANIFEST} {found}")

    def _check_ids_differ(self) -> None:
        hashes = np.sort(np.concatenate([np.zeros(0, np.uint64), *self.ids]))
        twice = hashes[1:][hashes[1:] == hashes[:-1]]
        if not len(twice):
            return
        seen: dict[str, str] = {}
        for entry in self.manifest["shards"]:
            for batch in map_shard(self.folder / entry["file"]):
                for ids in _ids(batch):
                    for row in np.flatnonzero(np.isin(_id_hashes(ids), twice)).tolist():
                        if (name := ids[row]) in seen:
                            raise BadInput(f"two documents have the id {name!r}: in {seen[name]} and {entry['file']}")
                        seen[name] = entry["file"]


def _ids(batch: ShardBatch) -> Iterator[list[str]]:
    step = _AT_ONCE >> 4
    return (batch.strings("id", slice(first, first + step)) for first in range(0, len(batch), step))


def _id_hashes(ids: list[str]) -> np.ndarray:
    return np.fromiter((xxhash.xxh3_64_intdigest(name.encode()) for name in ids), np.uint64, len(ids))


def _check_tokens(path: Path, batch: ShardBatch, vocab_size: int, eos: int) -> None:
    begin, end = int(batch.offsets[0]), int(batch.offsets[-1])
    for first in range(begin, end, _AT_ONCE):
        values = batch.values[first : min(first + _AT_ONCE, end)]
        if values.max() < vocab_size and not (values == eos).any():
            continue
        wrong = first + int(np.flatnonzero((values >= vocab_size) | (values == eos))[0])
        token, width = int(batch.values[wrong]), batch.values.itemsize
        document = int(np.searchsorted(batch.offsets, wrong, side="right")) - 1
        name = batch.strings("id", slice(document, document + 1))[0]
        byte = batch.first_byte + wrong * width
        problem = "the end of a document" if token == eos else f"outside a vocabulary of {vocab_size}"
        place = f"token {wrong - int(batch.offsets[document])} of document {name!r}"
        raise BadInput(f"{path}: bytes {byte} to {byte + width - 1} ({place}) hold the id {token}, {problem}")
