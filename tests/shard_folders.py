"""Finished shard folders with rows of the test's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from brt_dist.data.atomic_file import write_json
from brt_dist.data.token_shards import SPLITS, ShardRow, file_hash, manifest_hash, write_shard

EOS, VOCAB = 1, 60_000


def row(name: str, tokens: Any, split: str = "train") -> ShardRow:
    """A document of three bytes a token."""
    tokens = np.asarray(tokens, np.int32)
    return ShardRow(name, f"file of {name}", split, 3 * len(tokens), len(tokens), tokens)


def finished_folder(
    folder: Path,
    shards: Mapping[str, Sequence[ShardRow]],
    corpora: Mapping[str, str] | None = None,
    tokenizer: bytes = b"model",
    **changes: Any,
) -> Path:
    """`folder` with a shard for each file name and a manifest that counts everything; `changes` are other entries."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    vocab_size = changes.get("vocab_size", VOCAB)
    entries = [
        write_shard(folder / name, rows, vocab_size, (corpora or {}).get(name, "")) for name, rows in shards.items()
    ]
    rows = [row for rows in shards.values() for row in rows]
    manifest = {
        "format": 1,
        "vocab_size": vocab_size,
        **counts(rows),
        "splits": {name: counts([row for row in rows if row.split == name]) for name in SPLITS},
        "tokenizer": {"file": "tokenizer.model", "hash": file_hash(folder / "tokenizer.model"), "eos": EOS},
        "shards": [vars(entry) for entry in entries],
        **changes,
    }
    seal(folder, manifest)
    return folder


def counts(rows: Sequence[ShardRow]) -> dict[str, int]:
    return {
        "documents": len(rows),
        "tokens": sum(len(row.tokens) for row in rows),
        "bytes": sum(row.bytes for row in rows),
    }


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with the hash that belongs to it."""
    write_json(folder / "manifest.json", {**manifest, "hash": manifest_hash(manifest)})
