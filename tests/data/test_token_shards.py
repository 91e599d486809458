"""Shards give back what was written, and say so when they do not hold it any more."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from shard_folders import finished_folder, seal

from brt_dist.data import token_shards
from brt_dist.data.atomic_file import write_json
from brt_dist.data.errors import BadInput
from brt_dist.data.token_shards import (
    ShardRow,
    TokenShards,
    file_hash,
    manifest_hash,
    open_documents,
    token_type,
    write_shard,
)

SPLIT_OF = ("train", "validation", "train", "test", "train")


def row(number: int, length: int) -> ShardRow:
    tokens = np.arange(number * 1000, number * 1000 + length, dtype=np.int32)
    return ShardRow(f"doc {number}", f"file {number}", SPLIT_OF[number % 5], 3 * length, length, tokens)


ROWS = [row(number, length) for number, length in enumerate((5, 0, 700, 1, 30, 2, 9))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished shard folder of two shards."""
    return finished_folder(tmp_path, {"a.arrow": ROWS[:4], "b.arrow": ROWS[4:]}, vocab_size=10000)


def test_every_document_comes_back_in_the_order_of_the_shards(folder: Path) -> None:
    shards = TokenShards.open(folder)
    documents = shards.split("all")
    assert documents.ids == [entry.id for entry in ROWS]
    assert documents.sources == [entry.source for entry in ROWS]
    assert documents.lengths.tolist() == [len(entry.tokens) for entry in ROWS]
    assert documents.bytes.tolist() == [entry.bytes for entry in ROWS]
    assert documents.words.tolist() == [entry.words for entry in ROWS]
    assert [documents.tokens(index).tolist() for index in range(len(documents))] == [
        entry.tokens.tolist() for entry in ROWS
    ]
    assert (shards.vocab_size, shards.eos, shards.tokenizer_path) == (10000, 1, folder / "tokenizer.model")


def test_the_splits_together_are_all_documents_once(folder: Path) -> None:
    shards = TokenShards.open(folder)
    for name in ("train", "validation", "test"):
        documents = shards.split(name)
        expected = [entry for entry in ROWS if entry.split == name]
        assert documents.ids == [entry.id for entry in expected]
        assert documents.lengths.tolist() == [len(entry.tokens) for entry in expected]
        for index, entry in enumerate(expected):
            assert documents.tokens(index).tolist() == entry.tokens.tolist()
    with pytest.raises(BadInput, match="'dev'"):
        shards.split("dev")


def test_a_stretch_of_tokens_is_a_view_of_the_file_and_ends_with_its_document(folder: Path) -> None:
    documents = TokenShards.open(folder).split("all")
    assert documents.tokens(2, 10, 5).tolist() == list(range(2010, 2015))
    assert documents.tokens(2, 698, 5).tolist() == [2698, 2699]
    assert documents.tokens(2, 700).tolist() == documents.tokens(2, 900, 3).tolist() == []
    view = documents.tokens(2, 10, 5)
    assert np.shares_memory(view, documents.tokens(2))
    assert not view.flags.owndata
    assert not view.flags.writeable


def test_a_shard_of_several_batches_reads_like_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_shards, "_BATCH_TOKENS", 20)
    write_shard(tmp_path / "many.arrow", ROWS, 10000)
    documents = open_documents([tmp_path / "many.arrow"])
    assert len(documents._batches) > 2
    assert documents.ids == [entry.id for entry in ROWS]
    assert [documents.tokens(index).tolist() for index in range(len(ROWS))] == [entry.tokens.tolist() for entry in ROWS]


