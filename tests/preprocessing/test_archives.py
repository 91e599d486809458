"""arXiv's archives: a paper is one document, and damage loses a paper and no more, by name."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
from pathlib import Path

import pytest
from corpus_files import LENIENT, contents, left_out, listed, read_all

from brt_dist.data.errors import BadInput
from preprocessing.config import CorpusConfig, DocumentsConfig

MANY_FILES = {
    "paper/main.tex": b"main\r\n",
    "paper/a/z.tex": b"z",
    "paper/fig.png": b"\x89PNG",
    "paper/a.ltx": b"a\xe9",
}
PAPERS = {
    "2101/2101.00001.gz": gzip.compress(b"\\documentclass{article}\n"),
    "2101/2101.00002.pdf": b"%PDF-1.4",
    "2101/2101.00003.gz": b"",
    "2101/astro-ph0101004.gz": gzip.compress(b"old"),
    "2101/2101.00005.gz": gzip.compress(b"%PDF-1.4 in disguise"),
    "2101/2101.00006.gz": gzip.compress(bytes(range(256)) * 40),
}
IDS = ["2101.00001", "2101.00003", "astro-ph/0101004", "2101.00006"]


def tarred(files: dict[str, bytes], kind: int = tarfile.GNU_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as archive:
        folder = tarfile.TarInfo("2101")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


PAPERS["2101/2101.00003.gz"] = gzip.compress(tarred(MANY_FILES))


def archive(path: Path, content: bytes | None = None) -> CorpusConfig:
    path.write_bytes(tarred(PAPERS) if content is None else content)
    return CorpusConfig(reader="arxiv", path=str(path))


@pytest.mark.parametrize("unit_bytes", [1, 2000, 10**9])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_each_paper_is_read_once_whatever_the_units(tmp_path: Path, name: str, unit_bytes: int) -> None:
    content = tarred(PAPERS)
    corpus = archive(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    documents = read_all(corpus, unit_bytes)
    assert [document.id for document in documents] == IDS
    assert documents[0].content == b"\\documentclass{article}\n"
    # Joined in path order: folder by folder.
    assert documents[1].content == b"za\xe9main\r\n"
    assert documents[1].place(2) == f"{name}/2101/2101.00003.gz/paper/a.ltx, byte offset 1"
    assert [one.id for one in left_out(corpus)] == ["2101.00002", "2101.00005"]
    assert {one.why for one in left_out(corpus)} == {"not_text"}
    if name == "a.tar":
        assert len(listed(corpus, unit_bytes)) == {1: 7, 2000: 3}.get(unit_bytes, 1)


def test_what_is_reached_grows_to_the_size_of_the_unit(tmp_path: Path) -> None:
    corpus = archive(tmp_path / "a.tar")
    reached = [document.reached for document in read_all(corpus)]
    assert reached == sorted(reached)
    assert 0 < reached[0] < reached[-1] <= listed(corpus).size


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_are_read_in_every_kind_of_tar(tmp_path: Path, kind: int) -> None:
    name = "/".join(["x" * 70, "y" * 80, "2101.00001.gz"])
    longest = name if kind == tarfile.USTAR_FORMAT else "é" * 150 + name
    corpus = archive(tmp_path / "a.tar", tarred({longest: gzip.compress(b"text"), "b.gz": gzip.compress(b"b")}, kind))
    for unit_bytes in (1, 10**9):
        assert contents(corpus, unit_bytes) == {"2101.00001": b"text", "b": b"b"}
        assert read_all(corpus, unit_bytes)[0].source == f"a.tar/{longest}"


@pytest.mark.parametrize("paper", ["2101/2101.00001.gz", "2101/2101.00003.gz", "2101/2101.00006.gz"])
@pytest.mark.parametrize("unit_bytes", [1, 10**9])
def test_a_corrupt_paper_is_named_and_the_others_are_read(tmp_path: Path, paper: str, unit_bytes: int) -> None:
    content = bytearray(tarred(PAPERS))
    at = content.index(PAPERS[paper])
    for end in (12, len(PAPERS[paper]) - 6):
        damaged = bytearray(content)
        damaged[at + end] ^= 0xFF
        corpus = archive(tmp_path / "a.tar", bytes(damaged))
        name = paper[5:-3]
        with pytest.raises(BadInput, match=rf"{tmp_path}/a\.tar/{paper}: damaged gzip data.*documents\.damaged: skip"):
            read_all(corpus, unit_bytes)
        assert list(contents(corpus, unit_bytes, LENIENT)) == [one for one in IDS if one != name]
        assert [one.id for one in left_out(corpus, unit_bytes=unit_bytes) if one.why == "damaged"] == [name]


def test_a_paper_whose_files_are_cut_short_is_damaged(tmp_path: Path) -> None:
    cut = tarred(MANY_FILES)[:1600]
    corpus = archive(tmp_path / "a.tar", tarred({"1.gz": gzip.compress(cut), "2.gz": gzip.compress(b"two")}))
    assert contents(corpus, policy=LENIENT) == {"2": b"two"}
    assert [(one.id, one.why) for one in left_out(corpus)] == [("1", "damaged")]


@pytest.mark.parametrize("unit_bytes", [1, 10**9])
@pytest.mark.parametrize("filling", [b"\7", b"\0"])
def test_behind_a_corrupt_header_reading_goes_on_with_the_next(tmp_path: Path, filling: bytes, unit_bytes: int) -> None:
    content = bytearray(tarred(PAPERS))
    header = content.index(b"2101/astro-ph")
    content[header : header + 512] = filling * 512
    corpus = archive(tmp_path / "a.tar", bytes(content))
    with pytest.raises(
        BadInput, match=rf"a\.tar, bytes {header} to {header + 1024}: .* where a member's header must be"
    ):
        read_all(corpus, unit_bytes)
    assert list(contents(corpus, unit_bytes, LENIENT)) == [one for one in IDS if one != "astro-ph/0101004"]
    assert [one.why for one in left_out(corpus, unit_bytes=unit_bytes)] == ["not_text", "damaged", "not_text"]


@pytest.mark.parametrize("place", ["in a paper", "behind a paper", "in a header"])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_an_archive_cut_short_keeps_what_is_whole(tmp_path: Path, place: str, name: str) -> None:
    content = tarred(PAPERS)
    last = content.index(b"2101/2101.00006")
    stop = {"in a paper": last + 600, "behind a paper": last, "in a header": last + 100}[place]
    content = content[:stop]
    corpus = archive(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(BadInput, match=r"a\.tar.*documents\.damaged: skip"):
        read_all(corpus)
    assert list(contents(corpus, policy=LENIENT)) == IDS[:-1]
    assert left_out(corpus)[-1].why == "damaged"


def test_a_paper_that_is_too_long_is_left_out_or_refused(tmp_path: Path) -> None:
    corpus = archive(tmp_path / "a.tar")
    with pytest.raises(BadInput, match=r"2101\.00006\.gz: more than the 100 bytes of documents\.max_bytes"):
        read_all(corpus, policy=DocumentsConfig(max_bytes=100))
    policy = DocumentsConfig(max_bytes=8, too_long="skip")
    assert list(contents(corpus, policy=policy)) == ["astro-ph/0101004"]
    long = [one.id for one in left_out(corpus, policy) if one.why == "too_long"]
    assert long == ["2101.00001", "2101.00003", "2101.00006"]


def test_the_bytes_that_a_cut_archive_lacks_are_named_in_order(tmp_path: Path) -> None:
    content = tarred(PAPERS)
    cut = content[: content.index(PAPERS["2101/astro-ph0101004.gz"]) + 5]
    lost = left_out(archive(tmp_path / "a.tar", cut))[-1]
    found = re.search(r"bytes (\d+) to (\d+): it ends too early", lost.source)
    assert found is not None
    assert int(found[1]) <= int(found[2])
