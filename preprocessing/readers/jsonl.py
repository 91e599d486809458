"""A corpus of JSON Lines files: each line is an object with a document's text, and perhaps its id."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from brt_dist.data.errors import BadInput
from preprocessing.documents import Document, printable_name
from preprocessing.units import Part, Unit

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def parts(folder: Path, names: Sequence[str], unit_bytes: int) -> Iterator[Part]:
    """Byte ranges of about `unit_bytes`, each of whole lines."""
    for name in names:
        size = (folder / name).stat().st_size
        with (folder / name).open("rb") as file:
            first = 0
            while first < size:
                file.seek(min(first + unit_bytes, size) - 1)
                # The byte before the wished end may itself be a newline: then the range ends there.
                file.readline()
                stop = file.tell()
                yield Part(name, first, stop, stop - first)
                first = stop


def read(folder: Path, unit: Unit, text_key: str, id_key: str) -> Iterator[Document]:
    """The documents of a unit. A line without `id_key` gets its file and byte offset as id; blank lines count nothing.

    BadInput names the file and line that is no JSON object, or whose text is missing or no string.
    """
    for part in unit.parts:
        with (folder / part.file).open("rb") as file:
            file.seek(part.first)
            while (offset := file.tell()) < part.stop and (line := file.readline()):
                if offset == 0:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                if line.strip():
                    try:
                        yield _document(line, f"{printable_name(part.file)}@{offset}", text_key, id_key)
                    except BadInput as error:
                        place = f"{folder / part.file} line {_line_number(folder / part.file, offset)}"
                        raise BadInput(f"{place}: {error}") from None
            if offset < part.stop:
                raise BadInput(f"{folder / part.file} changed while it was read: it ends at byte {offset}")


def _document(line: bytes, place: str, text_key: str, id_key: str) -> Document:
    try:
        decoded, broken = line.decode("utf-8"), False
    except UnicodeDecodeError:
        decoded, broken = line.decode("utf-8", "surrogateescape"), True
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise BadInput(f"expected an object with the key {text_key!r}, found {type(record).__name__}")
    if text_key not in record:
        raise BadInput(f"no key {text_key!r}; found {', '.join(map(repr, record)) or 'no keys'} (see corpus.text_key)")
    text, name = record[text_key], record.get(id_key)
    if not isinstance(text, str | None):
        raise BadInput(f"{text_key!r} must be a string, found {type(text).__name__}")
    if not isinstance(name, str | int | None) or isinstance(name, bool):
        raise BadInput(f"{id_key!r} must be a string or a whole number, found {type(name).__name__}")
    return Document(place if name is None else printable_name(str(name)), place, text_bytes(text or "", broken))


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


def _line_number(path: Path, offset: int) -> int:
    """The number, from 1, of the line that begins at byte `offset`."""
    lines = 1
    with path.open("rb") as file:
        while offset > 0 and (piece := file.read(min(offset, 1 << 24))):
            lines += piece.count(b"\n")
            offset -= len(piece)
    return lines
