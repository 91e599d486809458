"""`brt bench lanes`: what it costs to plan the lanes, to find a position, and to read batches. Nothing is written."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brt_dist.data.config import DataConfig
from brt_dist.data.errors import BadInput
from brt_dist.data.lanes import LanePlan, plan_lanes
from brt_dist.data.loader import TokenSource, read_batch
from brt_dist.data.mixture import mixture_by_name
from brt_dist.data.token_shards import TokenShards
from brt_dist.train.parallel_report import peak_memory

# Synthetic documents: the median of their lengths and the spread of its logarithm, much as in corpora of web and code.
MEDIAN_TOKENS, SPREAD = 1000, 1.2
POSITIONS, BATCHES = 200, 8


class SyntheticDocuments:
    """Documents of log-normal lengths, evenly of every corpus in `names`; all begin with the same tokens."""

    def __init__(self, count: int, names: tuple[str, ...]):
        generator = np.random.default_rng(0)
        self.lengths = generator.lognormal(np.log(MEDIAN_TOKENS), SPREAD, count).astype(np.int64)
        self.corpora, self.corpus_of = names, np.arange(count, dtype=np.int64) % len(names)
        self._tokens = generator.integers(1, 1 << 8, int(self.lengths.max()), dtype=np.uint16)

    def tokens(self, index: int, first: int = 0, count: int | None = None) -> np.ndarray:
        """As `Documents.tokens`."""
        length = int(self.lengths[index])
        return self._tokens[first : length if count is None else min(length, first + count)]


def bench_lanes(data: DataConfig, window: int, documents: int | None, lanes: int | None) -> dict[str, Any]:
    """Plans one epoch in `lanes` lanes (None: data.lanes), finds random positions of it, and reads some batches.

    documents: so many synthetic ones; None takes the training split of data.shards. Times are CPU seconds of this
    process, memory the most it held, the lengths of the documents included.
    """
    source, place, eos = _source(data, documents)
    lanes = lanes or data.lanes
    before = peak_memory(torch.device("cpu"))
    mixture = mixture_by_name(source.corpora, source.corpus_of, data.weights, place)
    began = time.process_time()
    plan = plan_lanes(source.lengths, lanes, data.segment, window, seed=data.seed, align=data.align, mixture=mixture)
    positions = int((source.lengths + 1).sum() / (1 - plan.padding)) // (lanes * data.segment) + 1
    plan.at(positions - 1)
    planned = time.process_time()
    memory = peak_memory(torch.device("cpu"))
    return {
        "documents": len(source.lengths),
        "corpora": len(source.corpora),
        "mixed": mixture is not None,
        "lanes": lanes,
        "segment": data.segment,
        "positions": positions,
        "padding": plan.padding,
        "plan_seconds": planned - began,
        "memory_before": before,
        "peak_memory": memory,
        **_finding(plan, positions),
        **_reading(source, plan, eos, positions),
    }


def _source(data: DataConfig, documents: int | None) -> tuple[Any, object, int]:
    """Documents, what an error calls their place, and the EOS between them."""
    if documents is not None:
        names = tuple(data.weights) or ("",)
        if documents < len(names):
            raise BadInput(f"{documents} documents are too few for the {len(names)} corpora of data.weights")
        return SyntheticDocuments(documents, names), f"{documents} synthetic documents", 0
    if not data.shards:
        raise BadInput("data.shards is not set: name a folder of shards, or give --documents")
    shards = TokenShards.open(Path(data.shards), "size")
    return shards.split("train"), data.shards, shards.eos


def _finding(plan: LanePlan, positions: int) -> dict[str, float]:
    asked = np.random.default_rng(0).integers(positions, size=POSITIONS).tolist()
    milliseconds = []
    for position in asked:
        began = time.perf_counter()
        plan.at(position)
        milliseconds.append(1000 * (time.perf_counter() - began))
    return {"at_milliseconds": float(np.median(milliseconds)), "at_milliseconds_most": max(milliseconds)}


def _reading(source: TokenSource, plan: LanePlan, eos: int, positions: int) -> dict[str, float]:
    """Batches of all lanes; each is read twice, and the second time, from memory, is what counts."""
    seconds, tokens = 0.0, 0
    for position in range(min(BATCHES, positions)):
        read_batch(source, plan, eos, position, range(plan.lanes))
        began = time.process_time()
        tokens += read_batch(source, plan, eos, position, range(plan.lanes)).predicted
        seconds += time.process_time() - began
    return {"read_tokens_per_second": tokens / seconds, "read_batch_seconds": seconds / min(BATCHES, positions)}
