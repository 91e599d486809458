"""The lane plan: which piece of which document each lane reads at each position.

A document of n tokens is read as n + 1 positions (inputs EOS + tokens, targets tokens + EOS). It takes whole units,
a unit being a block or a segment, and goes to the lane that is free first. One shuffled order decides what comes next,
or a mixture of corpora (`mixture.py`). The plan is a pure function of its arguments: it holds no reader state, and
ranks that share the lanes read parts of the same plan.

Dimension key
  D  documents in a stretch     P  pieces in a step     L  lanes
"""

from __future__ import annotations

import hashlib
import json
import threading
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property
from heapq import heapreplace
from itertools import count
from typing import Literal, NamedTuple

import numpy as np

from brt_dist.data.errors import BadInput
from brt_dist.data.mixture import MixedDraw, Mixture, mean_speed
from brt_dist.data.shuffle import shuffled

Align = Literal["block", "segment"]
Order = Literal["seeded", "longest"]

# A stretch is laid out in one go. The first are short, so that a few documents do not cost thousands of epochs at
# once; later ones grow to a size at which numpy's fixed costs vanish and Python's temporary lists stay small.
FIRST_STRETCH = 1 << 8
LARGEST_STRETCH = 1 << 18


class Piece(NamedTuple):
    """A run of positions of one document in one lane and segment."""

    document: int
    offset: int  # the first of the document's n + 1 positions shown here
    column: int  # where in the segment it lands
    count: int  # type: ignore[assignment]  # how many positions; hides tuple.count, of no use here


@dataclass(frozen=True, eq=False)
class Step:
    """What all lanes read at one position; arrays hold one entry a piece, by lane and then column."""

    lanes: int
    lane_P: np.ndarray
    document_P: np.ndarray
    offset_P: np.ndarray
    column_P: np.ndarray
    count_P: np.ndarray

    @cached_property
    def predicted(self) -> int:
        """Tokens predicted over all lanes."""
        return int(self.count_P.sum())

    @cached_property
    def pieces(self) -> tuple[tuple[Piece, ...], ...]:
        """The pieces of every lane, in the order of their columns; an idle lane has none."""
        return self.of(range(self.lanes))

    def of(self, lanes: range) -> tuple[tuple[Piece, ...], ...]:
        """The pieces of some lanes, without building those of the others."""
        bounds = np.searchsorted(self.lane_P, np.asarray([*lanes, *(lane + 1 for lane in lanes)], dtype=np.int64))
        firsts, lasts = bounds[: len(lanes)].tolist(), bounds[len(lanes) :].tolist()
        return tuple(self._between(first, last) for first, last in zip(firsts, lasts, strict=True))

    def _between(self, first: int, last: int) -> tuple[Piece, ...]:
        columns = (self.document_P, self.offset_P, self.column_P, self.count_P)
        return tuple(map(Piece._make, zip(*(column[first:last].tolist() for column in columns), strict=True)))


