"""A corpus that the library `datasets` saved with `save_to_disk`: folders of Arrow streams. A door of pyarrow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from brt_dist.data.errors import BadInput
from preprocessing.config import CorpusConfig, DocumentsConfig
from preprocessing.documents import Document, LeftOut
from preprocessing.readers import arrow
from preprocessing.storage import Storage
from preprocessing.units import Part
from preprocessing.walk import File

_SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


def parts(
    storage: Storage, files: Iterable[File], corpus: CorpusConfig, unit_bytes: int, say: Callable[[str], None]
) -> Iterator[Part]:
    """Those of the Arrow files that belong to a dataset: other files that lie beside them are left-overs.

    BadInput for a folder of Arrow files that is no saved dataset, and for one that lacks a file.
    """
    for folder, members in groupby(files, key=lambda file: file.name.rpartition("/")[0]):
        sizes = dict(members)
        named = _data_files(storage, folder)
        if missing := [name for name in named if name not in sizes]:
            raise BadInput(f"{storage.shown(missing[0])} is missing, or left out: the dataset's state.json names it")
        _tell_of_split(storage, folder, say)
        yield from arrow.parts(storage, (File(name, sizes[name]) for name in named), corpus, unit_bytes, say)


def read(
    storage: Storage, parts: Sequence[Part], corpus: CorpusConfig, policy: DocumentsConfig
) -> Iterator[Document | LeftOut]:
    """The documents of a range of batches, with the split that they belong to."""
    split = _split(storage, parts[0].file.rpartition("/")[0])
    for found in arrow.read(storage, parts, corpus, policy):
        yield replace(found, split=split) if isinstance(found, Document) and split else found


def _data_files(storage: Storage, folder: str) -> list[str]:
    name = _below(folder, "state.json")
    state = _object(storage, name)
    if state is None:
        where = storage.shown(folder)
        raise BadInput(
            f"{where} has no state.json: it was not written by save_to_disk (for Arrow files, reader: arrow)"
        )
    if state.get("_indices_data_files"):
        raise BadInput(f"{storage.shown(name)}: saved with a table of indices, by an old version: save it again")
    try:
        return [_below(folder, entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise BadInput(f"{storage.shown(name)} does not name the dataset's files") from None


def _split(storage: Storage, folder: str) -> str | None:
    """Which split the dataset in `folder` is of a DatasetDict, or None where that leaves it open.

    It does if it holds nothing back: then our own rule does. A split of another name is for training.
    """
    above, _, name = folder.rpartition("/")
    splits = _splits_above(storage, above)
    if name not in splits or not {"validation", "test"} & {_SPLITS.get(split) for split in splits}:
        return None
    return _SPLITS.get(name, "train")


def _tell_of_split(storage: Storage, folder: str, say: Callable[[str], None]) -> None:
    split = _split(storage, folder)
    name = folder.rpartition("/")[2]
    if split == "train" and name not in _SPLITS:
        say(f"split {name!r} of {storage.shown(folder)} is taken for training")


def _splits_above(storage: Storage, folder: str) -> list[str]:
    name = _below(folder, "dataset_dict.json")
    splits = (_object(storage, name) or {}).get("splits", [])
    if not isinstance(splits, list):
        raise BadInput(f"{storage.shown(name)} does not name the dataset's splits")
    return splits


def _object(storage: Storage, name: str) -> dict[str, Any] | None:
    """What a JSON file holds; None if there is no such file."""
    try:
        with storage.open(name) as file:
            value = json.load(file)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise BadInput(f"{storage.shown(name)} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{storage.shown(name)}: expected an object, found {type(value).__name__}")
    return value


def _below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
