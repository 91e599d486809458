"""`brt data import` and `brt data export`: shard folders from and to Megatron-core's indexed datasets."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from brt_dist.data.atomic_file import whole_file, write_json
from brt_dist.data.counts import Counts
from brt_dist.data.errors import BadInput
from brt_dist.data.manifest import FORMAT, MANIFEST, manifest_hash
from brt_dist.data.megatron_dataset import MegatronDataset, write_dataset
from brt_dist.data.progress import Advance, progress
from brt_dist.data.splits import split_of
from brt_dist.data.token_shards import SPLITS, ShardEntry, ShardRow, TokenShards, write_shard, writing
from brt_dist.data.tokenizer import HARD_TEXTS, Tokenizer

TOKENIZER = "tokenizer.model"
# A shard is full with so many tokens; documents are never divided.
_SHARD_TOKENS = 1 << 25
# Shards keep tokens as uint16 or uint32.
_LARGEST_VOCABULARY = 1 << 32
# What an import that was killed leaves behind.
_WRITTEN = r"shard-\d{5,}\.arrow|tokenizer\.model"
_LEFTOVER = re.compile(rf"{_WRITTEN}|\.({_WRITTEN}|manifest\.json)\.\d+\.part")


@dataclass(frozen=True)
class Vocabulary:
    """What the ids of a dataset mean: at least how many there are, and which one ends a document."""

    size: int
    eos: int
    tokenizer: Path | None = None

    @classmethod
    def of(cls, tokenizer: Path | None, size: int | None, eos: int | None) -> Vocabulary:
        """From a sentencepiece model, or from two numbers where there is none; BadInput unless it is one of the two."""
        if tokenizer is not None:
            if size is not None or eos is not None:
                raise BadInput(f"the tokenizer {tokenizer} says what --vocab-size and --eos are; leave them out")
            model = Tokenizer.open(tokenizer)
            return cls(model.vocab_size, model.eos, tokenizer)
        if size is None or eos is None:
            raise BadInput(
                "an import needs --tokenizer, or --vocab-size and --eos where there is no sentencepiece model"
            )
        if size > _LARGEST_VOCABULARY:
            raise BadInput(f"--vocab-size {size} is more than the {_LARGEST_VOCABULARY} ids that shards can hold")
        if not 0 <= eos < size:
            raise BadInput(f"--eos {eos} is outside a vocabulary of {size}")
        return cls(size, eos)


@dataclass(frozen=True)
class Moved:
    """What went from one format to the other."""

    place: Path
    documents: int
    tokens: int
    empty: int
    seconds: float

    def __str__(self) -> str:
        left_out = f" ({self.empty:,} empty documents left out)" if self.empty else ""
        speed = f"{self.seconds:.1f} s, {self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s"
        return f"{self.place}: {self.documents:,} documents, {self.tokens:,} tokens{left_out}, {speed}"


def export_shards(folder: Path, prefix: Path, split: str, end_with_eos: bool = True) -> Moved:
    """Write the documents of a split (or "all") to PREFIX.bin and PREFIX.idx, each as one sequence and one document.

    EOS stands behind every document unless `end_with_eos` is False; ids and sources are not part of that format.
    BadInput for an empty split or files that are there already; then nothing is written.
    """
    began = time.monotonic()
    shards = TokenShards.open(folder)
    documents = shards.split(split)
    if not len(documents):
        raise BadInput(f"split {split} of the shards in {folder} has no documents")
    end = np.array([shards.eos] * end_with_eos, np.int64)
    total = int(documents.lengths.sum()) + len(documents) * len(end)

    def sequences(advance: Advance) -> Iterator[np.ndarray]:
        for index in range(len(documents)):
            tokens = documents.tokens(index)
            # EOS fits the type of the tokens, for it is inside the vocabulary.
            yield np.concatenate([tokens, end.astype(tokens.dtype)])
            advance(len(tokens) + len(end))

    with progress(f"exporting {split} of {folder}", total, "tokens") as advance:
        write_dataset(prefix, sequences(advance), shards.vocab_size)
    return Moved(prefix, len(documents), total, 0, time.monotonic() - began)


def import_datasets(
    prefixes: Sequence[Path],
    folder: Path,
    vocabulary: Vocabulary,
    validation: float = 0.0,
    test: float = 0.0,
    split_at_eos: bool = False,
) -> Moved:
    """Make the shard folder `folder` of some datasets; of several, each is a corpus of its own.

    Document 7 of data/books is named books:7. EOS at its end is taken off; inside, it is an error, or with
    `split_at_eos` the documents between are taken one by one (books:7/0, books:7/1 and so on). Splits go by a hash of
    the id in the shares `validation` and `test`. Bytes and words are counted where there is a tokenizer.
    The manifest is written last: an import that was killed is started again. BadInput names file and document.
    """
    began = time.monotonic()
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise BadInput(f"--validation {validation} and --test {test} must not be negative, and together below 1")
    datasets = [MegatronDataset(_without_suffix(prefix)) for prefix in prefixes]
    names = [dataset.name for dataset in datasets]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise BadInput(f"two datasets are named {twice}: the documents of both would have the same ids")
    _claim(folder)
    with progress(f"importing to {folder}", sum(dataset.tokens for dataset in datasets), "tokens") as advance:
        work = _Import(folder, vocabulary, validation, test, split_at_eos, advance)
        for dataset in datasets:
            work.add(dataset, corpus=dataset.name if len(datasets) > 1 else "")
    settings = {
        "imported": [{"prefix": str(dataset.prefix), "sequences": dataset.sequences} for dataset in datasets],
        "splits": {"validation": validation, "test": test},
        "split_at_eos": split_at_eos,
    }
    total = work.finish(settings)
    return Moved(folder, total.documents, total.tokens, work.empty, time.monotonic() - began)


def _without_suffix(prefix: Path) -> Path:
    return prefix.with_suffix("") if prefix.suffix in (".bin", ".idx") else prefix


def _claim(folder: Path) -> None:
    """Make the folder, or take it over if it holds nothing but what a killed import left."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; shards need a folder")
    found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if foreign := [name for name in found if not _LEFTOVER.fullmatch(name)]:
        raise BadInput(f"{folder} holds {foreign[0]} already; an import needs a new or an empty folder")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in found:
            (folder / name).unlink()


