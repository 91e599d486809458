"""A corpus of files: each is a document, or each top-level folder is one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal

from brt_dist.data.errors import BadInput
from preprocessing.documents import Document, printable_name
from preprocessing.units import Part, Unit


def parts(folder: Path, names: Sequence[str], group: Literal["file", "top"]) -> Iterator[Part]:
    """One part for each file, marked with its document: the file's own name, or the first part of its path."""
    for name in names:
        size = (folder / name).stat().st_size
        yield Part(name, 0, size, size, name if group == "file" else name.split("/", 1)[0])


def read(folder: Path, unit: Unit) -> Iterator[Document]:
    """The documents of a unit; the files of one document are joined in path order, with nothing between them."""
    for name, members in groupby(unit.parts, key=lambda part: part.document):
        contents: list[bytes] = []
        starts: list[tuple[int, str]] = []
        size = 0
        for part in members:
            content = (folder / part.file).read_bytes()
            if len(content) != part.size:
                raise BadInput(f"{folder / part.file} changed while it was read: {part.size} bytes, now {len(content)}")
            starts.append((size, printable_name(part.file)))
            contents.append(content)
            size += len(content)
        yield Document(printable_name(name), printable_name(name), b"".join(contents), tuple(starts))
