"""A corpus of files: each is a document, or all of one folder are, or all of one top-level folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from brt_dist.data.errors import BadInput
from preprocessing.config import CorpusConfig, DocumentsConfig
from preprocessing.documents import Document, LeftOut, printable_name, too_long
from preprocessing.storage import DamagedFileError, Storage
from preprocessing.units import Part
from preprocessing.walk import File


def parts(
    storage: Storage, files: Iterable[File], corpus: CorpusConfig, unit_bytes: int, say: Callable[[str], None]
) -> Iterator[Part]:
    """One part for each file, marked with its document: its own name, that of its folder or its top-level folder.

    The document of the files that lie directly in the corpus folder is ".", with `group: folder`.
    """
    for name, size in files:
        document = name
        if corpus.group == "folder":
            document = name.rpartition("/")[0] or "."
        elif corpus.group == "top":
            document = name.partition("/")[0]
        yield Part(name, 0, size, size, document)


def read(
    storage: Storage, parts: Sequence[Part], corpus: CorpusConfig, policy: DocumentsConfig
) -> Iterator[Document | LeftOut]:
    """The document that the files make together, joined in path order with nothing between them."""
    name = printable_name(parts[0].document)
    size = sum(part.size for part in parts)
    if size > policy.max_bytes:
        yield too_long(name, name, size, policy.max_bytes, size)
        return
    try:
        contents = [whole_file(storage, part) for part in parts]
    except DamagedFileError as error:
        yield LeftOut(name, f"{name}: {error}", "damaged", size)
        return
    starts = []
    start = 0
    for part in parts:
        starts.append((start, printable_name(part.file)))
        start += part.size
    content = contents[0] if len(contents) == 1 else b"".join(contents)
    yield Document(name, name, content, tuple(starts), reached=size)


def whole_file(storage: Storage, part: Part) -> bytes:
    """The bytes of a part that is a file; BadInput if it does not have as many as it had."""
    with storage.open(part.file) as file:
        # One byte more: enough to see that the file has grown, however much.
        content = file.read(part.size + 1)
    if len(content) != part.size:
        now = storage.size(part.file)
        raise BadInput(f"{storage.shown(part.file)} changed while it was read: {part.size} bytes, now {now}")
    return content
