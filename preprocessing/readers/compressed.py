"""Files compressed with gzip or zstd, read as streams, and where such a file is damaged.

Many gzip members or zstd frames may follow one another in a file; together they are one stream.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, Protocol, cast

Codec = Literal["gzip", "zstd"]

_SUFFIXES: dict[str, Codec] = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd"}
_PIECE = 1 << 16
# zlib's number for a gzip header and a window of any size.
_GZIP_HEADER = 31


class DamagedStreamError(Exception):
    """The rest of a stream cannot be had. `suspect`: bytes already read back to which it may have been wrong."""

    def __init__(self, reason: str, suspect: int = 0):
        super().__init__(reason)
        self.suspect = suspect


@dataclass(frozen=True)
class Damage:
    """`good` bytes of the stream can be had unchanged; the damage was found near byte `found_at` of the file."""

    good: int
    found_at: int
    reason: str


class _Source(Protocol):
    def read(self, most: int) -> bytes:
        """At least one byte and at most `most`; b"" at the end. DamagedStreamError where it cannot go on."""

    def position(self) -> int:
        """About how many bytes of the file are used up."""


def codec_of(name: str) -> Codec | None:
    """How a file of this name is compressed."""
    return next((codec for suffix, codec in _SUFFIXES.items() if name.endswith(suffix)), None)


def decompressed(file: BinaryIO, codec: Codec, most: int | None = None) -> BinaryIO:
    """A buffered stream of what `file` holds, from its present position on; reading it may raise DamagedStreamError.

    `most` ends it after so many bytes, and nothing behind them is looked at.
    """
    return cast(BinaryIO, io.BufferedReader(_Stream(_source(file, codec), most), _PIECE))


def find_damage(file: BinaryIO, codec: Codec) -> Damage | None:
    """Read a file to its end and tell what is wrong with it; None for a sound one."""
    good, found = _count(_source(file, codec), _PIECE)
    if found is None:
        return None
    # A call that fails hands out nothing, not even what was sound. So once more, and by single bytes at the end.
    file.seek(0)
    source = _source(file, codec)
    _count(source, _PIECE, good)
    more, again = _count(source, 1)
    assert again is not None
    return Damage(good + more - again.suspect, source.position(), str(again))


def _count(source: _Source, step: int, most: int | None = None) -> tuple[int, DamagedStreamError | None]:
    """How many bytes come, of `most`, and what ends them."""
    count = 0
    try:
        while most is None or count < most:
            piece = source.read(step if most is None else min(step, most - count))
            if not piece:
                break
            count += len(piece)
    except DamagedStreamError as damage:
        return count, damage
    return count, None


def _source(file: BinaryIO, codec: Codec) -> _Source:
    return _Gzip(file) if codec == "gzip" else _Zstd(file)


class _Stream(io.RawIOBase):
    def __init__(self, source: _Source, most: int | None):
        self._source = source
        self._left = most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        wanted = len(buffer) if self._left is None else min(len(buffer), self._left)
        piece = self._source.read(wanted) if wanted else b""
        buffer[: len(piece)] = piece
        if self._left is not None:
            self._left -= len(piece)
        return len(piece)


class _Gzip:
    """zlib compares the checksum of each member; when it differs, anything since the member's start may be wrong."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._input = b""
        self._inflate = zlib.decompressobj(_GZIP_HEADER)
        self._of_member = 0

    def read(self, most: int) -> bytes:
        while True:
            if self._inflate.eof and not self._next_member():
                return b""
            if piece := self._inflated(most):
                self._of_member += len(piece)
                return piece
            if not self._inflate.eof and not self._input and not self._fill():
                raise DamagedStreamError("it ends in the middle of a gzip member")

    def position(self) -> int:
        return self._file.tell() - len(self._input)

    def _inflated(self, most: int) -> bytes:
        try:
            piece = self._inflate.decompress(self._input, most)
        except zlib.error as error:
            differs = "data check" in str(error) or "length check" in str(error)
            raise DamagedStreamError(f"damaged gzip data: {error}", self._of_member if differs else 0) from None
        self._input = self._inflate.unused_data if self._inflate.eof else self._inflate.unconsumed_tail
        return piece

    def _next_member(self) -> bool:
        # Zeros may fill up what stands behind a member.
        while not (rest := self._input.lstrip(b"\0")):
            if not self._fill():
                return False
        self._input = rest
        self._inflate = zlib.decompressobj(_GZIP_HEADER)
        self._of_member = 0
        return True

    def _fill(self) -> bool:
        self._input = self._file.read(_PIECE)
        return bool(self._input)


class _Unclosed:
    """A file that stays open: Arrow would close it with the stream that it makes of it."""

    closed = False

    def __init__(self, file: BinaryIO):
        self.read = file.read

    def close(self) -> None:
        pass


class _Zstd:
    """Arrow compares checksums of frames, but does not tell where a frame begins: then all that was read is suspect."""

    def __init__(self, file: BinaryIO):
        # Here, for a corpus without zstd needs no pyarrow.
        import pyarrow as pa

        self._stream = pa.CompressedInputStream(pa.PythonFile(_Unclosed(file), mode="r"), "zstd")
        self._file = file
        self._failure = pa.ArrowException
        self._count = 0

    def read(self, most: int) -> bytes:
        try:
            piece = bytes(self._stream.read(most))
        except (self._failure, OSError) as error:
            raise DamagedStreamError(
                f"damaged zstd data: {error}", self._count if "checksum" in str(error) else 0
            ) from None
        if not piece and not self._count and not self._file.tell():
            raise DamagedStreamError("it is empty")
        self._count += len(piece)
        return piece

    def position(self) -> int:
        return self._file.tell()
