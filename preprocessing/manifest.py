"""The manifest of a finished shard folder, put together from what was reported of each shard."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

import numpy as np

from brt_dist.data.atomic_file import whole_file
from brt_dist.data.token_shards import FORMAT, SPLITS, file_hash, manifest_hash, open_documents, writing
from brt_dist.data.tokenizer import HARD_TEXTS, Tokenizer
from preprocessing.config import TokenizerConfig
from preprocessing.shard_unit import ShardReport
from preprocessing.survey import check_ids_differ, id_hash

TOKENIZER = "tokenizer.model"
# Every rank of a training run reads the manifest: longer lists of documents become files beside it.
LONGEST_LIST = 100_000
# Why documents are left out.
REASONS = ("invalid_utf8", "empty", "damaged", "too_long", "not_text", "duplicate")
_COUNTS = ("documents", "tokens", "bytes")


def make_manifest(
    folder: Path,
    reports: Collection[ShardReport],
    tokenizer: Tokenizer,
    config: TokenizerConfig,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The manifest of the shards in `folder`; BadInput if two documents have one id.

    The tokenizer is called lossless if all hard texts, and each document that was decoded again, come back from their
    tokens. Its "hash" is that of all the rest, so that a change by hand is noticed.
    """
    paths = [folder / report.shard.file for report in reports]
    check_ids_differ(_id_hashes(paths), lambda: ((entry["id"], entry["source"]) for entry in _sources(paths)))
    splits = {name: dict.fromkeys(_COUNTS, 0) for name in SPLITS}
    skipped = dict.fromkeys(REASONS, 0)
    replaced = moved = inexact = checked = 0
    for report in reports:
        for name, key in product(SPLITS, _COUNTS):
            splits[name][key] += report.splits[name][key]
        for entry in report.skipped:
            skipped[entry["why"]] += 1
        replaced, moved = replaced + len(report.replaced), moved + len(report.moved)
        inexact, checked = inexact + len(report.inexact), checked + report.checked
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "vocab_size": tokenizer.vocab_size,
        **{key: sum(splits[name][key] for name in SPLITS) for key in _COUNTS},
        "skipped": skipped,
        "replaced": {"invalid_utf8": replaced},
        "moved": {"duplicate": moved},
        "splits": splits,
        "corpora": _by_corpus(reports),
        "tokenizer": {
            "file": TOKENIZER,
            "hash": tokenizer.hash,
            "kind": config.kind if config.model is None else "brought",
            "eos": tokenizer.eos,
            "lossless": not inexact and all(map(tokenizer.is_exact, HARD_TEXTS)),
            "inexact_documents": inexact,
            "checked_documents": checked,
        },
        "shards": [asdict(report.shard) for report in reports],
        "sources": _listed(_sources(paths), folder, "sources"),
        "skipped_documents": _listed(
            (entry for report in reports for entry in report.skipped), folder, "skipped_documents"
        ),
        "replaced_documents": _listed(
            (entry for report in reports for entry in report.replaced), folder, "replaced_documents"
        ),
        "settings": settings,
    }
    manifest["hash"] = manifest_hash(manifest)
    return manifest


def _by_corpus(reports: Iterable[ShardReport]) -> dict[str, dict[str, int]]:
    """Documents, tokens and bytes of each corpus, and how many of its documents were left out."""
    found: dict[str, dict[str, int]] = {}
    for report in reports:
        counts = found.setdefault(report.shard.corpus, dict.fromkeys((*_COUNTS, "skipped"), 0))
        for key in _COUNTS:
            counts[key] += sum(split[key] for split in report.splits.values())
        counts["skipped"] += len(report.skipped)
    return found


def _sources(paths: Sequence[Path]) -> Iterator[dict[str, str]]:
    """Id, source and split of every document, in the order of the shards."""
    for path in paths:
        documents = open_documents([path])
        for name, source, split in zip(documents.ids, documents.sources, documents.splits, strict=True):
            yield {"id": name, "source": source, "split": split}


def _id_hashes(paths: Sequence[Path]) -> np.ndarray:
    hashes = [np.fromiter(map(id_hash, open_documents([path]).ids), np.uint64) for path in paths]
    return np.concatenate([np.zeros(0, np.uint64), *hashes])


def _listed(entries: Iterable[dict[str, str]], folder: Path, name: str) -> list[dict[str, str]] | dict[str, Any]:
    """The entries; where they are many, the JSON Lines file beside the manifest that they were written to."""
    coming = iter(entries)
    first = list(islice(coming, LONGEST_LIST + 1))
    if len(first) <= LONGEST_LIST:
        return first
    path = folder / f"{name}.jsonl"
    count = 0
    with writing(path), whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for count, entry in enumerate(chain(first, coming), start=1):  # noqa: B007
            file.write(json.dumps(entry) + "\n")
    return {"file": path.name, "hash": file_hash(path), "entries": count}
