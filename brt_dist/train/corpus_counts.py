"""How many tokens of each corpus a run has read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from brt_dist.data.documents import Documents
from brt_dist.data.lanes import LanePlan


class CorpusCounts:
    """Predicted tokens of each corpus so far, of all lanes: the same in every layout, and after a restart.

    Where all documents are of one corpus there is nothing to tell, and `figures` and `facts` are empty.
    """

    def __init__(self, documents: Documents, facts: Mapping[str, int]):
        """`facts`: those of the checkpoint that the run goes on from."""
        self._names = documents.corpora if len(documents.corpora) > 1 else ()
        if self._names:
            self._corpus_of = documents.corpus_of
            self._epoch = self._by_corpus(np.arange(len(documents)), documents.lengths + 1)
        self._read = np.array([facts.get(name, 0) for name in self._names], np.int64)

    def add(self, plan: LanePlan, positions: range) -> None:
        """Counts what all lanes read at some positions of their plan."""
        if self._names:
            for step in map(plan.at, positions):
                self._read += self._by_corpus(step.document_P, step.count_P)

    @property
    def facts(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return dict(zip(self._names, self._read.tolist(), strict=True))

    def figures(self) -> dict[str, float]:
        """For the metrics: tokens of each corpus, and how often as many as the training split has of it."""
        tokens = {f"corpus_tokens/{name}": many for name, many in self.facts.items()}
        if not self._names:
            return {}
        epochs = (self._read / np.maximum(self._epoch, 1)).tolist()
        return {**tokens, **{f"corpus_epochs/{name}": e for name, e in zip(self._names, epochs, strict=True)}}

    def _by_corpus(self, document: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        counts = np.zeros(len(self._names), np.int64)
        np.add.at(counts, self._corpus_of[document], tokens)
        return counts