def test_the_documents_of_many_batches_stay_in_order_in_every_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_shards, "_BATCH_TOKENS", 20)
    rows = [row(number, number % 7) for number in range(60)]
    names = ("a.arrow", "b.arrow", "c.arrow")
    folder = finished_folder(tmp_path, dict(zip(names, (rows[:40], [], rows[40:]), strict=True)), {"c.arrow": "code"})
    shards = TokenShards.open(folder)
    for split in ("train", "validation", "test", "all"):
        documents = shards.split(split)
        expected = [number for number in range(60) if split in ("all", rows[number].split)]
        assert documents.ids == [f"doc {number}" for number in expected]
        assert documents.words.tolist() == documents.lengths.tolist() == [number % 7 for number in expected]
        assert documents.bytes.tolist() == [3 * (number % 7) for number in expected]
        assert documents.corpus_of.tolist() == [int(number >= 40) for number in expected]
        assert documents.corpora == ("", "code")
        assert [documents.tokens(index).tolist() for index in range(len(documents))] == [
            rows[number].tokens.tolist() for number in expected
        ]


def test_a_shard_without_documents_can_be_read(tmp_path: Path) -> None:
    assert write_shard(tmp_path / "none.arrow", [], 100).documents == 0
    documents = open_documents([tmp_path / "none.arrow"])
    assert (len(documents), documents.ids, documents.lengths.tolist()) == (0, [], [])


def test_tokens_take_two_bytes_up_to_a_vocabulary_of_65536(tmp_path: Path) -> None:
    assert (token_type(65536), token_type(65537)) == (np.uint16, np.uint32)
    for vocab_size, largest in ((65536, 65535), (65537, 65536)):
        last = ShardRow("id", "source", "train", 1, 1, np.array([0, largest], np.int32))
        write_shard(tmp_path / "wide.arrow", [last], vocab_size)
        tokens = open_documents([tmp_path / "wide.arrow"]).tokens(0)
        assert tokens.tolist() == [0, largest]
        assert tokens.dtype == token_type(vocab_size)


def test_the_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    first = write_shard(tmp_path / "first.arrow", ROWS, 10000)
    second = write_shard(tmp_path / "second.arrow", iter(ROWS), 10000)
    assert (first.hash, first.size, first.documents, first.tokens) == (second.hash, second.size, 7, 747)
    assert (tmp_path / "first.arrow").read_bytes() == (tmp_path / "second.arrow").read_bytes()


def test_a_failure_while_writing_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "shard.arrow").write_bytes(b"earlier")

    def rows() -> Iterator[ShardRow]:
        yield ROWS[0]
        raise BadInput("in the middle")

    with pytest.raises(BadInput, match="in the middle"):
        write_shard(tmp_path / "shard.arrow", rows(), 10000)
    assert [path.name for path in tmp_path.iterdir()] == ["shard.arrow"]
    assert (tmp_path / "shard.arrow").read_bytes() == b"earlier"


@pytest.mark.parametrize("verify", ["full", "size"])
def test_a_truncated_shard_is_named_with_both_sizes(folder: Path, verify: str) -> None:
    size = (folder / "b.arrow").stat().st_size
    os.truncate(folder / "b.arrow", size - 8)
    with pytest.raises(BadInput, match=rf"b\.arrow is truncated: expected {size} bytes, found {size - 8}"):
        TokenShards.open(folder, verify=verify)


@pytest.mark.parametrize("name", ["a.arrow", "tokenizer.model"])
def test_one_flipped_bit_in_a_file_of_the_right_size_is_noticed(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(BadInput, match=rf"{name} was altered: expected hash [0-9a-f]+, found [0-9a-f]+"):
        TokenShards.open(folder)
    TokenShards.open(folder, verify="size")


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "b.arrow").unlink()
    with pytest.raises(BadInput, match=r"b\.arrow is missing"):
        TokenShards.open(folder)
    with pytest.raises(BadInput, match=r"b\.arrow is missing"):
        TokenShards.open(folder, verify="none")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"manifest\.json does not exist"),
        (
            b"{half",
            r"manifest\.json cannot be read as a manifest: .*\(remove the folder .* and run `brt prepare` again",
        ),
        (b"[" * 10**6, r"manifest\.json cannot be read as a manifest"),
        (b"\xff\xfe", r"manifest\.json cannot be read as a manifest"),
        (b"[1]", r"not a manifest of format 1: found 'list'"),
        (b'{"format": 99}', r"not a manifest of format 1: found 99"),
        (b'{"format": 1, "shards": []}', r"manifest\.json is not a whole manifest: it has no 'hash' \(remove"),
    ],
)
def test_a_folder_without_a_manifest_of_ours_is_bad_input(folder: Path, content: bytes | None, message: str) -> None:
    (folder / "manifest.json").unlink()
    if content is not None:
        (folder / "manifest.json").write_bytes(content)
    with pytest.raises(BadInput, match=message):
        TokenShards.open(folder)


