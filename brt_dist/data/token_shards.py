"""Token shards: Arrow IPC files of whole documents, and the manifest that lists them. The door of pyarrow for shards.

A shard is an uncompressed Arrow IPC file, read through a memory map, with a row for each document:

  id      string                 unique over the corpus
  source  string                 the file, and where in it, that the document came from
  split   string                 train, validation or test
  bytes   int64                  UTF-8 bytes of the text; it and words are 0 where only tokens are known
  words   int64                  len(text.split())
  tokens  large_list<uint16>     or uint32, where the vocabulary has more than 65536 entries; without EOS
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from brt_dist.data.atomic_file import whole_file, write_json
from brt_dist.data.documents import Documents
from brt_dist.data.errors import BadInput
from brt_dist.data.manifest import FORMAT, LEDGER, MANIFEST, file_advice, listed_files, manifest_hash, read_manifest

__all__ = [
    "FORMAT",
    "LEDGER",
    "MANIFEST",
    "PIECE_BYTES",
    "SPLITS",
    "Documents",
    "ShardBatch",
    "ShardEntry",
    "ShardRow",
    "TokenShards",
    "file_hash",
    "file_hashes",
    "manifest_hash",
    "map_shard",
    "open_documents",
    "read_manifest",
    "token_type",
    "write_shard",
    "writing",
]

SPLITS = ("train", "validation", "test")
PIECE_BYTES = 1 << 22

# Rows are written in batches of about this many tokens, so that a unit of work need not fit into memory as tokens.
_BATCH_TOKENS = 1 << 23


@dataclass(frozen=True)
class ShardRow:
    """One document as a shard holds it."""

    id: str
    source: str
    split: str
    bytes: int
    words: int
    tokens: np.ndarray


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of one shard, whose documents are all of one corpus.

    `hash` is the xxh3_128 of the file in hexadecimal, `size` its bytes, `pieces` the xxh3_64 of every stretch of
    `PIECE_BYTES`: where a file was altered, they tell which of its bytes.
    """

    file: str
    hash: str
    size: int
    documents: int
    tokens: int
    corpus: str = ""
    pieces: tuple[str, ...] = ()


def token_type(vocab_size: int) -> np.dtype:
    """The unsigned integer in which shards keep tokens of a vocabulary of this size."""
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.uint32)


def file_hash(path: Path) -> str:
    """xxh3_128 of a file's bytes, in hexadecimal."""
    return file_hashes(path)[0]


def file_hashes(path: Path) -> tuple[str, tuple[str, ...]]:
    """xxh3_128 of a file's bytes and xxh3_64 of each of its stretches of `PIECE_BYTES`, in hexadecimal."""
    digest = xxhash.xxh3_128()
    pieces = []
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            pieces.append(xxhash.xxh3_64_hexdigest(piece))
    return digest.hexdigest(), tuple(pieces)


def write_shard(path: Path, rows: Iterable[ShardRow], vocab_size: int, corpus: str = "") -> ShardEntry:
    """Write `rows` to the shard `path`, whole or not at all; the same rows give the same bytes.

    BadInput names the shard if it cannot be written, as on a full disk.
    """
    dtype = token_type(vocab_size)
    schema = _schema(dtype)
    documents = tokens = 0
    with writing(path), whole_file(path) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in _batches(rows):
                documents += len(batch)
                tokens += sum(len(row.tokens) for row in batch)
                writer.write_batch(_record_batch(batch, schema, dtype))
                # Let go of before the next ones are made: one document may be very long. So below.
                del batch
        (digest, pieces), size = file_hashes(temporary), temporary.stat().st_size
    return ShardEntry(path.name, digest, size, documents, tokens, corpus, pieces)