class _Import:
    """Shards in the making, and what was counted of them."""

    def __init__(
        self,
        folder: Path,
        vocabulary: Vocabulary,
        validation: float,
        test: float,
        split_at_eos: bool,
        advance: Advance,
    ):
        self._folder, self._vocabulary, self._split_at_eos = folder, vocabulary, split_at_eos
        self._validation, self._test, self._advance = validation, test, advance
        self._tokenizer = None if vocabulary.tokenizer is None else Tokenizer.open(vocabulary.tokenizer)
        self._shards: list[ShardEntry] = []
        self._splits = {name: Counts() for name in SPLITS}
        self.empty = 0

    def add(self, dataset: MegatronDataset, corpus: str) -> None:
        """Writes the documents of a dataset to shards of their own."""
        rows = self._rows(dataset)
        while (first := next(rows, None)) is not None:
            path = self._folder / f"shard-{len(self._shards):05}.arrow"
            portion = chain([first], _until_full(rows, _SHARD_TOKENS - len(first.tokens)))
            self._shards.append(write_shard(path, portion, self._vocabulary.size, corpus))

    def finish(self, settings: dict[str, Any]) -> Counts:
        """Writes tokenizer and manifest; BadInput if there were no documents at all."""
        total = Counts()
        for counts in self._splits.values():
            total.add(counts.documents, counts.tokens, counts.bytes)
        if not total.documents:
            raise BadInput(f"nothing was imported to {self._folder}: all {self.empty} documents are empty")
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "vocab_size": self._vocabulary.size,
            **asdict(total),
            "skipped": {"empty": self.empty},
            "splits": {name: asdict(counts) for name, counts in self._splits.items()},
            "tokenizer": self._write_tokenizer(),
            "shards": [asdict(entry) for entry in self._shards],
            "settings": settings,
        }
        path = self._folder / MANIFEST
        with writing(path):
            write_json(path, {**manifest, "hash": manifest_hash(manifest)})
        return total

    def _write_tokenizer(self) -> dict[str, Any]:
        """The manifest's entry; without a tokenizer the hash is that of the two numbers that stand for it."""
        size, eos = self._vocabulary.size, self._vocabulary.eos
        if self._tokenizer is None or self._vocabulary.tokenizer is None:
            numbers = xxhash.xxh3_128_hexdigest(f"vocab_size {size}, eos {eos}".encode())
            return {"file": None, "hash": numbers, "kind": "unknown", "eos": eos, "lossless": None}
        path = self._folder / TOKENIZER
        with writing(path), whole_file(path) as temporary:
            temporary.write_bytes(self._vocabulary.tokenizer.read_bytes())
        lossless = all(map(self._tokenizer.is_exact, HARD_TEXTS))
        return {"file": TOKENIZER, "hash": self._tokenizer.hash, "kind": "brought", "eos": eos, "lossless": lossless}

    def _rows(self, dataset: MegatronDataset) -> Iterator[ShardRow]:
        for number, tokens in enumerate(dataset.documents()):
            self._check_ids(dataset, number, tokens)
            parts = self._parts(dataset, number, tokens)
            for place, part in enumerate(parts):
                if not len(part):
                    self.empty += 1
                    continue
                name = f"{dataset.name}:{number}" + (f"/{place}" if len(parts) > 1 else "")
                yield self._row(name, f"{dataset.bin}, document {number}", part)
            self._advance(len(tokens))

    def _row(self, name: str, source: str, tokens: np.ndarray) -> ShardRow:
        text = "" if self._tokenizer is None else self._tokenizer.decode(tokens)
        size, words = len(text.encode()), len(text.split())
        split = split_of(name, self._validation, self._test)
        self._splits[split].add(1, len(tokens), size)
        return ShardRow(name, source, split, size, words, tokens)

    def _check_ids(self, dataset: MegatronDataset, number: int, tokens: np.ndarray) -> None:
        size = self._vocabulary.size
        if len(tokens) and (tokens.max() >= size or tokens.min() < 0):
            place = int(np.flatnonzero((tokens >= size) | (tokens < 0))[0])
            outside = f"the id {tokens[place]}, outside a vocabulary of {size}"
            raise BadInput(f"{dataset.bin}: document {number} has at token {place} {outside}")

    def _parts(self, dataset: MegatronDataset, number: int, tokens: np.ndarray) -> list[np.ndarray]:
        """The document without the EOS at its end, or the documents that EOS divides it into."""
        eos = self._vocabulary.eos
        ends = np.flatnonzero(tokens == eos)
        if not len(ends):
            return [tokens]
        if ends[0] == len(tokens) - 1:
            return [tokens[:-1]]
        if not self._split_at_eos:
            where = f"document {number} has EOS ({eos}) inside, at token {ends[0]} of {len(tokens)}"
            advice = "--split-at-eos takes what lies between as documents, which is right where several were packed"
            raise BadInput(f"{dataset.bin}: {where} ({advice})")
        begins = [0, *(ends + 1).tolist()]
        parts = [tokens[first:stop] for first, stop in zip(begins, [*ends.tolist(), len(tokens)], strict=True)]
        return parts[:-1] if not len(parts[-1]) else parts


def _until_full(rows: Iterator[ShardRow], room: int) -> Iterator[ShardRow]:
    """Rows as long as there is room for another token."""
    while room > 0 and (row := next(rows, None)) is not None:
        room -= len(row.tokens)
        yield row
