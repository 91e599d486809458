"""The members of a tar archive, read once from front to back, from a file or from a stream.

The standard library's reader ends at a damaged header as if the archive ended there; here that is an error.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

_BLOCK = 512
_PIECE = 1 << 16
# Headers that say something of the next member, or of all that follow; none is taken for longer than so many bytes.
_SETTINGS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_LONGEST = 1 << 20


class DamagedTarError(Exception):
    """The archive cannot be read on from byte `at`."""

    def __init__(self, at: int, reason: str):
        super().__init__(reason)
        self.at = at


@dataclass
class Member:
    """A member of an archive, whose content stands next in the archive's stream.

    `first` is the byte at which its headers begin, `stop` that behind its content and padding.
    """

    name: str
    is_file: bool
    size: int
    first: int
    stop: int
    stream: BinaryIO
    left: int

    def read(self, most: int) -> bytes:
        """Some of the bytes not yet read, at most `most`; b"" at the end. DamagedTarError if the archive ends first."""
        if not (wanted := min(most, self.left)):
            return b""
        piece = self.stream.read(wanted)
        if not piece:
            raise DamagedTarError(self.first, "it ends in the middle of a member")
        self.left -= len(piece)
        return piece


def members(stream: BinaryIO, at: int = 0, stop: int | None = None, *, needs_end: bool = True) -> Iterator[Member]:
    """The members whose headers begin in bytes `at`, where `stream` stands, to `stop` or the end of the archive.

    What of a member is not read is passed over. DamagedTarError where a header cannot be read, and with `needs_end`
    also where the archive lacks its mark of the end.
    """
    while stop is None or at < stop:
        block = read_up_to(stream, _BLOCK)
        if not block.strip(b"\0") and (block or not needs_end):
            # Two blocks of zeros are the mark of the end, but they may also be all that is left of a member.
            if needs_end and stream.seekable() and next_header(stream, at) is not None:
                raise DamagedTarError(at, "zeros, where a member's header must be")
            return
        first, settings = at, _Settings()
        while (header := _header(block, first)).type in _SETTINGS:
            content = read_up_to(stream, _padded(min(header.size, _LONGEST)))
            settings.take(header, content[: header.size])
            at += _BLOCK + len(content)
            block = read_up_to(stream, _BLOCK)
        size = settings.size if settings.size is not None else header.size
        size = size if header.isreg() or header.type not in tarfile.SUPPORTED_TYPES else 0
        at += _BLOCK + _padded(size)
        member = Member(settings.name or header.name, header.isreg(), size, first, at, stream, size)
        yield member
        if stream.seekable():
            stream.seek(at)
        else:
            while member.read(_PIECE):
                pass
            read_up_to(stream, _padded(size) - size)


def next_header(stream: BinaryIO, at: int, stop: int | None = None) -> int | None:
    """The first place behind `at` and before `stop` where a header stands; None if there is none."""
    at += _BLOCK
    stream.seek(at)
    while (stop is None or at < stop) and (blocks := read_up_to(stream, _PIECE)):
        for start in range(0, len(blocks), _BLOCK):
            if (stop is None or at + start < stop) and is_header(blocks[start : start + _BLOCK]):
                return at + start
        at += len(blocks)
    return None


def is_header(block: bytes) -> bool:
    """Whether `block` is a tar header, as its checksum tells."""
    try:
        _header(block, 0)
    except DamagedTarError:
        return False
    return True


@dataclass
class _Settings:
    """What extra headers say of the member behind them."""

    name: str | None = None
    size: int | None = None

    def take(self, header: tarfile.TarInfo, content: bytes) -> None:
        if header.type == tarfile.GNUTYPE_LONGNAME:
            self.name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            while content and content.partition(b" ")[0].isdigit():
                length = int(content.partition(b" ")[0])
                key, _, value = content[:length].partition(b" ")[2].rstrip(b"\n").partition(b"=")
                if key == b"path":
                    self.name = value.decode("utf-8", "surrogateescape")
                elif key == b"size" and value.isdigit():
                    self.size = int(value)
                content = content[max(length, 1) :]


def _header(block: bytes, at: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise DamagedTarError(
            at, f"{error}, where a member's header must be" if block else "it ends too early"
        ) from None


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def read_up_to(stream: BinaryIO | Member, count: int) -> bytes:
    """As many bytes as there are, up to `count`: a stream may give them piece by piece."""
    pieces: list[bytes] = []
    while count > 0 and (piece := stream.read(count)):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)
