"""Token shards: Arrow IPC files of whole documents, and the manifest that lists them. The door of pyarrow for shards.

A shard is an uncompressed Arrow IPC file, read through a memory map, with a row for each document:

  id      string                 unique over the corpus
  source  string                 the file, and where in it, that the document came from
  split   string                 train, validation or test
  bytes   int64                  UTF-8 bytes of the text
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
import xxhash

from brt_dist.data.atomic_file import whole_file, write_json
from brt_dist.data.errors import BadInput

MANIFEST = "manifest.json"
# What `brt prepare` keeps beside the manifest; with it a lost or altered file is written again.
LEDGER = "units.jsonl"
FORMAT = 1
SPLITS = ("train", "validation", "test")

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
    """What the manifest says of one shard; `hash` is the xxh3_128 of the file in hexadecimal, `size` its bytes."""

    file: str
    hash: str
    size: int
    documents: int
    tokens: int


def token_type(vocab_size: int) -> np.dtype:
    """The unsigned integer in which shards keep tokens of a vocabulary of this size."""
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.uint32)


def file_hash(path: Path) -> str:
    """xxh3_128 of a file's bytes, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()


def write_shard(path: Path, rows: Iterable[ShardRow], vocab_size: int) -> ShardEntry:
    """Write `rows` to the shard `path`, whole or not at all; the same rows give the same bytes.

    BadInput names the shard if it cannot be written, as on a full disk.
    """
    dtype = token_type(vocab_size)
    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("id", "source", "split")),
            *((name, pa.int64()) for name in ("bytes", "words")),
            ("tokens", pa.large_list(pa.from_numpy_dtype(dtype))),
        ]
    )
    documents = tokens = 0
    with writing(path), whole_file(path) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in _batches(rows):
                documents += len(batch)
                tokens += sum(len(row.tokens) for row in batch)
                writer.write_batch(_record_batch(batch, schema, dtype))
        digest, size = file_hash(temporary), temporary.stat().st_size
    return ShardEntry(path.name, digest, size, documents, tokens)


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
        if tokens >= _BATCH_TOKENS:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch


def _record_batch(batch: list[ShardRow], schema: pa.Schema, dtype: np.dtype) -> pa.RecordBatch:
    offsets = np.zeros(len(batch) + 1, np.int64)
    np.cumsum([len(row.tokens) for row in batch], out=offsets[1:])
    values = np.concatenate([row.tokens for row in batch]).astype(dtype, copy=False)
    columns = [pa.array([getattr(row, name) for row in batch], schema.field(name).type) for name in schema.names[:-1]]
    columns.append(pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values)))
    return pa.record_batch(columns, schema=schema)