def _schema(dtype: np.dtype) -> pa.Schema:
    return pa.schema(
        [
            *((name, pa.string()) for name in ("id", "source", "split")),
            *((name, pa.int64()) for name in ("bytes", "words")),
            ("tokens", pa.large_list(pa.from_numpy_dtype(dtype))),
        ]
    )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system has against writing inside becomes a BadInput that names `path`."""
    try:
        yield
    except OSError as error:
        # pyarrow's messages carry the system's reason, and its own words around it.
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise BadInput(f"{path} cannot be written: {reason}") from None


def _batches(rows: Iterable[ShardRow]) -> Iterator[list[ShardRow]]:
    batch: list[ShardRow] = []
    tokens = 0
    for row in rows:
        batch.append(row)
        tokens += len(row.tokens)
        del row
        if tokens >= _BATCH_TOKENS:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch


def _record_batch(batch: list[ShardRow], schema: pa.Schema, dtype: np.dtype) -> pa.RecordBatch:
    offsets = np.zeros(len(batch) + 1, np.int64)
    np.cumsum([len(row.tokens) for row in batch], out=offsets[1:])
    # Made narrow at once: of a long document there is no room for both. Ids are inside the vocabulary.
    values = np.concatenate([row.tokens for row in batch], dtype=dtype, casting="unsafe")
    columns = [pa.array([getattr(row, name) for row in batch], schema.field(name).type) for name in schema.names[:-1]]
    columns.append(pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values)))
    return pa.record_batch(columns, schema=schema)


@dataclass(frozen=True, eq=False)
class ShardBatch:
    """One record batch under the memory map: its table columns, and where each document's tokens lie in `values`.

    `first_byte` says where in the file `values` begins; `corpus` is that of all its documents.
    """

    columns: pa.RecordBatch
    values: np.ndarray
    offsets: np.ndarray
    first_byte: int
    corpus: str

    def __len__(self) -> int:
        return int(self.columns.num_rows)

    def numbers(self, name: str) -> np.ndarray:
        """A column of int64."""
        return self.columns.column(name).to_numpy()

    def strings(self, name: str, rows: slice | np.ndarray) -> list[str]:
        """Some rows of a column of text."""
        column = self.columns.column(name)
        return (column[rows] if isinstance(rows, slice) else column.take(pa.array(rows))).to_pylist()

    def rows_where(self, name: str, value: str) -> np.ndarray:
        """The rows whose column `name` is `value`, in order; int64."""
        return np.flatnonzero(pc.equal(self.columns.column(name), value).to_numpy(zero_copy_only=False))

    def first_ids(self, count: int, beginning: str = "", part: str = "") -> list[str]:
        """The first `count` ids that begin with one text and contain another."""
        ids = self.columns.column("id")
        if beginning:
            ids = ids.filter(pc.starts_with(ids, beginning))
        if part:
            ids = ids.filter(pc.match_substring(ids, part, ignore_case=True))
        return ids[:count].to_pylist()

    def damage(self) -> str | None:
        """What does not hold together inside, in pyarrow's words; None in a sound batch."""
        if any(column.null_count for column in self.columns.columns):
            return "a value is missing"
        try:
            self.columns.validate(full=True)
        except pa.ArrowInvalid as error:
            return str(error)
        return None


def open_documents(paths: Iterable[Path]) -> Documents:
    """All documents of some shards, listed in a manifest or not; BadInput names a shard that cannot be read."""
    return _documents([batch for path in paths for batch in map_shard(path)], "all")


def _documents(batches: list[ShardBatch], split: str) -> Documents:
    chosen = [
        np.arange(len(batch), dtype=np.int64) if split == "all" else batch.rows_where("split", split)
        for batch in batches
    ]
    batch_of = np.repeat(np.arange(len(chosen), dtype=np.int32), [len(rows) for rows in chosen])
    return Documents(batches, batch_of, np.concatenate([np.zeros(0, np.int64), *chosen]))


