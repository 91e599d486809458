"""From a corpus to units of work, and from one unit to its documents."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from brt_dist.data.errors import BadInput
from preprocessing.config import CorpusConfig
from preprocessing.documents import Document
from preprocessing.readers import files, jsonl
from preprocessing.units import Part, Unit, pack


def list_units(corpus: CorpusConfig, unit_bytes: int, leave_out: Path | None = None) -> list[Unit]:
    """All units of a corpus, in an order that depends on names alone; `leave_out` is a folder that is not read.

    BadInput if the path does not exist, or no file matches the pattern.
    """
    folder, names = _corpus_files(corpus, leave_out)
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


def _corpus_files(corpus: CorpusConfig, leave_out: Path | None) -> tuple[Path, list[str]]:
    """The corpus folder and its chosen files: names relative to it with "/", in path order."""
    root = corpus.root
    if not corpus.path:
        raise BadInput("corpus.path is empty: name the file or folder that holds the corpus")
    if root.is_file():
        return root.parent, [root.name]
    if not root.is_dir():
        raise BadInput(f"corpus.path {root} does not exist")
    pattern = tuple(corpus.pattern.split("/"))
    names = [name for name in _walk(root, "", corpus.exclude, leave_out) if matches(tuple(name.split("/")), pattern)]
    if not names:
        excluded = f" (left out: {', '.join(corpus.exclude)})" if corpus.exclude else ""
        raise BadInput(f"corpus is empty: no file below {root} matches {corpus.pattern!r}{excluded}")
    return root, sorted(names, key=lambda name: name.split("/"))


def _walk(root: Path, below: str, exclude: tuple[str, ...], leave_out: Path | None) -> Iterator[str]:
    """Regular files below root/below, links to folders not followed (they may run in circles)."""
    try:
        with os.scandir(root / below) as entries:
            found = list(entries)
    except OSError as error:
        raise BadInput(f"the corpus cannot be read: {error}") from None
    for entry in found:
        if any(fnmatchcase(entry.name, pattern) for pattern in exclude):
            continue
        name = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir(follow_symlinks=False):
            if leave_out is None or Path(entry.path).resolve() != leave_out:
                yield from _walk(root, name, exclude, leave_out)
        elif entry.is_file():
            yield name


def matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a path matches a glob, both cut at "/"; "**" stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return matches(parts, pattern[1:]) or (bool(parts) and matches(parts[1:], pattern))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])
