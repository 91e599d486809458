"""The files of a corpus: which lie below its folder and match its pattern, in path order, with their sizes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from heapq import merge
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple, cast

from brt_dist.data.errors import BadInput
from preprocessing.compact import rows_of, squeeze
from preprocessing.config import CorpusConfig
from preprocessing.documents import printable_name
from preprocessing.storage import LocalFolder, RemoteFolder, Storage

# Links named one by one.
_NAMED = 20
# Rows in one compressed piece.
_TOGETHER = 4096
# Entries of one folder that are sorted as they are; more are sorted in runs of so many, and merged.
_SORTED = 1 << 16
# In place of the size of what is a folder.
_FOLDER = -1

# Whether it comes behind the files of its folder, its name, its size, and of a folder the real path.
_Row = tuple[bool, str, int, str]


class File(NamedTuple):
    """A file of the corpus: its name below the corpus folder, with "/", and its bytes."""

    name: str
    size: int


class FileList:
    """Files in order, in little memory; may be gone through again and again. `size` is that of all together."""

    def __init__(self, files: Iterable[File]):
        self.size = 0
        self._pieces: list[bytes] = []
        files = iter(files)
        while rows := list(islice(files, _TOGETHER)):
            self._pieces.append(squeeze(rows))
            self.size += sum(file.size for file in rows)

    def __iter__(self) -> Iterator[File]:
        return (File(*row) for piece in self._pieces for row in rows_of(piece))


class _Choice:
    """Which paths below the corpus folder are wanted."""

    def __init__(self, corpus: CorpusConfig):
        self.files_first = corpus.group == "folder" or corpus.reader == "huggingface"
        self._exclude = corpus.exclude
        self._patterns = [tuple(pattern.split("/")) for pattern in corpus.patterns]

    def matches(self, name: str) -> bool:
        parts = tuple(name.split("/"))
        return any(matches(parts, pattern) for pattern in self._patterns)

    def excludes(self, part: str) -> bool:
        return any(fnmatchcase(part, pattern) for pattern in self._exclude)

    def order(self, name: str) -> tuple[tuple[bool, str], ...]:
        *above, last = name.split("/")
        return (*((self.files_first, part) for part in above), (False, last))


@dataclass
class _LeftOut:
    """What was met and is not read.

    `files` counts those that match the pattern, `folders` those not looked into. `dead_links` names links that match it
    and lead nowhere, and those that lead back into a folder that they lie in.
    """

    files: int = 0
    folders: int = 0
    dead_links: list[str] = field(default_factory=list)


def find_files(corpus: CorpusConfig, leave_out: Path | None, say: Callable[[str], None]) -> tuple[Storage, FileList]:
    """Where the corpus lies and its files, in an order that depends on names alone.

    Path order: compared folder by folder. Where the files of a folder must stay together (`group: folder`, and saved
    datasets) they come before its folders. BadInput if the path does not exist, or no file matches the pattern.
    """
    if not corpus.path:
        raise BadInput("corpus.path is empty: name the file or folder that holds the corpus")
    left_out = _LeftOut()
    storage, files = (_remote if corpus.url else _local)(corpus, leave_out, left_out)
    try:
        found = FileList(files)
    except OSError as error:
        raise BadInput(f"the corpus cannot be read: {error}") from None
    if next(iter(found), None) is None:
        excluded = f" (left out: {', '.join(corpus.exclude)})" if corpus.exclude else ""
        raise BadInput(f"corpus is empty: no file below {corpus.place} matches {corpus.pattern!r}{excluded}")
    _tell(left_out, say)
    return storage, found


def storage_of(corpus: CorpusConfig) -> Storage:
    """Where the files of a corpus lie: its folder, or that of its only file."""
    if not corpus.url:
        return LocalFolder(corpus.root if corpus.root.is_dir() else corpus.root.parent)
    remote = RemoteFolder(corpus.url)
    return RemoteFolder(_cut(corpus.url)[0]) if _is_file(remote, corpus) else remote


def _is_file(remote: RemoteFolder, corpus: CorpusConfig) -> bool:
    """What the path says to be a folder is none, even if it can be opened: the page that lists a folder of the web."""
    return not corpus.names_folder and remote.is_file()


def _local(corpus: CorpusConfig, leave_out: Path | None, left_out: _LeftOut) -> tuple[Storage, Iterable[File]]:
    root = corpus.root
    storage = storage_of(corpus)
    if root.is_file():
        return storage, [File(root.name, storage.size(root.name))]
    if not root.is_dir():
        raise BadInput(f"corpus.path {root} does not exist")
    return storage, _Walk(root, _Choice(corpus), leave_out, left_out).files()


def _remote(corpus: CorpusConfig, leave_out: Path | None, left_out: _LeftOut) -> tuple[Storage, Iterable[File]]:
    """`leave_out` is a folder of this machine, and none of those here."""
    remote = RemoteFolder(corpus.url)
    try:
        if _is_file(remote, corpus):
            storage, name = storage_of(corpus), _cut(corpus.url)[1]
            return storage, [File(name, storage.size(name))]
        found = list(remote.files())
    except FileNotFoundError:
        found = []
    except OSError as error:
        raise BadInput(f"the corpus cannot be read: {error}") from None
    if not found:
        raise BadInput(f"corpus.path {corpus.url} does not exist, or there is nothing below it")
    files = []
    folders = set()
    choice = _Choice(corpus)
    for name, size in found:
        *above, last = name.split("/")
        excluded = next((at for at, part in enumerate(above) if choice.excludes(part)), None)
        if excluded is not None:
            folders.add(tuple(above[: excluded + 1]))
        elif choice.matches(name):
            if choice.excludes(last):
                left_out.files += 1
            else:
                files.append(File(name, remote.size(name) if size is None else size))
    left_out.folders = len(folders)
    return remote, sorted(files, key=lambda file: choice.order(file.name))


def _cut(url: str) -> tuple[str, str]:
    """The URL of the folder that the file at `url` lies in, and the file's name."""
    first, *rest = url.split("::")
    folder, name = first.rsplit("/", 1)
    return "::".join([f"{folder}/", *rest]), name


