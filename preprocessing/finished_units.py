"""What was reported of each finished unit, in little memory: millions of documents that were left out are all named."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from brt_dist.data.token_shards import ShardEntry
from preprocessing.shard_unit import ShardReport


class FinishedUnits(Mapping[int, ShardReport]):
    """Reports by number of the unit, in the order of the numbers; each is made anew when it is asked for."""

    def __init__(self) -> None:
        self._squeezed: dict[int, bytes] = {}

    def add(self, number: int, report: dict[str, Any]) -> None:
        """A report as `as_plain` gives it."""
        self._squeezed[number] = zlib.compress(json.dumps(report).encode(), 1)

    def clear(self) -> None:
        """No unit is finished."""
        self._squeezed.clear()

    def __getitem__(self, number: int) -> ShardReport:
        report = json.loads(zlib.decompress(self._squeezed[number]))
        shard = report["shard"]
        return ShardReport(**{**report, "shard": ShardEntry(**{**shard, "pieces": tuple(shard["pieces"])})})

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._squeezed))

    def __len__(self) -> int:
        return len(self._squeezed)


def as_plain(report: ShardReport) -> dict[str, Any]:
    """A report as JSON holds it."""
    return asdict(report)
