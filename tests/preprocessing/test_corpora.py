"""Several corpora, units and their numbers, books by split, and corpora that fsspec opens."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_files import EVERYTHING, LENIENT, contents, left_out, listed, read_all
from pyarrow import ipc

from brt_dist.data.errors import BadInput
from preprocessing import walk
from preprocessing.config import CorpusConfig, DocumentsConfig
from preprocessing.corpora import default_unit_bytes, list_units, read_unit
from preprocessing.documents import Document
from preprocessing.units import Part, Units


def write_tree(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


TREE = {
    "a/b/c.py": b"first\n",
    "a/a.py": b"A\r\n",
    "a/z.py": b"last",
    "a-b/x.py": b"x",
    "top.py": b"top\0",
    "b/no.txt": b"-",
}


@pytest.mark.parametrize("unit_bytes", [1, EVERYTHING])
def test_the_files_directly_in_a_folder_are_one_document(tmp_path: Path, unit_bytes: int) -> None:
    corpus = CorpusConfig(path=str(write_tree(tmp_path, TREE) / "**/*.py"), group="folder")
    expected = {".": b"top\0", "a": b"A\r\nlast", "a/b": b"first\n", "a-b": b"x"}
    assert list(contents(corpus, unit_bytes).items()) == list(expected.items())


def test_bytes_go_through_unchanged_and_an_empty_file_is_an_empty_document(tmp_path: Path) -> None:
    texts = {
        "a": "\u2581x\u2581".encode(),
        "b": b"a\r\nb\n\r",
        "c": b"\0a\0",
        "d": b"",
        "e": b"\xef\xbb\xbfbom",
        "f": b"\xff",
    }
    assert contents(CorpusConfig(path=str(write_tree(tmp_path, texts)))) == texts
    lines = b"".join(
        json.dumps({"id": name, "text": text.decode()}).encode() + b"\r\n"
        for name, text in texts.items()
        if name != "f"
    )
    (tmp_path / "lines.jsonl").write_bytes(lines)
    del texts["f"]
    assert contents(CorpusConfig(reader="jsonl", path=str(tmp_path))) == texts


@pytest.mark.parametrize("group", ["file", "folder", "top"])
def test_a_document_of_files_that_is_too_long_is_left_out_unread(tmp_path: Path, group: str) -> None:
    write_tree(tmp_path, {"a/1": b"12345", "a/2": b"6789", "b": b"x"})
    corpus = CorpusConfig(path=str(tmp_path), group=group)
    long = {"file": ["a/1"], "folder": ["a"], "top": ["a"]}[group]
    policy = DocumentsConfig(max_bytes=4, too_long="skip")
    units = listed(corpus)
    (tmp_path / "a/1").unlink()
    found = [one for unit in units for one in read_unit({"": corpus}, unit, policy)]
    assert [(one.id, getattr(one, "why", "")) for one in found if not isinstance(one, Document)] == [
        (long[0], "too_long")
    ]
    assert [one.reached for one in found][-1] == 10
    with pytest.raises(
        BadInput, match=rf"{long[0]}: [59] bytes, more than the 4 of documents\.max_bytes .*too_long: skip"
    ):
        list(read_unit({"": corpus}, units[0], DocumentsConfig(max_bytes=4)))


def test_units_never_hold_two_corpora_and_ids_begin_with_the_name_of_theirs(tmp_path: Path) -> None:
    write_tree(tmp_path, {"one/a.txt": b"a", "two/a.txt": b"b", "three/bad.jsonl": b'{"text": "x"}\n{\n'})
    corpora = {name: CorpusConfig(path=str(tmp_path / name)) for name in ("two", "one")}
    corpora["three"] = CorpusConfig(reader="jsonl", path=str(tmp_path / "three"))
    units = list_units(corpora, EVERYTHING)
    assert [(unit.number, unit.corpus) for unit in units] == [(0, "two"), (1, "one"), (2, "three")]
    assert (units.sizes, units.size) == ({"two": 1, "one": 1, "three": 16}, 18)
    found = [one for unit in units for one in read_unit(corpora, unit, LENIENT)]
    assert [one.id for one in found] == ["two/a.txt", "one/a.txt", "three/bad.jsonl@0", "three/bad.jsonl@14"]
    assert [one.reached for one in found] == [1, 1, 14, 16]


def test_the_size_of_a_unit_follows_from_that_of_all_corpora(tmp_path: Path) -> None:
    assert [default_unit_bytes(size) for size in (10, 10**8, 10**12)] == [2_000_000, 3_125_000, 64_000_000]
    write_tree(tmp_path, {f"{corpus}/{number}": b"x" * 500_000 for corpus in "ab" for number in range(8)})
    corpora = {name: CorpusConfig(path=str(tmp_path / name)) for name in "ab"}
    assert [unit.size for unit in list_units(corpora, None)] == [2_000_000] * 4


def test_units_are_the_same_however_they_are_asked_for_and_sent(tmp_path: Path) -> None:
    units = listed(CorpusConfig(path=str(write_tree(tmp_path, TREE))), 5)
    assert list(units) == [units[number] for number in range(len(units))] == units[:]
    assert list(pickle.loads(pickle.dumps(units))) == list(units)
    assert units[-1] == list(units)[-1]
    assert [units.size_of(number) for number in range(len(units))] == [unit.size for unit in units]
    assert pickle.loads(pickle.dumps(units)).fingerprint() == units.fingerprint()
    with pytest.raises(IndexError):
        units[len(units)]


def test_units_of_many_files_take_few_bytes_each() -> None:
    count = 100_000
    parts = (
        Part(name := f"data/folder-{n // 1000:05d}/file-{n:08d}.txt", 0, n % 9973, n % 9973, name) for n in range(count)
    )
    units = Units([("", parts)], 64_000_000)
    assert units.fingerprint()["files"] == count
    assert len(pickle.dumps(units)) < 15 * count


def test_the_fingerprint_sees_the_name_of_a_corpus_and_the_borders_of_units() -> None:
    parts = [Part("a", 0, 3, 3, "a"), Part("b", 0, 3, 3, "b")]
    made = [Units([("", parts)], 10), Units([("x", parts)], 10), Units([("", parts)], 1), Units([("", parts[:1])], 10)]
    assert len({units.fingerprint()["hash"] for units in made}) == 4
    assert made[0].fingerprint() | {"hash": ""} == {"files": 2, "bytes": 6, "hash": ""}


def test_a_folder_of_very_many_files_is_read_in_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path, {f"{number % 3}/{number * 7919 % 1000}": b"x" for number in range(300)})
    corpus = CorpusConfig(path=str(tmp_path))
    at_once = list(contents(corpus))
    monkeypatch.setattr(walk, "_SORTED", 16)
    monkeypatch.setattr(walk, "_TOGETHER", 5)
    assert list(contents(corpus)) == at_once == sorted(at_once, key=lambda name: name.split("/"))


BOOKS = {"train/1.txt": b"one", "train/2.txt": b"two", "validation/3.txt": b"three", "test/4.txt": b"four"}


def test_folders_may_lie_deeper_than_calls(tmp_path: Path) -> None:
    folders = [tmp_path / ("d/" * depth) for depth in range(1, sys.getrecursionlimit() + 100)]
    for folder in folders:
        folder.mkdir()
    (folders[-1] / "x.txt").touch()
    (tmp_path / "a.txt").touch()
    try:
        assert list(contents(CorpusConfig(path=str(tmp_path)))) == ["a.txt", "d/" * len(folders) + "x.txt"]
    finally:
        # What clears away the folders of tests would go too deep.
        (folders[-1] / "x.txt").unlink()
        for folder in reversed(folders):
            folder.rmdir()


@pytest.mark.parametrize("unit_bytes", [1, EVERYTHING])
def test_a_book_has_its_split_from_the_folder_and_its_title_from_the_metadata(tmp_path: Path, unit_bytes: int) -> None:
    write_tree(
        tmp_path, {**BOOKS, "metadata.csv": b'1,"One, or none",1850,http://x\n3,Three,,http://y\n', "train/x.md": b"-"}
    )
    corpus = CorpusConfig(reader="pg19", path=str(tmp_path))
    found = {document.id: (document.split, document.source) for document in read_all(corpus, unit_bytes)}
    assert found == {
        "1": ("train", "train/1.txt (One, or none, 1850)"),
        "2": ("train", "train/2.txt"),
        "3": ("validation", "validation/3.txt (Three)"),
        "4": ("test", "test/4.txt"),
    }
    assert set(contents(corpus).values()) == set(BOOKS.values())
    policy = DocumentsConfig(max_bytes=4, too_long="skip")
    assert [one.id for one in left_out(corpus, policy)] == ["3"]


def test_books_need_no_metadata_and_must_lie_in_the_folder_of_a_split(tmp_path: Path) -> None:
    write_tree(tmp_path, BOOKS)
    assert {document.source for document in read_all(CorpusConfig(reader="pg19", path=str(tmp_path)))} == set(BOOKS)
    write_tree(tmp_path, {"other/5.txt": b"five"})
    with pytest.raises(BadInput, match=r"other/5\.txt lies in none of the folders train, validation, test"):
        listed(CorpusConfig(reader="pg19", path=str(tmp_path / "*/*.txt")))


def zipped(path: Path, files: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return f"zip://{{}}::{path}"


def remembered(path: Path, files: dict[str, bytes]) -> str:
    """A URL of fsspec's file system in memory."""
    for name, content in files.items():
        fsspec.filesystem("memory").pipe(f"/{path.name}/{name}", content)
    return f"memory://{path.name}/{{}}"


