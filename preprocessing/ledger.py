"""The ledger of a shard folder: which settings it belongs to, and what of the work is finished.

A JSON Lines file: first the settings, then the survey, the tokenizer, and one line for each finished unit, each added
and synced when its file is whole. A second run keeps what is listed; a line cut short by a crash counts as not written.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from brt_dist.data.atomic_file import whole_file
from brt_dist.data.errors import BadInput
from brt_dist.data.token_shards import LEDGER, MANIFEST, read_manifest, writing
from preprocessing.finished_units import FinishedUnits, as_plain
from preprocessing.shard_unit import ShardReport


class Ledger:
    """What is finished in one shard folder, under one settings record. Written by rank 0 alone.

    survey      hash of the table of repeated texts, once the corpora have been surveyed; "" where there are none
    tokenizer   hash of the tokenizer's file
    reports     of every unit that is finished, by its number
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self._folder, self._settings = folder, settings
        self._path = folder / LEDGER
        self._locks = ExitStack()
        self._clear()

    def _clear(self) -> None:
        self.survey: str | None = None
        self.tokenizer: str | None = None
        self.reports = FinishedUnits()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Read what is there, and hold it so that no other run writes to the folder.

        BadInput if the folder holds the work of other settings, or shards of unknown settings; nothing is changed then.
        Where nothing at all gets finished, nothing is left behind that would bind the next run to these settings.
        """
        check_settings(self._folder, self._settings)
        fresh = not self._folder.exists()
        with writing(self._path):
            self._folder.mkdir(parents=True, exist_ok=True)
            file = self._path.open("ab")
        with self._locks:
            self._lock(file)
            with writing(self._path):
                for abandoned in self._folder.glob(".*.part"):
                    abandoned.unlink()
                lines = _whole_lines(self._path)
                os.truncate(self._path, sum(len(line) for line in lines))
            for line in lines[1:]:
                self._take(json.loads(line))
            try:
                yield
            finally:
                # Whatever ended the work is told, and not that something stands in the way here.
                with suppress(OSError):
                    if self._path.stat().st_size == 0:
                        self._path.unlink()
                        if fresh:
                            self._folder.rmdir()

    def add_survey(self, repeats: str) -> None:
        """The corpora are surveyed; what was made after another survey is not finished."""
        self._add({"survey": repeats})

    def add_tokenizer(self, digest: str) -> None:
        """The tokenizer is finished; what was encoded by another one is not."""
        self._add({"tokenizer": digest})

    def add_unit(self, number: int, report: ShardReport) -> None:
        """The shard of unit `number` is finished."""
        self._add({"unit": number, "report": as_plain(report)})

    def put_in_order(self) -> None:
        """Write it anew in the order of the units, so that it does not tell who was ready first."""
        entries: list[dict[str, Any]] = [{"settings": self._settings}]
        entries += [{"survey": self.survey}, {"tokenizer": self.tokenizer}]
        finished = ({"unit": number, "report": as_plain(report)} for number, report in self.reports.items())
        with writing(self._path), whole_file(self._path) as temporary:
            file = temporary.open("wb")
            # The lock is on the file, whatever its name: the new one is held before it takes the old one's place.
            self._lock(file)
            file.writelines(map(_as_line, chain(entries, finished)))
            file.flush()

    def _lock(self, file: BinaryIO) -> None:
        """Hold an open ledger until `held` ends."""
        self._locks.enter_context(file)
        _hold(file.fileno(), self._folder)

    def _add(self, entry: dict[str, Any]) -> None:
        with writing(self._path), self._path.open("ab", buffering=0) as file:
            end = file.tell()
            line = (b"" if end else _as_line({"settings": self._settings})) + _as_line(entry)
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                # Half a line would hide all that is added behind it.
                file.truncate(end)
                raise
        self._take(entry)

    def _take(self, entry: dict[str, Any]) -> None:
        if "survey" in entry:
            if entry["survey"] != self.survey:
                self._clear()
            self.survey = entry["survey"]
        if "tokenizer" in entry:
            if entry["tokenizer"] != self.tokenizer:
                self.reports.clear()
            self.tokenizer = entry["tokenizer"]
        if "unit" in entry:
            self.reports.add(entry["unit"], entry["report"])


def _as_line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """BadInput if `folder` holds anything but the work of these settings; names the first setting that differs."""
    if (folder / MANIFEST).exists():
        found = read_manifest(folder).get("settings", {})
    elif lines := _whole_lines(folder / LEDGER):
        found = json.loads(lines[0]).get("settings", {})
    else:
        strange = sorted(path.name for pattern in ("*.arrow", "*.model") for path in folder.glob(pattern))
        if strange:
            raise BadInput(
                f"{folder} holds {strange[0]}, but neither {MANIFEST} nor {LEDGER} tells what it is "
                "(choose another shards.dir, or remove the folder)"
            )
        return
    difference = _first_difference(found, json.loads(json.dumps(settings)), "")
    if difference:
        key, there, here = difference
        what = f"of other settings: {key} is {there!r} there and {here!r} here"
        if key.startswith("corpus_files."):
            what = f"of another corpus: {_files_differ(found['corpus_files'], settings['corpus_files'])}"
        raise BadInput(f"{folder} holds shards {what} (choose another shards.dir, or remove the folder)")


def _files_differ(there: dict[str, Any], here: dict[str, Any]) -> str:
    """In words, how the fingerprints of two corpora differ."""
    counts = [
        f"{mark.get('files')} file{'s' * (mark.get('files') != 1)} of {mark.get('bytes')} bytes"
        for mark in (there, here)
    ]
    if counts[0] == counts[1]:
        return f"corpus_files has {counts[0]} there and here, but their names, or the sizes of some, differ"
    return f"its files differ, corpus_files has {counts[0]} there and {counts[1]} here"


def _first_difference(there: Any, here: Any, key: str) -> tuple[str, Any, Any] | None:
    if isinstance(there, dict) and isinstance(here, dict):
        for name in [*here, *(name for name in there if name not in here)]:
            found = _first_difference(there.get(name), here.get(name), f"{key}.{name}" if key else name)
            if found:
                return found
        return None
    return None if there == here else (key, there, here)


def _whole_lines(path: Path) -> list[bytes]:
    """The ledger's lines, without a last one that was cut short."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    whole: list[bytes] = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(entry, dict) or (not whole and "settings" not in entry):
            break
        whole.append(line)
    return whole


def _hold(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"another `brt prepare` is writing to {folder}") from None
    except OSError:
        # Some network file systems have no locks; there the user takes care.
        return
