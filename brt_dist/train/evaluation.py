"""The evaluation during training: a fixed set of validation documents, carried and cleared."""

from __future__ import annotations

from typing import Any

import numpy as np

from brt_dist.data.token_shards import Documents
from brt_dist.inference.documents import ChosenDocuments, score_documents
from brt_dist.model.transformer import BlockRecurrentTransformer
from brt_dist.parallel.process_groups import Processes


def evaluate_during_training(
    model: BlockRecurrentTransformer,
    documents: Documents,
    eos: int,
    *,
    count: int,
    limit_tokens: int,
    segment: int,
    lanes: int,
    processes: Processes,
) -> dict[str, Any]:
    """Nats per predicted token over the first `limit_tokens` tokens of the first `count` documents.

    `carried`: the carry goes through the whole document. `cleared`: it is cleared in front of every segment. `gap`:
    what clearing costs. Of a model with recurrent layers also `state_cleared` and `state_gap`: the states alone are put
    back, the caches stay, so that the gap is what the model owes to its states and not to its caches; left out where
    no document is longer than a segment. The documents are divided over the data ranks; the training carry is not
    touched, because carries are values and this makes its own.
    """
    mine = range(processes.data_rank, min(count, len(documents)), processes.data_ranks)
    chosen = ChosenDocuments(documents, np.asarray(mine, dtype=np.int64))
    ways: dict[str, dict[str, Any]] = {"carried": {}, "cleared": {"clear_every": segment}}
    longest = min(limit_tokens, int(np.asarray(documents.lengths[:count]).max(initial=0)) + 1)
    if model.config.recurrent_layers and longest > segment:
        ways["state_cleared"] = {"forget_state": True}
    sums = [0.0]
    for way in ways.values():
        nats = (
            score_documents(
                model,
                chosen,
                eos,
                lanes=max(1, lanes),
                segment=segment,
                device=processes.device,
                limit_tokens=limit_tokens,
                **way,
            )
            if mine
            else []
        )
        sums[0] = float(sum(len(each) for each in nats))
        sums.append(float(sum(each.sum(dtype=np.float64) for each in nats)))
    tokens, *totals = processes.sum(*sums)
    figures = {name: total / tokens for name, total in zip(ways, totals, strict=True)}
    gaps = {
        name.replace("cleared", "gap"): value - figures["carried"]
        for name, value in figures.items()
        if name != "carried"
    }
    return {"documents": min(count, len(documents)), "tokens": int(tokens), **figures, **gaps}
