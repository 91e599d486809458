"""The ledger of a shard folder: which settings it belongs to, and what of the work is finished.

A JSON Lines file: first the settings, then the tokenizer, then one line for each finished unit, each added and synced
when its file is whole. A second run keeps what is listed; a line cut short by a crash counts as not written.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from brt_dist.data.errors import BadInput
from brt_dist.data.token_shards import LEDGER, MANIFEST, ShardEntry, read_manifest, writing
from preprocessing.shard_unit import ShardReport


class Ledger:
    """What is finished in one shard folder, under one settings record."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self._path = path
        self._settings = settings
        self.tokenizer_hash: str | None = None
        self.reports: dict[int, ShardReport] = {}

    @classmethod
    @contextmanager
    def open(cls, folder: Path, settings: dict[str, Any]) -> Iterator[Ledger]:
        """The ledger of `folder`, begun with the first thing done, and held so that no other run writes there.

        BadInput if the folder holds the work of other settings, or shards of unknown settings; nothing is changed then.
        Where nothing at all gets finished, nothing is left behind that would bind the next run to these settings.
        """
        check_settings(folder, settings)
        fresh = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        ledger = cls(folder / LEDGER, settings)
        with ledger._path.open("ab") as file:
            _hold(file.fileno(), folder)
            for abandoned in folder.glob(".*.part"):
                abandoned.unlink()
            lines = _whole_lines(ledger._path)
            os.truncate(ledger._path, sum(len(line) for line in lines))
            for line in lines[1:]:
                ledger._take(json.loads(line))
            try:
                yield ledger
            finally:
                if ledger._path.stat().st_size == 0:
                    ledger._path.unlink()
                    if fresh:
                        folder.rmdir()

    def add_tokenizer(self, digest: str) -> None:
        """The tokenizer is finished; what was encoded by another one is not."""
        self._add({"tokenizer": digest})

    def add_unit(self, number: int, report: ShardReport) -> None:
        """The shard of unit `number` is finished."""
        self._add({"unit": number, "report": asdict(report)})

    def _add(self, entry: dict[str, Any]) -> None:
        with writing(self._path), self._path.open("ab") as file:
            if file.tell() == 0:
                file.write(json.dumps({"settings": self._settings}).encode() + b"\n")
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._take(entry)

    def _take(self, entry: dict[str, Any]) -> None:
        if "tokenizer" in entry:
            if entry["tokenizer"] != self.tokenizer_hash:
                self.reports.clear()
            self.tokenizer_hash = entry["tokenizer"]
        if "unit" in entry:
            report = entry["report"]
            self.reports[entry["unit"]] = ShardReport(**{**report, "shard": ShardEntry(**report["shard"])})


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
