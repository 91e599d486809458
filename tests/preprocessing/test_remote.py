"""File systems of fsspec that can do less than this machine's: no sizes in listings, no lines, errors of their own."""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from corpus_files import LENIENT, contents, left_out, listed, read_all, read_one
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from brt_dist.data.errors import BadInput
from preprocessing.config import CorpusConfig

LINES = b'{"text": "x", "id": "1"}\n{"text": "y", "id": "2"}\n'
FILES = {"a/one.txt": b"one", "a/two.txt": b"two", "lines.jsonl": LINES, "more.jsonl.gz": gzip.compress(LINES)}


class FarError(Exception):
    """What a file system far away raises, related to no error of this machine."""


class FarFile(AbstractBufferedFile):  # type: ignore[misc]
    def _fetch_range(self, start: int, end: int) -> bytes:
        if self.fs.broken:
            raise FarError("the wire is cut")
        return FILES[self.path][start:end]


class FarSystem(AbstractFileSystem):  # type: ignore[misc]
    """As over HTTP: a folder can be opened too, and is then a page about it."""

    protocol = "far"
    cachable = False
    broken = False
    sizes_known = True

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        path = path.rstrip("/")
        found: dict[str, str] = {}
        for name in FILES:
            if name == path or not path or name.startswith(f"{path}/"):
                below = name[len(path) :].lstrip("/").partition("/")
                found["/".join(filter(None, [path, below[0]]))] = "directory" if below[1] else "file"
        return [{"name": name, "size": None, "type": kind} for name, kind in found.items()]

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        size = len(FILES.get(path, b"a page")) if self.sizes_known else None
        return {"name": path, "size": size, "type": "file"}

    def isdir(self, path: str) -> bool:
        return path not in FILES

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> FarFile:
        return FarFile(self, path, size=len(FILES[path]))


@pytest.fixture(autouse=True)
def far() -> Iterator[type[FarSystem]]:
    fsspec.register_implementation("far", FarSystem, clobber=True)
    yield FarSystem
    FarSystem.broken, FarSystem.sizes_known = False, True


@pytest.mark.parametrize("unit_bytes", [1, 1000])
def test_lines_are_read_from_files_that_have_no_lines_and_no_size_in_a_listing(unit_bytes: int) -> None:
    corpus = CorpusConfig(reader="jsonl", path="far://*.jsonl", id_key="none")
    expected = {"lines.jsonl@0": b"x", "lines.jsonl@25": b"y"}
    assert contents(corpus, unit_bytes) == expected
    corpus = CorpusConfig(reader="jsonl", path="far://*.jsonl.gz", id_key="none")
    assert contents(corpus, unit_bytes) == {f"more.jsonl.gz@{at}": text for at, text in ((0, b"x"), (25, b"y"))}


@pytest.mark.parametrize("path", ["far://a/", "far://a/*.txt"])
def test_the_page_that_lists_a_folder_is_no_document(path: str) -> None:
    assert contents(CorpusConfig(path=path)) == {"one.txt": b"one", "two.txt": b"two"}
    assert contents(CorpusConfig(path="far://a/two.txt")) == {"two.txt": b"two"}


def test_a_file_whose_size_nobody_knows_is_refused_by_name(far: type[FarSystem]) -> None:
    far.sizes_known = False
    for path in ("far://a/", "far://a/one.txt"):
        with pytest.raises(BadInput, match=r"far://a/one\.txt: its size is not known"):
            listed(CorpusConfig(path=path))


@pytest.mark.parametrize("reader", ["files", "jsonl"])
def test_a_failure_far_away_ends_the_run_by_the_name_of_the_file_and_is_no_damage(
    far: type[FarSystem], reader: Any
) -> None:
    far.broken = True
    with pytest.raises(BadInput, match=r"the corpus cannot be read: .* the wire is cut: 'far://"):
        read_all(CorpusConfig(reader=reader, path="far://*.jsonl"), policy=LENIENT)


@pytest.mark.parametrize("group", ["file", "top"])
def test_a_damaged_member_of_a_zip_is_left_out_by_name(tmp_path: Path, group: Any) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for folder in "ab":
            archive.writestr(f"{folder}/x.txt", f"{folder} text")
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(content.replace(b"a text", b"a test"))
    corpus = CorpusConfig(path=f"zip://::{tmp_path}/a.zip", group=group)
    lost = "a/x.txt" if group == "file" else "a"
    assert [(one.id, one.why) for one in left_out(corpus)] == [(lost, "damaged")]
    assert list(contents(corpus, policy=LENIENT).values()) == [b"b text"]
    with pytest.raises(BadInput, match=r"zip://a/x\.txt::.*/a\.zip is damaged: Bad CRC-32"):
        read_all(corpus)


def test_a_damaged_book_in_a_zip_is_left_out_by_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in "12":
            archive.writestr(f"train/{name}.txt", f"book {name}")
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(content.replace(b"book 1", b"book 7"))
    corpus = CorpusConfig(reader="pg19", path=f"zip://::{tmp_path}/a.zip")
    assert [(one.id, one.why) for one in left_out(corpus)] == [("1", "damaged")]
    assert contents(corpus, policy=LENIENT) == {"2": b"book 2"}


def test_an_archive_is_opened_once_for_all_its_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in "abcd":
            archive.writestr(f"{name}.txt", name)
    corpus = CorpusConfig(path=f"zip://::{tmp_path}/a.zip")
    units = listed(corpus, 1)
    made = []
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url, make=fsspec.core.url_to_fs: made.append(url) or make(url))
    documents = [found.id for unit in units for found in read_one(corpus, unit)]
    assert documents == ["a.txt", "b.txt", "c.txt", "d.txt"]
    assert len(made) == 1