@dataclass(frozen=True, eq=False)
class _Stretch:
    """A row of documents laid out in the lanes, sorted by lane and then by time.

    key_D is lane * span + (start - low), so that one binary search finds a time in every lane.
    """

    low: int  # no document starts before this unit
    high: int  # no document ends after this unit
    span: int
    key_D: np.ndarray
    document_D: np.ndarray
    first_L: np.ndarray  # where each lane begins in the arrays above

    @classmethod
    def laid_out(cls, document_D: np.ndarray, slot_D: np.ndarray, low: int, high: int, lanes: int) -> _Stretch:
        """slot_D: where each document begins, as start * lanes + lane; it never falls."""
        lane_D, start_D = slot_D % lanes, slot_D // lanes
        # The starts never fall, so a stable sort by lane leaves every lane sorted by time.
        by_lane_D = np.argsort(lane_D.astype(np.uint16) if lanes <= 1 << 16 else lane_D, kind="stable")
        span = high - low + 1
        key_D = (lane_D * span + (start_D - low))[by_lane_D]
        first_L = np.searchsorted(key_D, np.arange(lanes, dtype=np.int64) * span)
        return cls(low, high, span, key_D, document_D[by_lane_D], first_L)

    def near(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lane, document and start of all that may overlap units first..last-1 (one too many a lane at most)."""
        base_L = np.arange(len(self.first_L), dtype=np.int64) * self.span
        relative = np.clip(np.array([first, last]) - self.low, 0, self.span - 1)
        from_L = np.maximum(np.searchsorted(self.key_D, base_L + relative[0], side="right") - 1, self.first_L)
        to_L = np.searchsorted(self.key_D, base_L + relative[1], side="left")
        many_L = np.maximum(to_L - from_L, 0)
        total = int(many_L.sum())
        index_P = np.repeat(from_L - (np.cumsum(many_L) - many_L), many_L) + np.arange(total)
        key_P = self.key_D[index_P]
        return key_P // self.span, self.document_D[index_P], key_P % self.span + self.low


class LanePlan:
    """All that the lanes will ever read; laid out as far as it has been asked for, and kept.

    A position is a number of segments read per lane. Build one with `plan_lanes`. Threads may share it.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        lanes: int,
        segment: int,
        window: int,
        seed: int,
        epoch: int,
        align: Align,
        epochs: int | None,
        order: Order,
        mixture: Mixture | None,
    ) -> None:
        self.lengths = lengths
        self.lanes, self.segment, self.window = lanes, segment, window
        self.seed, self.epoch, self.epochs = seed, epoch, epochs
        self.align, self.order, self.mixture = align, order, mixture
        self._unit = window if align == "block" else segment
        self._draw: _OrderedDraw | MixedDraw
        if mixture is None:
            self._draw = _OrderedDraw(lengths, lanes, self._unit, order, seed, epoch, epochs)
        else:
            self._draw = MixedDraw(lengths, mixture, lanes, self._unit, seed, epoch)
        self._heap = list(range(lanes))
        self._stretches: list[_Stretch] = []
        self._complete = False
        self._lock = threading.Lock()

    @property
    def positions(self) -> int | None:
        """Positions of a finite plan; None for an endless one."""
        if self.epochs is None:
            return None
        with self._lock:
            while not self._complete:
                self._extend()
        return -(-self._stretches[-1].high * self._unit // self.segment)

    @cached_property
    def hash(self) -> str:
        """32 hexadecimal digits that tell this plan from every other."""
        settings = (self.lanes, self.segment, self.window, self.seed, self.epoch, self.epochs, self.align, self.order)
        digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16)
        digest.update(self.lengths.astype("<i8").tobytes())
        if self.mixture is not None:
            digest.update(json.dumps(self.mixture.weights).encode())
            digest.update(self.mixture.corpus_of.astype("<i8").tobytes())
        return digest.hexdigest()

    @cached_property
    def padding(self) -> float:
        """The share of positions at which nothing is predicted: exact over an epoch, expected for a mixture.

        Nothing else is lost, but for the idle lanes at the end of a finite plan.
        """
        if self.mixture is not None:
            return self.mixture.expected_padding(self.lengths, self._unit)
        return 1 - mean_speed(self.lengths, self._unit) / self._unit

    def at(self, position: int) -> Step:
        """What every lane reads at a position; the same whatever was asked before.

        Raises IndexError for a negative position and behind the end of a finite plan.
        """
        per_segment = self.segment // self._unit
        first, last = position * per_segment, (position + 1) * per_segment
        found = [stretch.near(first, last) for stretch in self._overlapping(position, first, last)]
        lane_P, document_P, start_P = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        if len(found) > 1:
            by_lane = np.lexsort((start_P, lane_P))
            lane_P, document_P, start_P = lane_P[by_lane], document_P[by_lane], start_P[by_lane]
        offset_P = np.maximum(first - start_P, 0) * self._unit
        column_P = np.maximum(start_P - first, 0) * self._unit
        count_P = np.minimum(self.lengths[document_P] + 1 - offset_P, self.segment - column_P)
        shown_P = count_P > 0
        return Step(self.lanes, *(a[shown_P] for a in (lane_P, document_P, offset_P, column_P, count_P)))

    def _overlapping(self, position: int, first: int, last: int) -> list[_Stretch]:
        if position < 0:
            raise IndexError(f"position {position} is negative")
        with self._lock:
            while not self._complete and self._heap[0] // self.lanes < last:
                self._extend()
            begin = bisect_right(self._stretches, first, key=lambda stretch: stretch.high)
            end = bisect_left(self._stretches, last, key=lambda stretch: stretch.low)
            if begin == len(self._stretches):
                raise IndexError(f"position {position} is behind the plan's end")
            return self._stretches[begin:end]

    def _extend(self) -> None:
        """Lays out one more stretch; the caller holds the lock."""
        wanted = min(LARGEST_STRETCH, FIRST_STRETCH << min(len(self._stretches), 32))
        low = self._heap[0] // self.lanes
        document_D, slot_D = self._draw.draw(self._heap, wanted)
        if not document_D.size:
            self._complete = True
            return
        high = max(self._heap) // self.lanes
        self._stretches.append(_Stretch.laid_out(document_D, slot_D, low, high, self.lanes))