def drop_last_shard(manifest: dict[str, Any]) -> None:
    manifest["documents"] -= manifest["shards"].pop()["documents"]


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "file": (lambda manifest: manifest["shards"][0].update(file=3), r"'shards\[0\]\.file' must be text, found 3"),
    "size": (lambda manifest: manifest["shards"][1].update(size="x"), r"'shards\[1\]\.size' must be a whole number"),
    "negative": (lambda manifest: manifest["shards"][1].update(size=-1), r"'shards\[1\]\.size' must be a whole number"),
    "corpus": (lambda manifest: manifest["shards"][0].update(corpus=5), r"'shards\[0\]\.corpus' must be text, found 5"),
    "pieces": (
        lambda manifest: manifest["shards"][0].update(pieces=5),
        r"'shards\[0\]\.pieces' must be a list, found 5",
    ),
    "splits": (lambda manifest: manifest.update(splits=5), r"'splits' must be an object, found 5"),
    "sources": (lambda manifest: manifest.update(sources=5), r"'sources' must be a list, found 5"),
    "eos": (lambda manifest: manifest["tokenizer"].update(eos="a"), r"'tokenizer\.eos' must be a whole number"),
    "far eos": (
        lambda manifest: manifest["tokenizer"].update(eos=10000),
        r"'tokenizer\.eos' is 10000, outside a vocabulary",
    ),
    "vocab_size": (lambda manifest: manifest.update(vocab_size="10000"), r"'vocab_size' must be .*, found '10000'"),
    "documents": (lambda manifest: manifest.pop("documents"), r"'documents' must be a whole number, found None"),
    "tokenizer": (lambda manifest: manifest.update(tokenizer=[]), r"'tokenizer' must be an object"),
    "shards": (lambda manifest: manifest.update(shards={"a": 1}), r"'shards' must be a list of objects"),
    "other eos": (lambda manifest: manifest["tokenizer"].update(eos=5), ""),
    "last shard": (drop_last_shard, ""),
}