@pytest.mark.parametrize("make", [zipped, remembered])
@pytest.mark.parametrize("group", ["file", "folder", "top"])
def test_files_that_fsspec_opens_are_those_of_the_same_folder_here(tmp_path: Path, make, group: str) -> None:
    (tmp_path / "here").mkdir()
    write_tree(tmp_path / "here", TREE)
    url = make(tmp_path / f"far-{group}.zip", TREE)
    for glob, exclude in (("", ()), ("**/*.py", ("b",)), ("a/**", ()), ("*/*", ("z*",))):
        said: list[list[str]] = [[], []]
        here = CorpusConfig(path=str(tmp_path / "here" / glob), exclude=exclude, group=group)
        far = CorpusConfig(path=url.format(glob), exclude=exclude, group=group)
        assert list(contents(far, 1).items()) == list(contents(here, 1).items())
        assert listed(far, 7, say=said[0].append).fingerprint() == listed(here, 7, say=said[1].append).fingerprint()
        assert said[0] == said[1]
    assert list(contents(CorpusConfig(path=url.format("a/z.py"))).items()) == [("z.py", b"last")]


def tables() -> dict[str, bytes]:
    table = pa.table({"text": ["é", "b"] * 4, "id": list("abcdefgh")})
    parquet, stream, file = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pq.write_table(table, parquet, row_group_size=3)
    for target, opened in ((stream, ipc.new_stream), (file, ipc.new_file)):
        with opened(target, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    return {"parquet": parquet.getvalue(), "stream": stream.getvalue(), "file": file.getvalue()}


def tarred(name: str, content: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


@pytest.mark.parametrize("make", [zipped, remembered])
@pytest.mark.parametrize("unit_bytes", [1, EVERYTHING])
def test_every_reader_reads_what_fsspec_opens(tmp_path: Path, make, unit_bytes: int) -> None:
    lines = b'{"text": "x", "id": "1"}\n{"text": "y", "id": "2"}\n'
    made = tables()
    state = json.dumps({"_data_files": [{"filename": "d.arrow"}]}).encode()
    rows = {letter: "éb"[number % 2].encode() for number, letter in enumerate("abcdefgh")}
    cases = {
        "jsonl": ({"a.jsonl": lines[:25], "b.jsonl.gz": gzip.compress(lines[25:])}, {"1": b"x", "2": b"y"}),
        "parquet": ({"a.parquet": made["parquet"]}, rows),
        "arrow": ({"a.arrow": made["file"]}, rows),
        "huggingface": ({"d.arrow": made["stream"], "state.json": state}, rows),
        "pg19": (BOOKS, {name[-5]: text for name, text in BOOKS.items()}),
        "arxiv": ({"a.tar": tarred("0001/1.gz", gzip.compress(b"paper"))}, {"1": b"paper"}),
    }
    for reader, (files, expected) in cases.items():
        url = make(tmp_path / f"{reader}{unit_bytes}.zip", files)
        assert contents(CorpusConfig(reader=reader, path=url.format("")), unit_bytes) == expected, reader


def test_a_damaged_zip_is_named_and_nothing_of_it_is_taken_for_a_text(tmp_path: Path) -> None:
    url = zipped(tmp_path / "a.zip", {"a.txt": b"text " * 100})
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[40] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(BadInput, match=r"zip://a\.txt::.*/a\.zip is damaged: "):
        read_all(CorpusConfig(path=url.format("")))
    assert read_all(CorpusConfig(path=url.format("")), policy=LENIENT) == []
    (tmp_path / "b.zip").write_bytes(content[:50])
    with pytest.raises(BadInput, match=r"b\.zip cannot be opened: "):
        listed(CorpusConfig(path=f"zip://::{tmp_path}/b.zip"))


def test_errors_of_a_url_name_it(tmp_path: Path) -> None:
    url = zipped(tmp_path / "a.zip", {"bad.jsonl": b"{"})
    with pytest.raises(BadInput, match=rf"zip://::{tmp_path}/a\.zip: bad\.jsonl line 1: not valid JSON"):
        read_all(CorpusConfig(reader="jsonl", path=url.format("")))
    for path, message in (
        ("memory://nothing-here", "memory://nothing-here does not exist"),
        ("nosuch://x", r"nosuch://x cannot be opened: Protocol not known"),
        (url.format("**/*.txt"), r"no file below zip://::.* matches '\*\*/\*\.txt'"),
        (f"zip://::{tmp_path}/none.zip", "none.zip"),
    ):
        with pytest.raises(BadInput, match=message):
            listed(CorpusConfig(path=path))
