"""Mixing of corpora: from which one a free lane draws its next document.

A weight is a share of the tokens that all lanes together have read. Counting the tokens of the documents that were
given out would not keep it: where books and short files mix, thousands of books are begun long before they are read.
So what counts here is reading. A lane reads a document of n + 1 positions, which takes u units, at the speed
(n + 1) / u, and a free lane draws from the corpus with the least

    surplus_c + horizon * (speed_c - wanted_c)

surplus_c: positions that were read of c, less its weight's share of all. speed_c - wanted_c: how much faster its lanes
read than they must for the weights to hold, both at the mean speed of its documents. horizon: the units of the
longest document, for so long a lane may be bound by what it draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from itertools import chain, count
from math import inf

import numpy as np

from brt_dist.data.errors import BadInput
from brt_dist.data.shuffle import shuffled

# Positions are counted in integers of this many parts each: what has been added up is exact after any time.
_PARTS = 1 << 16
# Documents are turned into Python's numbers this many at a time.
_CHUNK = 1 << 15


@dataclass(frozen=True, eq=False)
class Mixture:
    """Which corpus each document is of, by number, and the weight of each corpus. The weights' sum is 1."""

    corpus_of: np.ndarray
    weights: tuple[float, ...]

    def check(self, documents: int) -> None:
        """BadInput unless every one of so many documents has a corpus, and every corpus of positive weight some."""
        if self.corpus_of.shape != (documents,):
            raise BadInput(f"there are {documents} documents, and corpora are told for {len(self.corpus_of)}")
        if not self.weights or min(self.weights) < 0 or abs(sum(self.weights) - 1) > 1e-9:
            raise BadInput(f"weights of corpora must not be negative, and their sum must be 1, found {self.weights}")
        if self.corpus_of.min() < 0 or self.corpus_of.max() >= len(self.weights):
            raise BadInput(f"there are {len(self.weights)} weights, and corpora up to number {self.corpus_of.max()}")
        held = np.bincount(self.corpus_of, minlength=len(self.weights)).tolist()
        if empty := [c for c, weight in enumerate(self.weights) if weight and not held[c]]:
            raise BadInput(f"corpus {empty[0]} has weight {self.weights[empty[0]]} and no document")

    def expected_padding(self, lengths: np.ndarray, unit: int) -> float:
        """The share of positions that will be padding where these corpora are read by weight."""
        return 1 - 1 / sum(self.lane_shares(lengths, unit)) / unit

    def lane_shares(self, lengths: np.ndarray, unit: int) -> list[float]:
        """For each corpus the units that its lanes read for every position of the whole mixture."""
        return [
            weight / mean_speed(lengths[self.corpus_of == corpus], unit) if weight else 0.0
            for corpus, weight in enumerate(self.weights)
        ]