@dataclass
class _Walk:
    """Goes through the folders of this machine, linked ones too."""

    root: Path
    choice: _Choice
    leave_out: Path | None
    left_out: _LeftOut

    def files(self) -> Iterator[File]:
        """The chosen files, in order."""
        above: tuple[str, ...] = (os.path.realpath(self.root),)
        # The folders that the walk is in: they may lie deeper than calls may.
        inside = [(above, self._ordered("", above))]
        while inside:
            above, rows = inside[-1]
            if (row := next(rows, None)) is None:
                inside.pop()
                continue
            _, name, size, real = row
            if size == _FOLDER:
                inside.append(((*above, real), self._ordered(name, (*above, real))))
            else:
                yield File(name, size)

    def _ordered(self, below: str, above: tuple[str, ...]) -> Iterator[_Row]:
        with os.scandir(f"{self.root}/{below}") as entries:
            return iter(_in_order(self._rows(entries, below, above)))

    def _rows(self, entries: Iterable[os.DirEntry[str]], below: str, above: tuple[str, ...]) -> Iterator[_Row]:
        """The chosen files in the folder root/below, and the folders to look into.

        `above` has the real paths of that folder and of all that the walk came through: a link to one of them would
        lead round in a circle.
        """
        for entry in entries:
            name = f"{below}/{entry.name}" if below else entry.name
            excluded = self.choice.excludes(entry.name)
            kind = _kind(entry)
            if kind == "folder" and excluded:
                self.left_out.folders += 1
            elif kind == "folder":
                real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
                if real in above:
                    self.left_out.dead_links.append(name)
                elif self.leave_out is None or real != str(self.leave_out):
                    yield self.choice.files_first, name, _FOLDER, real
            elif kind == "other" or not self.choice.matches(name):
                continue
            elif kind == "file" and excluded:
                self.left_out.files += 1
            elif kind == "file":
                yield False, name, entry.stat().st_size, ""
            elif not excluded:
                self.left_out.dead_links.append(name)


def _in_order(rows: Iterator[_Row]) -> Iterable[_Row]:
    """`rows` sorted: by themselves where they are few, else in runs that are compressed and merged."""
    runs: list[list[bytes]] = []
    while len(run := sorted(islice(rows, _SORTED))) == _SORTED:
        runs.append([squeeze(run[first : first + _TOGETHER]) for first in range(0, _SORTED, _TOGETHER)])
    return merge(*map(_unpacked, runs), run) if runs else run


def _unpacked(run: list[bytes]) -> Iterator[_Row]:
    return (cast(_Row, row) for piece in run for row in rows_of(piece))


def _kind(entry: os.DirEntry[str]) -> Literal["file", "folder", "dead link", "other"]:
    """What an entry is, or what the link leads to that it is."""
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "folder"
        return "dead link" if entry.is_symlink() and not os.path.exists(entry.path) else "other"
    except OSError:
        return "dead link" if entry.is_symlink() else "other"


def _tell(left_out: _LeftOut, say: Callable[[str], None]) -> None:
    counts = ((left_out.folders, "folder"), (left_out.files, "file"))
    excluded = " and ".join(f"{count:,} {noun}{'s' * (count != 1)}" for count, noun in counts if count)
    if excluded:
        say(f"{excluded} left out by corpus.exclude")
    for name in sorted(left_out.dead_links)[:_NAMED]:
        say(f"link left out, it leads nowhere or back into a folder that it lies in: {printable_name(name)}")
    if len(left_out.dead_links) > _NAMED:
        say(f"... and {len(left_out.dead_links) - _NAMED:,} more such links")


def matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a path matches a glob, both cut at "/"; "**" stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(matches(parts[folders:], pattern[1:]) for folders in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])