class _OrderedDraw:
    """Lays all documents out in one order an epoch, each in the lane that is free first; of several, the lowest."""

    def __init__(
        self, lengths: np.ndarray, lanes: int, unit: int, order: Order, seed: int, epoch: int, epochs: int | None
    ) -> None:
        self._lengths, self._lanes, self._unit = lengths, lanes, unit
        self._order, self._seed = order, seed
        self._coming = iter(count(epoch)) if epochs is None else iter(range(epoch, epoch + epochs))
        self._unread = np.empty(0, dtype=np.int64)

    def draw(self, heap: list[int], wanted: int) -> tuple[np.ndarray, np.ndarray]:
        """The next documents, fewer than `wanted` only where a finite plan ends, and where each begins.

        heap holds free_unit * lanes + lane for every lane, smallest first, and is left as the documents leave it;
        a document begins at an entry of it.
        """
        document_D = self._take(wanted)
        strides = ((self._lengths[document_D] // self._unit + 1) * self._lanes).tolist()
        taken = (heapreplace(heap, heap[0] + stride) for stride in strides)
        return document_D, np.fromiter(taken, dtype=np.int64, count=len(strides))

    def _take(self, wanted: int) -> np.ndarray:
        parts: list[np.ndarray] = [self._unread[:0]]
        while wanted > 0:
            if not self._unread.size:
                epoch = next(self._coming, None)
                if epoch is None:
                    break
                self._unread = document_order(self._lengths, self._order, self._seed, epoch)
            parts.append(self._unread[:wanted])
            self._unread = self._unread[wanted:]
            wanted -= len(parts[-1])
        return np.concatenate(parts[1:] or parts)


def plan_lanes(
    lengths: np.ndarray | list[int],
    lanes: int,
    segment: int,
    window: int,
    seed: int = 0,
    epoch: int = 0,
    align: Align = "block",
    epochs: int | None = None,
    order: Order = "seeded",
    mixture: Mixture | None = None,
) -> LanePlan:
    """Plans what `lanes` lanes read of documents of `lengths` tokens (EOS not counted), `segment` tokens at a time.

    epoch: the first epoch. epochs: None goes on for ever, a free lane into the next epoch; a number ends behind as
    many, and lanes that are done stay idle. order: "seeded" shuffles every epoch differently, by seed and epoch;
    "longest" takes long documents first, which ends a single pass soonest. mixture: which corpus each document is of,
    and the share of all tokens read that each corpus is to have; such a plan goes on for ever, every corpus shuffled
    by itself and in epochs of its own.
    Raises BadInput where nothing can be planned.
    """
    lengths_D = np.array(lengths, dtype=np.int64)
    if lengths_D.ndim != 1 or not lengths_D.size:
        raise BadInput("there are no documents to lay out in lanes (0 documents)")
    if lengths_D.min() < 0:
        raise BadInput(f"a document cannot have {lengths_D.min()} tokens")
    if lanes < 1:
        raise BadInput(f"{lanes} lanes cannot read {lengths_D.size} documents; at least 1 lane is needed")
    if window < 1 or segment < 1 or segment % window:
        raise BadInput(f"segment {segment} is not a multiple of the window {window}")
    if align not in ("block", "segment"):
        raise BadInput(f"align is {align!r}; it must be block or segment")
    if order not in ("seeded", "longest"):
        raise BadInput(f"order is {order!r}; it must be seeded or longest")
    if epoch < 0 or (epochs is not None and epochs < 1):
        raise BadInput(f"epoch {epoch} must not be negative, and epochs {epochs} must be at least 1")
    if mixture is not None:
        if epochs is not None or order != "seeded":
            raise BadInput(
                f"a mixture of corpora goes on for ever, in seeded order: epochs {epochs}, order {order} do not fit it"
            )
        mixture.check(lengths_D.size)
    lengths_D.flags.writeable = False
    return LanePlan(lengths_D, lanes, segment, window, seed, epoch, align, epochs, order, mixture)


def document_order(lengths_D: np.ndarray, order: Order, seed: int, epoch: int) -> np.ndarray:
    """The documents of one epoch in reading order."""
    if order == "longest":
        order_D = np.argsort(-lengths_D, kind="stable")
        return order_D.astype(np.int32) if len(lengths_D) <= 2**31 else order_D
    return shuffled(len(lengths_D), seed, epoch)
