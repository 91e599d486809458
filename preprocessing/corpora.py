"""From a corpus to units of work, and from one unit to its documents."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from brt_dist.data.errors import BadInput
from preprocessing.config import CorpusConfig
from preprocessing.documents import Document, printable_name
from preprocessing.readers import files, jsonl
from preprocessing.units import Part, Unit, pack

# Links named one by one.
_NAMED = 20


@dataclass
class _Found:
    """What lies below the corpus folder: files that match the pattern, and what was left out.

    `excluded_files` counts those that match the pattern, `excluded_folders` folders without looking into them.
    `dead_links` names links that match it and lead nowhere, and those that lead back into a folder that they lie in.
    """

    names: list[str] = field(default_factory=list)
    excluded_files: int = 0
    excluded_folders: int = 0
    dead_links: list[str] = field(default_factory=list)


def list_units(
    corpus: CorpusConfig,
    unit_bytes: int,
    leave_out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Unit]:
    """All units of a corpus, in an order that depends on names alone; `leave_out` is a folder that is not read.

    `say` is told, in lines of text, what else was left out. BadInput if the path does not exist, or no file matches the
    pattern.
    """
    folder, names = _corpus_files(corpus, leave_out, say)
    return list(pack(_parts(corpus, folder, names, unit_bytes), unit_bytes))


def read_unit(corpus: CorpusConfig, unit: Unit) -> Iterator[Document]:
    """The documents of a unit, in order. BadInput names the file that cannot be read and the place in it."""
    root = corpus.root
    folder = root if root.is_dir() else root.parent
    try:
        if corpus.reader == "files":
            yield from files.read(folder, unit)
        elif corpus.reader == "jsonl":
            yield from jsonl.read(folder, unit, corpus.text_key, corpus.id_key)
        else:
            from preprocessing.readers import parquet

            yield from parquet.read(folder, unit, corpus.text_key, corpus.id_key)
    except OSError as error:
        raise BadInput(f"the corpus cannot be read: {error}") from None


def _parts(corpus: CorpusConfig, folder: Path, names: list[str], unit_bytes: int) -> Iterator[Part]:
    try:
        if corpus.reader == "files":
            yield from files.parts(folder, names, corpus.group)
        elif corpus.reader == "jsonl":
            yield from jsonl.parts(folder, names, unit_bytes)
        else:
            # The door of pyarrow: a corpus of other files never opens it.
            from preprocessing.readers import parquet

            yield from parquet.parts(folder, names, corpus.text_key)
    except OSError as error:
        raise BadInput(f"the corpus cannot be read: {error}") from None


def _corpus_files(corpus: CorpusConfig, leave_out: Path | None, say: Callable[[str], None]) -> tuple[Path, list[str]]:
    """The corpus folder and its chosen files: names relative to it with "/", in path order."""
    root = corpus.root
    if not corpus.path:
        raise BadInput("corpus.path is empty: name the file or folder that holds the corpus")
    if root.is_file():
        return root.parent, [root.name]
    if not root.is_dir():
        raise BadInput(f"corpus.path {root} does not exist")
    found = _Found()
    _walk(corpus, leave_out, "", (os.path.realpath(root),), found)
    if not found.names:
        excluded = f" (left out: {', '.join(corpus.exclude)})" if corpus.exclude else ""
        raise BadInput(f"corpus is empty: no file below {root} matches {corpus.pattern!r}{excluded}")
    _tell_what_is_left_out(found, say)
    return root, sorted(found.names, key=lambda name: name.split("/"))


def _walk(corpus: CorpusConfig, leave_out: Path | None, below: str, above: tuple[str, ...], found: _Found) -> None:
    """Add what lies in the folder root/below to `found`, folders that are links too.

    `above` has the real paths of that folder and of all that the walk came through: a link to one of them would lead
    round in a circle.
    """
    try:
        with os.scandir(corpus.root / below) as entries:
            listed = list(entries)
    except OSError as error:
        raise BadInput(f"the corpus cannot be read: {error}") from None
    pattern = tuple(corpus.pattern.split("/"))
    for entry in listed:
        name = f"{below}/{entry.name}" if below else entry.name
        excluded = any(fnmatchcase(entry.name, part) for part in corpus.exclude)
        matched = matches(tuple(name.split("/")), pattern)
        kind = _kind(entry)
        if kind == "folder" and excluded:
            found.excluded_folders += 1
        elif kind == "folder":
            real = os.path.realpath(entry.path)
            if real in above:
                found.dead_links.append(name)
            elif leave_out is None or real != str(leave_out):
                _walk(corpus, leave_out, name, (*above, real), found)
        elif kind == "file" and matched:
            if excluded:
                found.excluded_files += 1
            else:
                found.names.append(name)
        elif kind == "dead link" and matched and not excluded:
            found.dead_links.append(name)


def _kind(entry: os.DirEntry[str]) -> Literal["file", "folder", "dead link", "other"]:
    """What an entry is, or what the link leads to that it is."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "dead link" if entry.is_symlink() and not os.path.exists(entry.path) else "other"
    except OSError:
        return "dead link" if entry.is_symlink() else "other"


def _tell_what_is_left_out(found: _Found, say: Callable[[str], None]) -> None:
    counts = ((found.excluded_folders, "folder"), (found.excluded_files, "file"))
    excluded = " and ".join(f"{count:,} {noun}{'s' * (count != 1)}" for count, noun in counts if count)
    if excluded:
        say(f"{excluded} left out by corpus.exclude")
    for name in sorted(found.dead_links)[:_NAMED]:
        say(f"link left out, it leads nowhere or back into a folder that it lies in: {printable_name(name)}")
    if len(found.dead_links) > _NAMED:
        say(f"... and {len(found.dead_links) - _NAMED:,} more such links")


def matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a path matches a glob, both cut at "/"; "**" stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return matches(parts, pattern[1:]) or (bool(parts) and matches(parts[1:], pattern))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])
