"""A document, what is left out in place of one, and what happens to one whose bytes are not UTF-8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from brt_dist.data.errors import BadInput


@dataclass(frozen=True)
class Document:
    """One text as its bytes were found.

    `source` tells where in the corpus it stands. A document made of several files lists them in `files`, each with the
    offset in `content` at which it begins. `split` is "train", "validation" or "test" where the corpus itself says so.
    `reached` tells how many bytes of the unit's work, counted as `Unit.size` counts them, are done with it.
    """

    id: str
    source: str
    content: bytes
    files: tuple[tuple[int, str], ...] = ()
    split: str | None = None
    reached: int = 0

    def place(self, offset: int) -> str:
        """Where byte `offset` of the content is found: the file, and the byte offset in it."""
        start, file = max((entry for entry in self.files if entry[0] <= offset), default=(0, self.source))
        return f"{file}, byte offset {offset - start}"


@dataclass(frozen=True)
class LeftOut:
    """What a reader leaves out, counted and named.

    `id` is the document's id where it is known, else its place. `source` tells where in the corpus, with the reason in
    words. `why`: "damaged" and "too_long" as `DocumentsConfig` allows them; "not_text" for what an archive holds beside
    its texts. `reached` as in `Document`.
    """

    id: str
    source: str
    why: Literal["damaged", "too_long", "not_text"]
    reached: int = 0


def too_long(name: str, place: str, size: int, most: int, reached: int) -> LeftOut:
    """In place of a document of `size` bytes where `most` are allowed."""
    return LeftOut(name, f"{place}: {exceeds(size, most)}", "too_long", reached)


def exceeds(size: int, most: int) -> str:
    """Why a document of `size` bytes is too long."""
    return f"{size:,} bytes, more than the {most:,} of documents.max_bytes"


@dataclass(frozen=True)
class DecodedText:
    """A document's text, or None where the document is left out.

    `why` is None for an ordinary document, "invalid_utf8" or "empty" for one that is left out, and "invalid_utf8" for
    one whose bad bytes were replaced; `place` tells where the first bad byte is.
    """

    text: str | None
    why: Literal["invalid_utf8", "empty"] | None = None
    place: str = ""


def decode(document: Document, invalid_utf8: Literal["skip", "replace", "fatal"]) -> DecodedText:
    """The text of a document, under the given policy; BadInput under "fatal" names the document and the byte."""
    if not document.content:
        return DecodedText(None, "empty", document.source)
    try:
        return DecodedText(document.content.decode("utf-8"))
    except UnicodeDecodeError as error:
        place = document.place(error.start)
    if invalid_utf8 == "skip":
        return DecodedText(None, "invalid_utf8", place)
    if invalid_utf8 == "replace":
        return DecodedText(document.content.decode("utf-8", "replace"), "invalid_utf8", place)
    raise BadInput(
        f"document {document.id!r} is not valid UTF-8 at {place} "
        "(documents.invalid_utf8: skip leaves such documents out, replace puts U+FFFD for the bad bytes)"
    )


def printable_name(name: str) -> str:
    """`name` as a string that can be written as UTF-8: the bytes of a file name that are not become escapes."""
    return name.encode("utf-8", "surrogateescape" if _is_escaped(name) else "surrogatepass").decode(
        "utf-8", "backslashreplace"
    )


def _is_escaped(name: str) -> bool:
    """Whether each surrogate in `name` stands for one undecodable byte, as in file names."""
    return all(not "\ud800" <= sign <= "\udfff" or "\udc80" <= sign <= "\udcff" for sign in name)
