"""A corpus of Arrow IPC files, in the file format or the stream format: rows are documents. A door of pyarrow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
from pyarrow import ipc

from brt_dist.data.errors import BadInput
from preprocessing.config import CorpusConfig, DocumentsConfig
from preprocessing.documents import Document, LeftOut, printable_name
from preprocessing.readers.text_column import DamagedTableError, check_columns, damage_named, documents, sound
from preprocessing.storage import Storage
from preprocessing.units import Part
from preprocessing.walk import File

_FILE_FORMAT = b"ARROW1"
# In place of the number of a file's last batch where that is not known.
_END = -1


def parts(
    storage: Storage, files: Iterable[File], corpus: CorpusConfig, unit_bytes: int, say: Callable[[str], None]
) -> Iterator[Part]:
    """Ranges of record batches of about `unit_bytes` of the file.

    A stream on another machine is one part, for it would have to be fetched to be divided.
    """
    for name, size in files:
        with storage.open(name) as file:
            first = begin = last = 0
            try:
                table = _Table(file, storage.path(name), corpus, storage.shown(name))
                for number, end in enumerate(table.batch_ends(size)):
                    if last - begin >= unit_bytes:
                        yield Part(name, first, number, last - begin)
                        first, begin = number, last
                    last = end
            except DamagedTableError:
                # In the last part: it is counted when that is read.
                pass
            yield Part(name, first, _END, size - begin)


def read(
    storage: Storage, parts: Sequence[Part], corpus: CorpusConfig, policy: DocumentsConfig
) -> Iterator[Document | LeftOut]:
    """The documents of a range of batches. One without an id is named by file, batch and row.

    Damage in a batch loses the rest of it; damage to a stream loses all that follows, for nothing tells where it goes
    on.
    """
    (part,) = parts
    shown = printable_name(part.file)
    number, begin = part.first, 0
    with storage.open(part.file) as file:
        try:
            table = _Table(file, storage.path(part.file), corpus, storage.shown(part.file))
            for number, batch, end in table.batches(part):
                yield from _documents(batch, corpus, policy, f"{shown}:{number}", begin, end)
                number, begin = number + 1, end
        except DamagedTableError as error:
            lost = f"{shown} from batch {number} on: {error}"
            yield LeftOut(f"{shown}:{number}", lost, "damaged", part.size)
            return
    if number < part.stop:
        raise BadInput(f"{storage.shown(part.file)} changed while it was read: it ends with batch {number}")


def _documents(
    batch: pa.RecordBatch | DamagedTableError, corpus: CorpusConfig, policy: DocumentsConfig, place: str, *done: int
) -> Iterator[Document | LeftOut]:
    """`done`: the bytes of the part that are done before this batch and behind it."""
    before, behind = done
    try:
        if isinstance(batch, DamagedTableError):
            raise batch
        count = batch.num_rows
        yield from documents(
            batch, corpus, place, 0, policy.max_bytes, lambda row: before + (behind - before) * (row + 1) // count
        )
    except DamagedTableError as error:
        yield LeftOut(place, f"{place} cannot be read: {error}", "damaged", behind)


class _Table:
    """The text and the ids in one file: DamagedTableError if it cannot be opened, BadInput for a wrong column.

    A file of this machine is mapped into memory, so that no more of a batch is read than is asked for.
    """

    def __init__(self, file: BinaryIO, path: Path | None, corpus: CorpusConfig, shown: str):
        self._mapped = path is not None
        with damage_named():
            self._source = pa.PythonFile(file, mode="r") if path is None else pa.memory_map(str(path))
            self._numbered = self._source.read(len(_FILE_FORMAT)) == _FILE_FORMAT
            schema = self._open().schema
        check_columns(schema, corpus, shown)
        wanted = [number for number, name in enumerate(schema.names) if name in (corpus.text_key, corpus.id_key)]
        # Of a mapped file nothing is copied, unless only some columns are asked for.
        self._options = None if self._mapped else ipc.IpcReadOptions(included_fields=wanted)

    def batch_ends(self, size: int) -> Iterator[int]:
        """For each batch about where in the file of `size` bytes it ends.

        Nothing for a stream on another machine, all of which would have to be fetched.
        """
        table = self._open(self._options)
        if self._numbered:
            count = table.num_record_batches
            yield from (size * (number + 1) // count for number in range(count))
        elif self._mapped:
            for _ in sound(iter(table)):
                yield self._source.tell()

    def batches(self, part: Part) -> Iterator[tuple[int, pa.RecordBatch | DamagedTableError, int]]:
        """The batches of a part, each with its number and the bytes of the part that are done behind it."""
        table = self._open(self._options)
        if self._numbered:
            stop = table.num_record_batches if part.stop == _END else min(part.stop, table.num_record_batches)
            for number in range(part.first, stop):
                yield (
                    number,
                    self._numbered_batch(table, number),
                    part.size * (number + 1 - part.first) // (stop - part.first),
                )
            return
        begin = 0
        for number, batch in enumerate(sound(iter(table))):
            if number == part.stop:
                return
            if number >= part.first:
                yield number, batch, min(self._source.tell() - begin, part.size)
            else:
                begin = self._source.tell()

    def _numbered_batch(self, table: ipc.RecordBatchFileReader, number: int) -> pa.RecordBatch | DamagedTableError:
        try:
            with damage_named():
                return table.get_batch(number)
        except DamagedTableError as error:
            return error

    def _open(self, options: ipc.IpcReadOptions | None = None) -> Any:
        with damage_named():
            self._source.seek(0)
            return (ipc.open_file if self._numbered else ipc.open_stream)(self._source, options=options)
