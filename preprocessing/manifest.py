"""The manifest of a finished shard folder, put together from what was reported of each shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from brt_dist.data.token_shards import FORMAT, SPLITS, manifest_hash, open_documents
from brt_dist.data.tokenizer import HARD_TEXTS, Tokenizer
from preprocessing.config import TokenizerConfig
from preprocessing.shard_unit import ShardReport
from preprocessing.survey import check_ids_differ, id_hash

TOKENIZER = "tokenizer.model"


def make_manifest(
    folder: Path,
    reports: Sequence[ShardReport],
    tokenizer: Tokenizer,
    config: TokenizerConfig,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The manifest of the shards in `folder`; BadInput if two documents have one id.

    The tokenizer is called lossless if all hard texts, and the beginning of each document, come back from their tokens.
    Its "hash" is that of all the rest, so that a change by hand is noticed.
    """
    counts = ("documents", "tokens", "bytes")
    splits = {name: {key: sum(report.splits[name][key] for report in reports) for key in counts} for name in SPLITS}
    skipped = [entry for report in reports for entry in report.skipped]
    replaced = [entry for report in reports for entry in report.replaced]
    inexact = [entry for report in reports for entry in report.inexact]
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "vocab_size": tokenizer.vocab_size,
        **{key: sum(splits[name][key] for name in SPLITS) for key in counts},
        "skipped": {why: sum(entry["why"] == why for entry in skipped) for why in ("invalid_utf8", "empty")},
        "replaced": {"invalid_utf8": len(replaced)},
        "splits": splits,
        "tokenizer": {
            "file": TOKENIZER,
            "hash": tokenizer.hash,
            "kind": config.kind if config.model is None else "brought",
            "eos": tokenizer.eos,
            "lossless": not inexact and all(map(tokenizer.is_exact, HARD_TEXTS)),
            "inexact_documents": len(inexact),
        },
        "shards": [asdict(report.shard) for report in reports],
        "sources": _sources([folder / report.shard.file for report in reports]),
        "skipped_documents": skipped,
        "replaced_documents": replaced,
        "settings": settings,
    }
    manifest["hash"] = manifest_hash(manifest)
    return manifest


def _sources(paths: Sequence[Path]) -> list[dict[str, str]]:
    """Id, source and split of every document, in the order of the shards."""
    documents = open_documents(paths)
    names = list(zip(documents.ids, documents.sources, documents.splits, strict=True))
    hashes = np.fromiter((id_hash(name) for name, _, _ in names), np.uint64, len(names))
    check_ids_differ(hashes, lambda: [(name, source) for name, source, _ in names])
    return [{"id": name, "source": source, "split": split} for name, source, split in names]