def mean_speed(lengths: np.ndarray, unit: int) -> float:
    """Positions that a lane reads in a unit of time, on average over these documents; at most `unit`."""
    return int((lengths + 1).sum()) / int((lengths // unit + 1).sum())


def mixture_by_name(
    names: Sequence[str], corpus_of: np.ndarray, weights: Mapping[str, float], place: object
) -> Mixture | None:
    """The mixture of the corpora `names` in the proportion of `weights`; None without weights.

    corpus_of: for each document the number of its corpus. BadInput, which names `place`, where the weights name a
    corpus that isn't there, leave one out without saying 0, or ask for one that has no document.
    """
    if not weights:
        return None
    known = ", ".join(names) or "a single one, without a name"
    if unknown := [name for name in weights if name not in names]:
        raise BadInput(f"data.weights names the corpus {unknown[0]!r}, but those of {place} are: {known}")
    if unnamed := [name for name in names if name not in weights]:
        raise BadInput(
            f"data.weights does not name the corpus {unnamed[0]!r} of {place}; a weight of 0 leaves a corpus out"
        )
    documents = np.bincount(corpus_of, minlength=len(names)).tolist()
    if empty := [name for name, many in zip(names, documents, strict=True) if weights[name] and not many]:
        raise BadInput(f"data.weights.{empty[0]} is {weights[empty[0]]}, but {place} holds no document of {empty[0]!r}")
    total = sum(weights[name] for name in names)
    return Mixture(corpus_of, tuple(weights[name] / total for name in names))


class MixedDraw:
    """Lays the documents of a mixture out, each in the lane that is free first; goes on for ever.

    Every corpus is shuffled by itself, anew in each of its epochs. All is integers, but for one product of a weight
    and a count at a time, in IEEE doubles; so every machine draws alike.
    """

    def __init__(self, lengths: np.ndarray, mixture: Mixture, lanes: int, unit: int, seed: int, epoch: int):
        self._lanes, self._unit, self._lengths = lanes, unit, lengths
        # A corpus of weight 0 is not there at all.
        self._members = [np.flatnonzero(mixture.corpus_of == c) for c, w in enumerate(mixture.weights) if w]
        self._weights = [weight for weight in mixture.weights if weight]
        self._coming = [chain.from_iterable(self._documents(members, seed, epoch)) for members in self._members]
        horizon = max(int(lengths[members].max()) for members in self._members) // unit + 1
        speeds = [mean_speed(lengths[members], unit) for members in self._members]
        shares = [weight / speed for weight, speed in zip(self._weights, speeds, strict=True)]
        # What one lane more adds to a corpus's score.
        self._gains = [round(horizon * speed * _PARTS) for speed in speeds]
        # Parts that were read of each corpus, and its lanes' gains beyond those of the lanes that it should have.
        self._levels = [
            round(gain * (0.5 - lanes * share / sum(shares))) for gain, share in zip(self._gains, shares, strict=True)
        ]
        self._read, self._time = 0, 0
        self._speeds = [0] * len(speeds)
        # For each lane: corpus, speed, and what its document leaves behind. At first all wait in corpus 0.
        self._reading = [(0, 0, 0)] * lanes
        self._levels[0] += lanes * self._gains[0]

    def draw(self, heap: list[int], wanted: int) -> tuple[np.ndarray, np.ndarray]:
        """The next `wanted` documents and where each begins, as start * lanes + lane; the heap is left behind them.

        heap holds free_unit * lanes + lane for every lane, smallest first.
        """
        lanes, levels, speeds, gains = self._lanes, self._levels, self._speeds, self._gains
        weights, coming, reading = self._weights, self._coming, self._reading
        read, time = self._read, self._time
        documents, slots = [0] * wanted, [0] * wanted
        for index in range(wanted):
            slots[index] = slot = heap[0]
            now = slot // lanes
            if now != time:
                for corpus, speed in enumerate(speeds):
                    levels[corpus] += speed * (now - time)
                    read += speed * (now - time)
                time = now
            lane = slot - now * lanes
            corpus, speed, left = reading[lane]
            levels[corpus] += left - gains[corpus]
            speeds[corpus] -= speed
            read += left
            least = inf
            for candidate, weight in enumerate(weights):
                score = levels[candidate] - weight * read
                if score < least:
                    least, corpus = score, candidate
            documents[index], stride, speed, ahead, left = next(coming[corpus])
            levels[corpus] += ahead + gains[corpus]
            speeds[corpus] += speed
            read += ahead
            reading[lane] = corpus, speed, left
            heapreplace(heap, slot + stride)
        self._read, self._time = read, time
        return np.array(documents, dtype=np.int32 if len(self._lengths) <= 2**31 else np.int64), np.array(slots)

    def _documents(self, members: np.ndarray, seed: int, epoch: int) -> Iterator[Iterable[tuple[int, ...]]]:
        """In chunks: document, stride in the heap, speed, parts ahead of that speed, and what is left over at its end.

        A lane reads whole units and then what remains, so between two units it is ahead of its mean speed: by nothing
        at first, at last by nearly all that the last unit lacks, and so by half of that on average.
        """
        for each in count(epoch):
            order = members[shuffled(len(members), seed, each)]
            for first in range(0, len(order), _CHUNK):
                document = order[first : first + _CHUNK]
                positions = self._lengths[document] + 1
                units = self._lengths[document] // self._unit + 1
                speed = positions * _PARTS // units
                lacking = units * self._unit - positions
                ahead = lacking * _PARTS * (units - 1) // (2 * units)
                left = positions * _PARTS - speed * units - ahead
                yield zip(*(a.tolist() for a in (document, units * self._lanes, speed, ahead, left)), strict=True)
