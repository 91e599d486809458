"""A corpus of JSON Lines files: each line is an object with a document's text, and perhaps its id."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from itertools import chain
from typing import Any, BinaryIO, Literal, cast

from brt_dist.data.errors import BadInput
from preprocessing.config import CorpusConfig, DocumentsConfig
from preprocessing.documents import Document, LeftOut, exceeds, printable_name
from preprocessing.readers.compressed import Codec, Damage, DamagedStreamError, codec_of, decompressed, find_damage
from preprocessing.readers.long_line import PLACEHOLDER, LineTooLongError, read_long_line
from preprocessing.storage import Storage
from preprocessing.units import Part
from preprocessing.walk import File

Why = Literal["damaged", "too_long"]

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Bytes of a line that are parsed at once, and of a piece of a longer one.
_HELD = 1 << 24
_PIECE = 1 << 20
# A compressed file can only be read from its beginning. Each of several slices of it is every so many-th stretch of its
# text, and decompressing it all for a slice costs about a hundredth of encoding it: so there are a few, not many, and
# none of what must be fetched every time.
_SLICES = 4
_STRETCH = 1 << 20


def parts(
    storage: Storage, files: Iterable[File], corpus: CorpusConfig, unit_bytes: int, say: Callable[[str], None]
) -> Iterator[Part]:
    """Byte ranges of about `unit_bytes`, each of whole lines; of a compressed file slice `first` of `stop` slices."""
    for name, size in files:
        if codec_of(name):
            slices = max(1, min(_SLICES, size // unit_bytes)) if storage.path(name) else 1
            for number in range(slices):
                yield Part(name, number, slices, size * (number + 1) // slices - size * number // slices)
            continue
        with storage.open(name) as file:
            first = 0
            while first < size:
                # The byte before the wished end may itself be a newline: then the range ends there.
                file.seek(min(first + unit_bytes, size) - 1)
                while (piece := file.readline(_PIECE)) and not piece.endswith(b"\n"):
                    pass
                stop = file.tell()
                yield Part(name, first, stop, stop - first)
                first = stop


def read(
    storage: Storage, parts: Sequence[Part], corpus: CorpusConfig, policy: DocumentsConfig
) -> Iterator[Document | LeftOut]:
    """The documents of a part. A line without `id_key` gets its file and byte offset as id; blank lines count nothing.

    The offset is that in the text of the file, also if it is compressed. Left out as damaged: a line that is no JSON
    object or whose text is missing or no string, and what cannot be decompressed.
    """
    (part,) = parts
    codec = codec_of(part.file)
    with storage.open(part.file) as file:
        if codec:
            yield from _read_compressed(file, codec, part, corpus, policy)
            return

        def place(line: _Line, why: Why) -> str:
            # To count lines is slow, and worth it once: where the run ends with it.
            if getattr(policy, why) == "fatal":
                return f"line {_line_number(storage, part.file, line.start)}"
            return f"bytes {line.start} to {line.stop}"

        file.seek(part.first)
        end = part.first
        for line in _lines(cast(BinaryIO, BufferedReader(file, _PIECE)), part.first, part.stop):
            if (found := _found(line, part, corpus, policy, place, lambda line: line.stop - part.first)) is not None:
                yield found
            end = line.stop
        if end != part.stop:
            raise BadInput(
                f"{storage.shown(part.file)} changed while it was read: a line ends at byte {end}, not {part.stop}"
            )


def _read_compressed(
    file: BinaryIO, codec: Codec, part: Part, corpus: CorpusConfig, policy: DocumentsConfig
) -> Iterator[Document | LeftOut]:
    """The lines that begin in the part's stretches of the text.

    Where damage is to be left out the file is read twice, for only at the end of it is it known what was sound.
    """

    def is_ours(offset: int) -> bool:
        return offset // _STRETCH % part.stop == part.first

    def reached(_: _Line) -> int:
        return min(file.tell() // part.stop, part.size)

    damage = find_damage(file, codec) if policy.damaged == "skip" else None
    good = damage.good if damage else None
    file.seek(0)
    number, end = 0, 0
    try:
        for line in _lines(decompressed(file, codec, good), 0, good):
            found = None
            if is_ours(line.start):
                found = _found(line, part, corpus, policy, lambda line, _: f"line {line.number}", reached)
            for _ in line.rest or ():
                pass
            if damage is not None and not line.ends:
                break
            if found is not None:
                yield found
            number, end = line.number, line.stop
    except DamagedStreamError as error:
        # Also where the damage was known: the line in which it lies is not had.
        damage = damage or Damage(end, file.tell(), str(error))
    if damage is not None and is_ours(end):
        lost = f"lost from line {number + 1} on (byte {end} of its text, damage found near byte {damage.found_at})"
        shown = printable_name(part.file)
        yield LeftOut(f"{shown}@{end}", f"{shown}: {lost}: {damage.reason}", "damaged", part.size)


@dataclass(slots=True)
class _Line:
    """A line of a file: its number, from 1 at the first that was read, and the bytes that it stands in.

    `held` is its beginning, in most cases all of it; what goes beyond is read from `rest`, as far as anyone wants it,
    and only then is `stop` its end, and `ends` whether a newline stands there.
    """

    number: int
    start: int
    stop: int
    held: bytes
    ends: bool
    rest: Iterator[bytes] | None = None


def _lines(file: BinaryIO, first: int, stop: int | None) -> Iterator[_Line]:
    """The lines from byte `first` on, which is where `file` stands, that begin before `stop` or the end of the file."""
    number, start = 0, first
    while (stop is None or start < stop) and (held := file.readline(_HELD)):
        number += 1
        line = _Line(number, start, start + len(held), held, held.endswith(b"\n"))
        if len(held) == _HELD and not line.ends:
            line.rest = _rest(file, line)
        yield line
        start = line.stop


def _rest(file: BinaryIO, line: _Line) -> Iterator[bytes]:
    piece = b""
    while not piece.endswith(b"\n") and (piece := file.readline(_PIECE)):
        line.stop += len(piece)
        line.ends = piece.endswith(b"\n")
        yield piece


class _RefusedError(Exception):
    """A line that gives no document. `name` is the document's id if it is known."""

    def __init__(self, why: Why, reason: str, name: str | None = None):
        super().__init__(reason)
        self.why = why
        self.name = name


