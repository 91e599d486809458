"""The evaluation during training: a fixed set of validation documents, carried and cleared."""

from __future__ import annotations

from collections.abc import Sequence
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
    what clearing costs. The documents are divided over the data ranks; the training carry is not touched, because
    carries are values and this makes its own.
    """
    mine = range(processes.data_rank, min(count, len(documents)), processes.data_ranks)
    chosen = ChosenDocuments(documents, np.asarray(mine, dtype=np.int64))
    sums = []
    for clear_every in (None, segment):
        nats = (
            score_documents(
                model,
                chosen,
                eos,
                lanes=max(1, lanes),
                segment=segment,
                clear_every=clear_every,
                device=processes.device,
                limit_tokens=limit_tokens,
            )
            if mine
            else []
        )
        sums += [_total(nats), float(sum(len(each) for each in nats))]
    carried, tokens, cleared, _ = processes.sum(*sums)
    return {
        "documents": min(count, len(documents)),
        "tokens": int(tokens),
        "carried": carried / tokens,
        "cleared": cleared / tokens,
        "gap": (cleared - carried) / tokens,
    }


def _total(nats: Sequence[np.ndarray]) -> float:
    return float(sum(each.sum(dtype=np.float64) for each in nats))
