"""arXiv's source archives: tar files of papers, each a gzipped TeX file or a gzipped tar of the paper's files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import BinaryIO, cast

from preprocessing.config import CorpusConfig, DocumentsConfig
from preprocessing.documents import Document, LeftOut, printable_name
from preprocessing.readers.compressed import DamagedStreamError, codec_of, decompressed
from preprocessing.readers.tar_members import DamagedTarError, Member, is_header, members, next_header, read_up_to
from preprocessing.storage import Storage
from preprocessing.units import Part
from preprocessing.walk import File

_TEX = (".tex", ".ltx", ".latex")
_PIECE = 1 << 16
_HEADER = 512
# How files begin that are no TeX: papers without sources.
_PAGES = (b"%PDF", b"%!PS")
# Identifiers of before April 2007 are named without their slash in the archives.
_OLD_IDENTIFIER = re.compile(r"([a-z-]+)(\d{7})")


def parts(
    storage: Storage, files: Iterable[File], corpus: CorpusConfig, unit_bytes: int, say: Callable[[str], None]
) -> Iterator[Part]:
    """Ranges of members, about `unit_bytes` of the archive; one that is compressed itself is a single part."""
    for name, size in files:
        first = 0
        if codec_of(name) is None:
            with storage.open(name) as file:
                try:
                    for member in members(file):
                        if member.first - first >= unit_bytes:
                            yield Part(name, first, member.first, member.first - first)
                            first = member.first
                except DamagedTarError:
                    # In the last part: it is counted when that is read.
                    pass
        yield Part(name, first, size, size - first)


def read(
    storage: Storage, parts: Sequence[Part], corpus: CorpusConfig, policy: DocumentsConfig
) -> Iterator[Document | LeftOut]:
    """The papers in a range of members. Damage loses a paper, or what lies between it and the next sound header."""
    (part,) = parts
    shown = printable_name(part.file)
    with storage.open(part.file) as file:
        if codec := codec_of(part.file):
            yield from _read_compressed(decompressed(file, codec), file, shown, part, policy)
            return
        # Behind the last part the mark of the end must stand.
        stop = None if part.stop == storage.size(part.file) else part.stop
        at: int | None = part.first
        while at is not None:
            file.seek(at)
            try:
                for member in members(file, at, stop):
                    yield from _paper(member, shown, policy, min(member.stop, part.stop) - part.first)
                return
            except DamagedTarError as error:
                at = next_header(file, error.at, part.stop)
                end = max(error.at, part.stop) if at is None else at
                lost = f"{shown}, bytes {error.at} to {end}: {error}"
                yield LeftOut(f"{shown}@{error.at}", lost, "damaged", end - part.first)


def _read_compressed(
    stream: BinaryIO, file: BinaryIO, shown: str, part: Part, policy: DocumentsConfig
) -> Iterator[Document | LeftOut]:
    last = 0
    try:
        for member in members(stream):
            yield from _paper(member, shown, policy, min(file.tell(), part.size))
            last = member.stop
    except (DamagedTarError, DamagedStreamError) as error:
        yield LeftOut(f"{shown}@{last}", f"{shown}, from byte {last} of its content on: {error}", "damaged", part.size)


def _paper(member: Member, shown: str, policy: DocumentsConfig, reached: int) -> Iterator[Document | LeftOut]:
    """What a member holds: nothing if it is a folder."""
    if not member.is_file:
        return
    file = printable_name(member.name)
    source = f"{shown}/{file}"
    name = _identifier(file)
    if not file.endswith(".gz"):
        yield LeftOut(name, f"{source}: no TeX source", "not_text", reached)
        return
    try:
        texts = _texts(decompressed(cast(BinaryIO, member), "gzip"), policy.max_bytes)
    except (DamagedStreamError, DamagedTarError) as error:
        yield LeftOut(name, f"{source}: {error}", "damaged", reached)
        return
    size = sum(len(content) for _, content in texts)
    if not texts:
        yield LeftOut(name, f"{source}: no TeX source", "not_text", reached)
    elif size > policy.max_bytes:
        yield LeftOut(
            name, f"{source}: more than the {policy.max_bytes:,} bytes of documents.max_bytes", "too_long", reached
        )
    else:
        starts, start = [], 0
        for text, content in texts:
            starts.append((start, f"{source}/{printable_name(text)}" if text else source))
            start += len(content)
        yield Document(name, source, b"".join(content for _, content in texts), tuple(starts), reached=reached)


def _texts(stream: BinaryIO, most: int) -> list[tuple[str, bytes]]:
    """The TeX files of a paper in path order, or its only one, without a name; no more than just over `most` bytes.

    Nothing if it has none. What the paper's checksum finds wrong is a DamagedStreamError.
    """
    head = stream.read(_HEADER)
    if not is_header(head):
        content = head + stream.read(max(0, most + 1 - len(head)))
        texts = [] if content.startswith(_PAGES) else [("", content)]
    else:
        texts = []
        left = most
        for member in members(cast(BinaryIO, _Again(head, stream)), needs_end=False):
            if member.is_file and member.name.lower().endswith(_TEX) and left >= 0:
                content = read_up_to(member, left + 1)
                texts.append((member.name, content))
                left -= len(content)
        texts.sort(key=lambda text: text[0].split("/"))
    # The checksum stands at the end.
    while stream.read(_PIECE):
        pass
    return texts


class _Again:
    """A stream in front of which stands again what was read of it."""

    def __init__(self, head: bytes, stream: BinaryIO):
        self._head = head
        self._stream = stream

    def read(self, most: int) -> bytes:
        piece, self._head = self._head[:most], self._head[most:]
        return piece or self._stream.read(most)

    def seekable(self) -> bool:
        return False


def _identifier(file: str) -> str:
    """The arXiv identifier of a member."""
    stem = re.sub(r"\.[A-Za-z]+$", "", file.rpartition("/")[2])
    old = _OLD_IDENTIFIER.fullmatch(stem)
    return f"{old[1]}/{old[2]}" if old else stem