def manifest_hash(manifest: dict[str, Any]) -> str:
    """xxh3_128, in hexadecimal, of all that a manifest says but its own key "hash"."""
    rest = {key: value for key, value in manifest.items() if key != "hash"}
    return xxhash.xxh3_128(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a shard folder; BadInput if there is none, or none of ours, or one that was altered."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"no finished shards in {folder}: {path} does not exist (`brt prepare` writes it)") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read as a manifest: {error} ({_manifest_advice(folder)})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise BadInput(f"{path} is not a manifest of format {FORMAT}: found {found!r} ({_manifest_advice(folder)})")
    if "hash" not in manifest:
        raise BadInput(f"{path} is not a whole manifest: it has no 'hash' ({_manifest_advice(folder)})")
    if (found := manifest_hash(manifest)) != manifest["hash"]:
        advice = _manifest_advice(folder)
        raise BadInput(f"{path} was altered: its hash is {found} and should be {manifest['hash']} ({advice})")
    if wrong := _wrong_entry(manifest):
        raise BadInput(f"{path} is not a whole manifest: {wrong} ({_manifest_advice(folder)})")
    return manifest


def _wrong_entry(manifest: dict[str, Any]) -> str | None:
    """What is missing from a manifest, or has a wrong type, among the entries that this module reads."""
    tokenizer, shards = manifest.get("tokenizer"), manifest.get("shards")
    if not isinstance(tokenizer, dict):
        return f"'tokenizer' must be an object, found {tokenizer!r}"
    if not isinstance(shards, list) or not all(isinstance(entry, dict) for entry in shards):
        return "'shards' must be a list of objects"
    wanted: list[tuple[str, dict[str, Any], str, type]] = [
        *(("", manifest, key, int) for key in ("vocab_size", "documents")),
        *(("tokenizer.", tokenizer, key, kind) for key, kind in (("file", str), ("hash", str), ("eos", int))),
    ]
    for number, entry in enumerate(shards):
        place = f"shards[{number}]."
        wanted += [(place, entry, key, kind) for key, kind in (("file", str), ("hash", str), ("size", int))]
    for place, entry, key, kind in wanted:
        value = entry.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            name = "a whole number" if kind is int else "text"
            return f"'{place}{key}' must be {name}, found {value!r}"
    if not 0 <= tokenizer["eos"] < manifest["vocab_size"]:
        return f"'tokenizer.eos' is {tokenizer['eos']}, outside a vocabulary of {manifest['vocab_size']}"
    return None


def _manifest_advice(folder: Path) -> str:
    if (folder / LEDGER).exists():
        return "remove it and run `brt prepare` again, which writes it from the finished shards"
    return f"remove the folder {folder} and run `brt prepare` again"


def _file_advice(folder: Path) -> str:
    if (folder / LEDGER).exists():
        return "`brt prepare` writes it again"
    return f"remove the folder {folder} and run `brt prepare` again"


@dataclass(frozen=True, eq=False)
class _Batch:
    """One record batch under the memory map: its table columns, and where each document's tokens lie in `values`."""

    columns: pa.RecordBatch
    values: np.ndarray
    offsets: np.ndarray


class Documents:
    """Some of the documents of a shard folder, in the order of the shards."""

    def __init__(self, batches: list[_Batch], batch_of: np.ndarray, row_of: np.ndarray):
        """Document i is row `row_of[i]` of `batches[batch_of[i]]`."""
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
    def bytes(self) -> np.ndarray:
        """UTF-8 bytes of each document's text, int64."""
        return self._gather([batch.columns.column("bytes").to_numpy() for batch in self._batches])

    @cached_property
    def words(self) -> np.ndarray:
        """Words of each document, int64."""
        return self._gather([batch.columns.column("words").to_numpy() for batch in self._batches])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, without EOS, int64."""
        return self._gather([np.diff(batch.offsets) for batch in self._batches])

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

    def _gather(self, columns: list[np.ndarray]) -> np.ndarray:
        if not columns:
            return np.zeros(0, np.int64)
        first_of = np.cumsum([0, *(len(column) for column in columns)])[:-1]
        return np.concatenate(columns)[first_of[self._batch_of] + self._row_of]

    def _strings(self, name: str) -> list[str]:
        found: list[str] = []
        for number, batch in enumerate(self._batches):
            rows = self._row_of[self._batch_of == number]
            found += batch.columns.column(name).take(pa.array(rows)).to_pylist()
        return found


def open_documents(paths: Iterable[Path]) -> Documents:
    """All documents of some shards, listed in a manifest or not; BadInput names a shard that cannot be read."""
    return _documents([batch for path in paths for batch in _map_shard(path)], "all")


def _documents(batches: list[_Batch], split: str) -> Documents:
    chosen = [
        np.arange(len(batch.columns), dtype=np.int64)
        if split == "all"
        else np.flatnonzero(np.array(batch.columns.column("split").to_pylist()) == split)
        for batch in batches
    ]
    batch_of = np.repeat(np.arange(len(chosen), dtype=np.int64), [len(rows) for rows in chosen])
    return Documents(batches, batch_of, np.concatenate([np.zeros(0, np.int64), *chosen]))


class TokenShards:
    """A finished shard folder, checked against its manifest."""

    def __init__(self, folder: Path, manifest: dict[str, Any], batches: list[_Batch]):
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
        batches = [batch for entry in manifest["shards"] for batch in _map_shard(folder / entry["file"])]
        rows = sum(len(batch.columns) for batch in batches)
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
        return self.folder / self.manifest["tokenizer"]["file"]

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


def _map_shard(path: Path) -> list[_Batch]:
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except FileNotFoundError:
        raise BadInput(f"shard {path} is missing") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise BadInput(f"shard {path} cannot be read: {error}") from None
    mapped = []
    for batch in batches:
        tokens = batch.column("tokens")
        mapped.append(_Batch(batch, tokens.values.to_numpy(), tokens.offsets.to_numpy()))
    return mapped


def _verify(folder: Path, manifest: dict[str, Any], hashes: bool, memory: Path | None) -> None:
    known = _remembered(memory)
    fresh = dict(known)
    for entry in [manifest["tokenizer"], *manifest["shards"]]:
        path = folder / entry["file"]
        try:
            stat = path.stat()
        except OSError:
            raise BadInput(f"{path} is missing, and {folder / MANIFEST} lists it ({_file_advice(folder)})") from None
        if "size" in entry and stat.st_size != entry["size"]:
            kind = "truncated" if stat.st_size < entry["size"] else "not the file that was written"
            sizes = f"expected {entry['size']} bytes, found {stat.st_size}"
            raise BadInput(f"{path} is {kind}: {sizes} ({_file_advice(folder)})")
        seen = [entry["hash"], stat.st_size, stat.st_mtime_ns]
        if not hashes or known.get(str(path.resolve())) == seen:
            continue
        found = file_hash(path)
        if found != entry["hash"]:
            hashes_differ = f"expected hash {entry['hash']}, found {found}"
            raise BadInput(f"{path} was altered: {hashes_differ} ({_file_advice(folder)})")
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