@pytest.mark.parametrize("verify", ["full", "none"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_changed_by_hand_is_refused_with_both_hashes(folder: Path, change: str, verify: str) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    written = manifest["hash"]
    CHANGES[change][0](manifest)
    write_json(path, manifest)
    message = f"manifest.json was altered: its hash is {manifest_hash(manifest)} and should be {written} (remove"
    with pytest.raises(BadInput, match=re.escape(message)):
        TokenShards.open(folder, verify=verify)


@pytest.mark.parametrize("change", [name for name, (_, message) in CHANGES.items() if message])
def test_a_manifest_with_entries_of_another_type_is_one_line(folder: Path, change: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    CHANGES[change][0](manifest)
    seal(folder, manifest)
    with pytest.raises(BadInput, match=rf"manifest\.json is not a whole manifest: {CHANGES[change][1]}"):
        TokenShards.open(folder)


def test_the_hash_of_a_manifest_depends_on_what_it_says_and_not_on_how_it_is_laid_out(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(dict(reversed(manifest.items()))))
    assert len(TokenShards.open(folder).split("all")) == len(ROWS)


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing"])
def test_the_advice_for_a_damaged_shard_is_true_with_and_without_the_ledger(folder: Path, damage: str) -> None:
    content = (folder / "b.arrow").read_bytes()
    if damage == "missing":
        (folder / "b.arrow").unlink()
    else:
        (folder / "b.arrow").write_bytes(content[:-1] + bytes([content[-1] ^ 1]) * (damage == "altered"))
    with pytest.raises(BadInput, match=rf"{damage}.*\(remove the folder .* and run `brt prepare` again\)"):
        TokenShards.open(folder)
    (folder / "units.jsonl").write_text("{}")
    with pytest.raises(BadInput, match=rf"{damage}.*\(`brt prepare` writes it again\)"):
        TokenShards.open(folder)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_names_the_shard(tmp_path: Path) -> None:
    (tmp_path / f".shard.arrow.{os.getpid()}.part").symlink_to("/dev/full")
    with pytest.raises(BadInput, match=r"shard\.arrow cannot be written: No space left on device"):
        write_shard(tmp_path / "shard.arrow", ROWS, 10000)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_arrow_file_is_named_even_when_nothing_is_verified(folder: Path) -> None:
    (folder / "a.arrow").write_bytes(b"something else altogether")
    with pytest.raises(BadInput, match=r"a\.arrow cannot be read"):
        TokenShards.open(folder, verify="none")


def test_an_arrow_file_of_other_columns_is_named(folder: Path) -> None:
    table = pa.table({"text": ["a", "b"]})
    with pa.ipc.new_file(str(folder / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(BadInput, match=r"a\.arrow cannot be read: its columns are .*text: string"):
        TokenShards.open(folder, verify="none")


def test_shards_without_a_tokenizer_have_no_path_to_one(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tokenizer"]["file"] = None
    seal(folder, manifest)
    (folder / "tokenizer.model").unlink()
    shards = TokenShards.open(folder)
    assert (shards.eos, len(shards.split("all"))) == (1, len(ROWS))
    with pytest.raises(BadInput, match="were imported without a tokenizer"):
        _ = shards.tokenizer_path
    del manifest["tokenizer"]["file"]
    seal(folder, manifest)
    with pytest.raises(BadInput, match=r"'tokenizer\.file' must be text, found None"):
        TokenShards.open(folder)


def test_a_list_that_lies_beside_the_manifest_is_verified_with_the_shards(folder: Path) -> None:
    (folder / "sources.jsonl").write_text("{}\n")
    entry = {"file": "sources.jsonl", "hash": file_hash(folder / "sources.jsonl"), "entries": len(ROWS)}
    manifest = {**json.loads((folder / "manifest.json").read_text()), "sources": entry}
    seal(folder, manifest)
    TokenShards.open(folder)
    (folder / "sources.jsonl").write_text("[]\n")
    with pytest.raises(BadInput, match=r"sources\.jsonl was altered"):
        TokenShards.open(folder)


def test_checked_hashes_are_remembered_until_a_file_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return file_hash(path)

    monkeypatch.setattr(token_shards, "file_hash", counting)
    memory = folder / "memory" / "verified.json"
    TokenShards.open(folder, memory=memory)
    assert sorted(hashed) == ["a.arrow", "b.arrow", "tokenizer.model"]
    TokenShards.open(folder, memory=memory)
    assert len(hashed) == 3
    content = bytearray((folder / "b.arrow").read_bytes())
    content[-100] ^= 1
    (folder / "b.arrow").write_bytes(content)
    os.utime(folder / "b.arrow", ns=(0, 1))
    with pytest.raises(BadInput, match=r"b\.arrow was altered"):
        TokenShards.open(folder, memory=memory)


def test_a_spoilt_memory_costs_nothing_but_time(folder: Path) -> None:
    (folder / "verified.json").write_text("{half")
    TokenShards.open(folder, memory=folder / "verified.json")
    assert len(json.loads((folder / "verified.json").read_text())) == 3


def test_the_hash_of_the_shards_depends_on_the_tokenizer_and_on_every_shard(folder: Path) -> None:
    before = TokenShards.open(folder).hash
    manifest = json.loads((folder / "manifest.json").read_text())
    found = {before}
    for entry in (manifest["tokenizer"], *manifest["shards"]):
        kept, entry["hash"] = entry["hash"], "0" * 32
        seal(folder, manifest)
        found.add(TokenShards.open(folder, verify="size").hash)
        entry["hash"] = kept
    assert len(found) == 4
