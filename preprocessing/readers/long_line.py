"""JSON lines too long to be held: read in pieces, so that memory follows the text that is wanted and nothing else.

Short strings and all that is no string make the frame of the line, which the ordinary parser reads. A long string is
cut out of it; its pieces are parsed one by one, and kept if it is the text.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

# Characters in one piece of a string. A string that does not end within so many is a long one.
_PIECE = 1 << 20
# Characters of the frame: what is parsed of it takes some twenty times as many bytes.
_FRAME = 1 << 24
# Stands in the frame for a long string, and no writer of JSON puts it into a text.
PLACEHOLDER = "\0long string\0"

_WHOLE_STRINGS = re.compile(r'(?:[^"]*+"[^"\\]*+(?:\\.[^"\\]*+)*+")*+', re.DOTALL)
# Up to the end of the string or to an escape that may go on in the next piece: a surrogate pair is two escapes.
_HIGH = r"\\u[dD][89abAB][0-9a-fA-F]{2}"
_INSIDE = re.compile(
    rf'(?:[^"\\]++|\\[^u]|(?!{_HIGH})\\u[0-9a-fA-F]{{4}}|{_HIGH}(?=.{{6}}|[^"]{{0,5}}"))*+',
    re.DOTALL,
)
_LONGEST_ESCAPES = 12


class LineTooLongError(Exception):
    """The text, or all that is in the line beside it, is longer than it may be. `record` has what stands before it."""

    def __init__(self, reason: str, record: Any):
        super().__init__(reason)
        self.record = record


def read_long_line(
    pieces: Iterator[bytes], text_key: str, max_bytes: int, text_bytes: Callable[[str, bool], bytes]
) -> tuple[Any, bytes | None]:
    """The value of a line, PLACEHOLDER in the place of each long string, and the text if it is one of these.

    `text_bytes` makes bytes of a piece of the text, told whether there are bytes that are not UTF-8. ValueError if it
    is not valid JSON, LineTooLongError if the text has more than `max_bytes` bytes.
    """
    return _LongLine(pieces, text_key, max_bytes, text_bytes).read()


class _LongLine:
    def __init__(
        self, pieces: Iterator[bytes], text_key: str, max_bytes: int, text_bytes: Callable[[str, bool], bytes]
    ):
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text_key = text_key
        self._max_bytes = max_bytes
        self._text_bytes = text_bytes
        self._frame = io.StringIO()
        self._buffer = ""
        self._broken = False
        self._text: bytes | None = None

    def read(self) -> tuple[Any, bytes | None]:
        more = True
        while more or self._buffer:
            whole = _WHOLE_STRINGS.match(self._buffer)
            assert whole is not None
            self._to_frame(whole.end())
            start = self._buffer.find('"')
            if start < 0:
                self._to_frame(len(self._buffer))
            elif len(self._buffer) - start > _PIECE or not more:
                self._to_frame(start + 1)
                self._long_string()
                continue
            more = self._fill()
        value = json.loads(self._frame.getvalue())
        is_text = isinstance(value, dict) and value.get(self._text_key) == PLACEHOLDER
        return value, self._text if is_text else None

    def _to_frame(self, count: int) -> None:
        self._frame.write(self._buffer[:count])
        self._buffer = self._buffer[count:]
        if self._frame.tell() > _FRAME:
            raise LineTooLongError(f"more than {_FRAME:,} characters beside long strings", None)

    def _fill(self) -> bool:
        piece = next(self._pieces, b"")
        decoded = self._decoder.decode(piece, final=not piece)
        self._broken = self._broken or not _is_text(decoded)
        self._buffer += decoded
        return bool(piece)

    def _long_string(self) -> None:
        """Takes a string from behind its opening quote to behind its end; it stays if it is the text."""
        record = self._record_so_far()
        is_text = isinstance(record, dict) and record.get(self._text_key) == PLACEHOLDER
        content: list[bytes] = []
        size = 0
        for piece in self._string_pieces():
            if is_text:
                content.append(self._text_bytes(piece, self._broken))
                size += len(content[-1])
            if size > self._max_bytes:
                raise LineTooLongError(f"more than the {self._max_bytes:,} bytes of documents.max_bytes", record)
        if is_text:
            self._text = b"".join(content)
        self._frame.write(json.dumps(PLACEHOLDER)[1:])

    def _record_so_far(self) -> Any:
        """The line as if it ended behind the string that begins: an object only if that is one of its own values."""
        try:
            return json.loads(f"{self._frame.getvalue()}{json.dumps(PLACEHOLDER)[1:]}}}")
        except ValueError:
            return None

    def _string_pieces(self) -> Iterator[str]:
        while True:
            inside = _INSIDE.match(self._buffer)
            assert inside is not None
            end = inside.end()
            # What the parser does not take, a bad escape say, it is to see and name.
            if bad := end + _LONGEST_ESCAPES < len(self._buffer) and self._buffer[end] != '"':
                end += _LONGEST_ESCAPES
            yield json.loads(f'"{self._buffer[:end]}"')
            if bad:
                raise ValueError("invalid escape")
            self._buffer = self._buffer[end:]
            if self._buffer[:1] == '"':
                self._buffer = self._buffer[1:]
                return
            if not self._fill():
                raise ValueError("a string does not end")


def _is_text(decoded: str) -> bool:
    """Whether no byte of it had to be escaped."""
    try:
        decoded.encode()
    except UnicodeEncodeError:
        return False
    return True
