"""Whatever is wrong in a shard folder is found, and where the bytes that are wrong begin and end."""

from __future__ import annotations

import os
import re
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from shard_folders import EOS, VOCAB, finished_folder, read, row, seal

from brt_dist.cli import main
from brt_dist.data import check
from brt_dist.data.check import check_shards
from brt_dist.data.errors import BadInput
from brt_dist.data.token_shards import PIECE_BYTES, file_hashes

SMALL = {
    "a.arrow": [row("one", range(10, 15)), row("two", [], "test"), row("three", [40] * 700, "validation")],
    "b.arrow": [row("four", [7, VOCAB - 1, 8]), row("five", [2], "test")],
}
LARGE = "large.arrow"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose only shard takes two whole stretches of hashing and a part of a third."""
    rows = [row(f"document {number}", np.arange(2, 50_002)) for number in range(100)]
    folder = finished_folder(tmp_path_factory.mktemp("large"), {LARGE: rows})
    assert 2 * PIECE_BYTES < (folder / LARGE).stat().st_size < 3 * PIECE_BYTES
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return finished_folder(tmp_path / "small", SMALL)


@pytest.fixture
def copy(large: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(large, tmp_path / "copy"))


def flip(path: Path, *places: int) -> None:
    with path.open("r+b") as file:
        for place in places:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1]))


def problem(folder: Path) -> str:
    with pytest.raises(BadInput) as caught:
        check_shards(folder)
    return str(caught.value)


def test_a_sound_folder_is_counted(small: Path, large: Path) -> None:
    checked = check_shards(small)
    size = sum(path.stat().st_size for path in small.iterdir())
    assert (checked.files, checked.documents, checked.tokens, checked.bytes) == (4, 5, 709, size)
    assert check_shards(large).tokens == 5_000_000


@pytest.mark.parametrize("place", [0, PIECE_BYTES - 1, PIECE_BYTES, 2 * PIECE_BYTES, -1])
def test_a_flipped_bit_is_found_in_its_stretch_of_the_file(copy: Path, place: int) -> None:
    size = (copy / LARGE).stat().st_size
    place %= size
    flip(copy / LARGE, *{place, size - 1})
    first = place // PIECE_BYTES * PIECE_BYTES
    last = min(first + PIECE_BYTES, size) - 1
    assert f"{copy / LARGE} was altered: bytes {first} to {last} are not those that were written (" in problem(copy)


def test_without_hashes_of_stretches_the_whole_file_is_named(copy: Path) -> None:
    manifest = read(copy)
    for entry in manifest["shards"]:
        del entry["pieces"]
    seal(copy, manifest)
    check_shards(copy)
    size = (copy / LARGE).stat().st_size
    flip(copy / LARGE, PIECE_BYTES)
    assert f"{LARGE} was altered: somewhere in bytes 0 to {size - 1} (expected hash" in problem(copy)


@pytest.mark.parametrize("kept", [0, 5, PIECE_BYTES, PIECE_BYTES + 1, -1])
def test_a_truncated_file_is_named_with_the_bytes_that_are_missing(copy: Path, kept: int) -> None:
    size = (copy / LARGE).stat().st_size
    os.truncate(copy / LARGE, kept % size)
    assert f"{LARGE} is truncated: bytes {kept % size} to {size - 1} are missing (" in problem(copy)


def test_in_a_truncated_file_an_altered_stretch_before_the_end_comes_first(copy: Path) -> None:
    os.truncate(copy / LARGE, PIECE_BYTES + 10)
    flip(copy / LARGE, 3)
    assert f"{LARGE} was altered: bytes 0 to {PIECE_BYTES - 1} are" in problem(copy)


def test_bytes_behind_the_end_of_a_file_are_named(copy: Path) -> None:
    size = (copy / LARGE).stat().st_size
    with (copy / LARGE).open("ab") as file:
        file.write(b"more")
    assert f"{LARGE} is too long: bytes {size} to {size + 3} do not belong to it (" in problem(copy)


@pytest.mark.parametrize("name", ["a.arrow", "b.arrow", "tokenizer.model"])
def test_a_missing_file_is_named(small: Path, name: str) -> None:
    (small / name).unlink()
    assert f"{small / name} is missing" in problem(small)


def test_an_altered_tokenizer_is_named(small: Path) -> None:
    (small / "tokenizer.model").write_bytes(b"madel")
    assert "tokenizer.model was altered: somewhere in bytes 0 to 4" in problem(small)


def test_a_list_that_lies_beside_the_manifest_is_checked_too(small: Path) -> None:
    (small / "sources.json").write_text("[1, 2, 3, 4, 5]")
    digest, _ = file_hashes(small / "sources.json")
    seal(small, {**read(small), "sources": {"file": "sources.json", "hash": digest, "entries": 5}})
    assert check_shards(small).files == 5
    (small / "sources.json").write_text("[1, 2, 3, 4, 6]")
    assert "sources.json was altered" in problem(small)
    (small / "sources.json").unlink()
    assert "sources.json is missing" in problem(small)


@pytest.mark.parametrize("vocab_size", [VOCAB, 70_000])
@pytest.mark.parametrize("place", [0, 1, 2_000_000])
def test_an_id_outside_the_vocabulary_is_named_with_its_document_and_its_bytes(
    tmp_path: Path, vocab_size: int, place: int
) -> None:
    tokens = np.full(2_000_001, 5)
    tokens[place] = wrong = vocab_size - 3
    rows = [row("sound", [4, 5]), row("none", []), row("broken", tokens), row("later", [wrong])]
    folder = finished_folder(tmp_path, {LARGE: rows}, vocab_size=vocab_size)
    check_shards(folder)
    seal(folder, {**read(folder), "vocab_size": wrong})
    found = re.search(
        rf"bytes (\d+) to (\d+) \(token {place} of document 'broken'\) hold the id {wrong}, ", problem(folder)
    )
    assert found is not None
    first, last = int(found[1]), int(found[2])
    assert int.from_bytes((folder / LARGE).read_bytes()[first : last + 1], "little") == wrong
    assert last + 1 - first == (2 if vocab_size == VOCAB else 4)


def test_the_end_of_a_document_inside_a_document_is_named(tmp_path: Path) -> None:
    folder = finished_folder(tmp_path, {"a.arrow": [row("sound", [4, 5]), row("two", [6, 7, EOS, 8])]})
    assert f"(token 2 of document 'two') hold the id {EOS}, the end of a document" in problem(folder)


@pytest.mark.parametrize("other", ["a.arrow", "b.arrow"])
def test_two_documents_of_one_id_are_named(tmp_path: Path, other: str) -> None:
    shards = {name: list(rows) for name, rows in SMALL.items()}
    shards[other].append(row("one", [9]))
    folder = finished_folder(tmp_path, shards)
    assert problem(folder) == f"two documents have the id 'one': in a.arrow and {other}"


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest["shards"][1].update(documents=3), "counts 3 documents for 'b.arrow', found 2"),
        (lambda manifest: manifest["shards"][0].update(tokens=9), "counts 9 tokens for 'a.arrow', found 705"),
        (lambda manifest: manifest.update(documents=6), "counts 6 documents for all shards, found 5"),
        (lambda manifest: manifest.update(tokens=710), "counts 710 tokens for all shards, found 709"),
        (lambda manifest: manifest.update(bytes=1), "counts 1 bytes for all shards, found 2127"),
        (lambda manifest: manifest["splits"]["test"].update(tokens=2), "counts 2 tokens for split test, found 1"),
        (lambda manifest: manifest["splits"]["train"].update(bytes=2), "counts 2 bytes for split train, found 24"),
        (lambda manifest: manifest["splits"].update(test=5), "says 5 of split test, which are no counts"),
        (lambda manifest: manifest["shards"][0].update(corpus="books"), "counts 5 documents for the corpus, found 2"),
        (lambda manifest: manifest["corpora"][""].update(tokens=2), "counts 2 tokens for the corpus, found 709"),
        (lambda manifest: manifest["corpora"].update(code={"bytes": 7}), "counts 7 bytes for corpus 'code', found 0"),
        (lambda manifest: manifest.update(sources={}), "lists None sources, its shards hold 5 documents"),
        (lambda manifest: manifest.update(sources=[{}] * 4), "lists 4 sources, its shards hold 5 documents"),
    ],
)
def test_counts_that_do_not_agree_are_named(small: Path, change: Change, message: str) -> None:
    manifest = read(small)
    manifest["corpora"] = {"": {key: manifest[key] for key in ("documents", "tokens", "bytes")}}
    seal(small, manifest)
    check_shards(small)
    change(manifest)
    seal(small, manifest)
    assert f"manifest.json {message}" in problem(small)


def test_a_split_of_another_name_is_found(tmp_path: Path) -> None:
    folder = finished_folder(tmp_path, {"a.arrow": [row("one", [4]), row("two", [5], "dev")]})
    assert "a.arrow has 1 documents in none of the splits train, validation, test" in problem(folder)


def rewrite(folder: Path, name: str, batch: pa.RecordBatch) -> None:
    """Put another table in the place of a shard, and its hash into the manifest."""
    with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    digest, pieces = file_hashes(folder / name)
    manifest = read(folder)
    entry = next(entry for entry in manifest["shards"] if entry["file"] == name)
    entry.update(hash=digest, pieces=pieces, size=(folder / name).stat().st_size)
    seal(folder, manifest)


def test_a_shard_whose_table_does_not_hold_together_is_found(small: Path) -> None:
    with pa.ipc.open_file(str(small / "b.arrow")) as reader:
        batch = reader.get_batch(0)
    tokens = pa.array([7, 8, 9], pa.uint16())
    missing = batch.set_column(0, "id", pa.array(["four", None], pa.string()))
    rewrite(small, "b.arrow", missing)
    assert "b.arrow does not hold together: a value is missing" in problem(small)
    offsets = pa.array([0, 5, 3], pa.int64())
    crossed = batch.set_column(5, "tokens", pa.LargeListArray.from_arrays(offsets, tokens))
    rewrite(small, "b.arrow", crossed)
    assert "b.arrow does not hold together: " in problem(small)
    rewrite(small, "b.arrow", batch.select(["id", "split", "tokens"]))
    assert "b.arrow cannot be read: its columns are " in problem(small)


def test_memory_does_not_grow_with_a_shard(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read(copy)
    del manifest["shards"][0]["pieces"]
    seal(copy, manifest)
    check_shards(copy)
    monkeypatch.setattr(check, "PIECE_BYTES", 1 << 16)
    monkeypatch.setattr(check, "_AT_ONCE", 1 << 16)
    tracemalloc.start()
    try:
        check_shards(copy)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (copy / LARGE).stat().st_size / 20


def test_the_command_ends_with_one_line_and_status_2_or_0(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(small)]) == 0
    shown = capsys.readouterr()
    assert re.fullmatch(rf"{small} is whole: 4 files, 5 documents, 709 tokens, [\d,]+ bytes, [\d.]+ s\n", shown.out)
    assert shown.err == ""
    flip(small / "b.arrow", 100)
    assert main(["data", "check", str(small)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"brt: {small / 'b.arrow'} was altered: bytes 0 to ")
    assert shown.err.count("\n") == 1
