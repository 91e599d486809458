"""The evaluation during training: a fixed set of validation documents, carried and cleared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from brt_dist.data.token_shards import Documents
from brt_dist.inference.documents import ChosenDocuments, LanguageModel, score_documents
from brt_dist.parallel.process_groups import Processes


def evaluate_during_training(
    model: LanguageModel,
    documents: Documents,
    eos: int,
    *,
    count: int,
    limit_tokens: int,
    segment: int,
    lanes: int,
    processes: Processes,
    together: bool = False,
) -> dict[str, Any]:
    """Nats per predicted token over the first `limit_tokens` tokens of the first `count` documents.

    carried        the carry goes through the whole document
    cleared        it is cleared in front of every segment
    gap            what clearing costs: cleared - carried
    state_cleared  the states alone are put back in front of every segment, the caches stay
    state_gap      what that costs each token behind the first segment of its document, the only ones that a state put
                   back can reach; thus what the model owes to its states and not to its caches, however long the
                   documents are

    The last two only of a model with recurrent layers, and where a document is longer than a segment. The documents are
    divided over the data ranks, unless `together`: then each scores all of them. The training carry is not touched,
    because carries are values and this makes its own.
    """
    first, stride = (0, 1) if together else (processes.data.position, processes.data.size)
    indices = np.arange(first, min(count, len(documents)), stride)
    shown = np.minimum(documents.lengths[:count] + 1, limit_tokens)

    def score(chosen: np.ndarray, **way: Any) -> list[np.ndarray]:
        """Nats of the documents with the indices `chosen`."""
        if not len(chosen):
            return []
        return score_documents(
            model,
            ChosenDocuments(documents, chosen),
            eos,
            lanes=max(1, lanes),
            segment=segment,
            device=processes.device,
            limit_tokens=limit_tokens,
            **way,
        )

    carried, cleared = score(indices), score(indices, clear_every=segment)
    # In no other document does a state reach beyond the segment that it comes from.
    is_long = (shown[indices] > segment) & bool(model.config.recurrent_layers)
    put_back = score(indices[is_long], forget_state=True)
    kept = [nats for nats, long in zip(carried, is_long, strict=True) if long]
    sums = processes.sum(
        float(shown[indices].sum()),
        _sum(carried),
        _sum(cleared),
        float(sum(len(nats) - segment for nats in kept)),
        _sum(nats[segment:] for nats in put_back) - _sum(nats[segment:] for nats in kept),
    )
    # Where every data rank scored all documents, each document was counted so many times.
    times = processes.data.size // stride
    tokens, carried_sum, cleared_sum, reached, state_cost = (total / times for total in sums)
    figures = {"carried": carried_sum / tokens, "cleared": cleared_sum / tokens}
    figures["gap"] = figures["cleared"] - figures["carried"]
    if reached:
        figures["state_cleared"] = figures["carried"] + state_cost / tokens
        figures["state_gap"] = state_cost / reached
    return {"documents": min(count, len(documents)), "tokens": int(tokens), **figures}


def _sum(nats: Iterable[np.ndarray]) -> float:
    return float(sum(each.sum(dtype=np.float64) for each in nats))
