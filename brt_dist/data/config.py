"""Settings of the lanes: where the shards lie and how they are read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """The `data` section of a run.

    shards: folder of token shards; empty means the folder that `shards.dir` names.
    segment: tokens of one lane in one forward pass (N); a multiple of the model's window.
    lanes: rows of the global batch, whatever the number of ranks.
    seed: decides the order of the documents, in every epoch another one.
    verify: "full" checks the hash of every shard before it is read, "size" its length alone.
    align: documents start at the next block ("block") or, as in the paper, at the next segment ("segment").
    weights: what share of the tokens read each corpus is to have, by its name; their sum need not be 1, and 0 leaves a
        corpus out. Empty: all documents of all corpora in one shuffled order.
    """

    shards: str = ""
    segment: int = 4096
    lanes: int = 8
    seed: int = 0
    verify: Literal["full", "size"] = "full"
    align: Literal["block", "segment"] = "block"
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("segment", "lanes"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"data.seed is {self.seed}; it must be at least 0 and below 2^32")
        for name, choices in (("verify", ("full", "size")), ("align", ("block", "segment"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"data.{name} is {getattr(self, name)!r}; it must be {' or '.join(choices)}")
        for corpus, weight in self.weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"data.weights.{corpus} is {weight}; it must be a number, and at least 0")
        if self.weights and not any(self.weights.values()):
            raise ValueError(f"data.weights are all 0 ({', '.join(self.weights)}); one must be above 0")
        if not math.isfinite(sum(self.weights.values())):
            raise ValueError(f"data.weights ({', '.join(self.weights)}) are too large for their sum to be a number")