def _found(
    line: _Line,
    part: Part,
    corpus: CorpusConfig,
    policy: DocumentsConfig,
    place: Callable[[_Line, Why], str],
    reached: Callable[[_Line], int],
) -> Document | LeftOut | None:
    """What a line gives; None for a blank one. All of the line is read then."""
    shown = printable_name(part.file)
    source = f"{shown}@{line.start}"
    refused: _RefusedError | None = None
    name, text = None, None
    try:
        name, text = _name_and_text(line, corpus, policy.max_bytes)
    except _RefusedError as error:
        refused = error
    for _ in line.rest or ():
        pass
    if refused is not None:
        return LeftOut(
            refused.name or source, f"{shown} {place(line, refused.why)}: {refused}", refused.why, reached(line)
        )
    if text is None:
        return None
    return Document(source if name is None else name, source, text, reached=reached(line))


def _name_and_text(line: _Line, corpus: CorpusConfig, max_bytes: int) -> tuple[str | None, bytes | None]:
    """The id that the line gives, if any, and its text; no text for a blank line."""
    held = line.held.removeprefix(_BYTE_ORDER_MARK) if line.start == 0 else line.held
    long_text = None
    broken = False
    try:
        if line.rest is not None:
            pieces = chain((held,), line.rest)
            record, long_text = read_long_line(pieces, corpus.text_key, max_bytes, text_bytes)
        elif not held.strip():
            return None, None
        else:
            decoded, broken = _decoded(held)
            record = json.loads(decoded)
    except LineTooLongError as error:
        raise _RefusedError("too_long", str(error), _name_of(error.record, corpus.id_key)) from None
    except (ValueError, RecursionError) as error:
        raise _RefusedError("damaged", f"not valid JSON: {error}") from None
    text = _checked_text(record, corpus.text_key)
    name = _checked_name(record, corpus.id_key)
    if long_text is None:
        long_text = text_bytes(text or "", broken)
    if len(long_text) > max_bytes:
        raise _RefusedError("too_long", exceeds(len(long_text), max_bytes), name)
    return name, long_text


def _checked_text(record: Any, text_key: str) -> str | None:
    if not isinstance(record, dict):
        raise _RefusedError("damaged", f"expected an object with the key {text_key!r}, found {type(record).__name__}")
    if text_key not in record:
        found = ", ".join(map(repr, record)) or "no keys"
        raise _RefusedError("damaged", f"no key {text_key!r}; found {found} (see corpus.text_key)")
    text = record[text_key]
    if not isinstance(text, str | None):
        raise _RefusedError("damaged", f"{text_key!r} must be a string, found {type(text).__name__}")
    return text


def _checked_name(record: Any, id_key: str) -> str | None:
    name = record.get(id_key) if isinstance(record, dict) else None
    if not isinstance(name, str | int | None) or isinstance(name, bool):
        raise _RefusedError("damaged", f"{id_key!r} must be a string or a whole number, found {type(name).__name__}")
    if name == PLACEHOLDER:
        raise _RefusedError("damaged", f"{id_key!r} is longer than any id")
    return None if name is None else printable_name(str(name))


def _name_of(record: Any, id_key: str) -> str | None:
    """As far as the line was read."""
    try:
        return _checked_name(record, id_key)
    except _RefusedError:
        return None


def _decoded(line: bytes) -> tuple[str, bool]:
    try:
        return line.decode("utf-8"), False
    except UnicodeDecodeError:
        return line.decode("utf-8", "surrogateescape"), True


def text_bytes(text: str, broken: bool) -> bytes:
    """`text` in UTF-8, invalid if it holds half a surrogate pair, so that the policy for bad bytes sees it.

    `broken`: the line had bytes that are not UTF-8, and they stand in `text` as escaped surrogates.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        if broken and all(not "\ud800" <= sign <= "\udfff" or "\udc80" <= sign <= "\udcff" for sign in text):
            return text.encode("utf-8", "surrogateescape")
        return text.encode("utf-8", "surrogatepass")


def _line_number(storage: Storage, name: str, offset: int) -> int:
    """The number, from 1, of the line that begins at byte `offset`."""
    lines = 1
    with storage.open(name) as file:
        while offset > 0 and (piece := file.read(min(offset, _HELD))):
            lines += piece.count(b"\n")
            offset -= len(piece)
    return lines