class TokenShards:
    """A finished shard folder, checked against its manifest."""

    def __init__(self, folder: Path, manifest: dict[str, Any], batches: list[ShardBatch]):
        self.folder = folder
        self.manifest = manifest
        self._batches = batches

    @classmethod
    def open(
        cls,
        dir: str | Path,
        verify: Literal["full", "size", "none"] = "full",
        memory: Path | None = None,
    ) -> TokenShards:
        """Open the shard folder `dir` and check it.

        Every file's size is checked, and with "full" its hash too; "none" trusts both. `memory` is a JSON file in which
        checked hashes are remembered by size and time of the file, so that the next opening need not read it again.
        Raises BadInput that names the file, with what was expected and what was found.
        """
        folder = Path(dir)
        manifest = read_manifest(folder)
        if verify != "none":
            _verify(folder, manifest, hashes=verify == "full", memory=memory)
        batches = [
            batch
            for entry in manifest["shards"]
            for batch in map_shard(folder / entry["file"], entry.get("corpus", ""))
        ]
        rows = sum(len(batch) for batch in batches)
        if rows != manifest["documents"]:
            raise BadInput(f"{folder / MANIFEST} counts {manifest['documents']} documents, its shards hold {rows}")
        return cls(folder, manifest, batches)

    @property
    def vocab_size(self) -> int:
        return int(self.manifest["vocab_size"])

    @property
    def eos(self) -> int:
        """The id that stands in front of and behind every document; the shards themselves do not hold it."""
        return int(self.manifest["tokenizer"]["eos"])

    @property
    def tokenizer_path(self) -> Path:
        """Where the tokenizer lies; BadInput where the shards were imported without one."""
        file = self.manifest["tokenizer"]["file"]
        if file is None:
            raise BadInput(f"the shards in {self.folder} were imported without a tokenizer: there are only token ids")
        return self.folder / file

    @cached_property
    def hash(self) -> str:
        """One hash of all tokens and of the tokenizer that made them."""
        parts = [self.manifest["tokenizer"]["hash"], *(entry["hash"] for entry in self.manifest["shards"])]
        return xxhash.xxh3_128("\n".join(parts).encode()).hexdigest()

    def split(self, name: str) -> Documents:
        """The documents of `name`: train, validation, test or all."""
        if name not in (*SPLITS, "all"):
            raise BadInput(f"there is no split {name!r}: it must be one of {', '.join(SPLITS)} or all")
        return _documents(self._batches, name)


def map_shard(path: Path, corpus: str = "") -> list[ShardBatch]:
    """The batches of a shard under a memory map; BadInput names a shard that is missing or is none."""
    try:
        file = pa.memory_map(str(path))
        reader = pa.ipc.open_file(file)
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except FileNotFoundError:
        raise BadInput(f"shard {path} is missing") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise BadInput(f"shard {path} cannot be read: {error}") from None
    if reader.schema not in [_schema(np.dtype(width)) for width in (np.uint16, np.uint32)]:
        raise BadInput(f"shard {path} cannot be read: its columns are {', '.join(map(str, reader.schema))}")
    file.seek(0)
    begins = file.read_buffer().address
    mapped = []
    for batch in batches:
        tokens = batch.column("tokens")
        values = tokens.values.to_numpy()
        mapped.append(ShardBatch(batch, values, tokens.offsets.to_numpy(), values.ctypes.data - begins, corpus))
    return mapped


def _verify(folder: Path, manifest: dict[str, Any], hashes: bool, memory: Path | None) -> None:
    known = _remembered(memory)
    fresh = dict(known)
    advice = file_advice(folder, manifest)
    for entry in listed_files(manifest):
        path = folder / entry["file"]
        try:
            stat = path.stat()
        except OSError:
            raise BadInput(f"{path} is missing, and {folder / MANIFEST} lists it ({advice})") from None
        if "size" in entry and stat.st_size != entry["size"]:
            kind = "truncated" if stat.st_size < entry["size"] else "not the file that was written"
            sizes = f"expected {entry['size']} bytes, found {stat.st_size}"
            raise BadInput(f"{path} is {kind}: {sizes} ({advice})")
        seen = [entry["hash"], stat.st_size, stat.st_mtime_ns]
        if not hashes or known.get(str(path.resolve())) == seen:
            continue
        found = file_hash(path)
        if found != entry["hash"]:
            hashes_differ = f"expected hash {entry['hash']}, found {found}"
            raise BadInput(f"{path} was altered: {hashes_differ} ({advice})")
        fresh[str(path.resolve())] = seen
    if memory is not None and fresh != known:
        # Only a convenience: a folder that cannot be written to costs the next opening its speed and nothing else.
        with contextlib.suppress(OSError):
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(memory, fresh)


def _remembered(memory: Path | None) -> dict[str, list[Any]]:
    if memory is None:
        return {}
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
