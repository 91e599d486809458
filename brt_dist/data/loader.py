"""Batches of tokens, cut out of memory-mapped documents by the lane plan and read ahead in the background.

Dimension key
  B  lanes of this reader    L  tokens in a segment    C  blocks in a segment
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from brt_dist.data.lanes import LanePlan, Piece, Step

IGNORED_TARGET = -100


class TokenSource(Protocol):
    """Documents as the reader needs them: `brt_dist.data.token_shards.Documents`, or a part of one."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, EOS not counted; int64."""

    def tokens(self, index: int, first: int = 0, count: int | None = None) -> np.ndarray:
        """`count` tokens of one document from `first` on; no copy is made."""


@dataclass(frozen=True, eq=False)
class Batch:
    """One segment of some lanes.

    starts_BC is True where a document begins in front of a block. predicted counts the targets of all lanes of the
    step, those of other ranks included; it is what a step's loss is divided by.
    """

    tokens_BL: Tensor
    targets_BL: Tensor
    starts_BC: Tensor
    predicted: int
    position: int
    step: Step | None = None  # what all lanes read; None where tokens come from no documents
    lanes: range = range(0)

    @cached_property
    def pieces(self) -> tuple[tuple[Piece, ...], ...]:
        """The pieces of every lane of the batch."""
        return self.step.of(self.lanes) if self.step is not None else ()


def read_batch(documents: TokenSource, plan: LanePlan, eos: int, position: int, lanes: range) -> Batch:
    """Reads what `lanes` (global numbers, without gaps) show at `position`.

    A document's inputs are EOS and its tokens, its targets its tokens and EOS. Padding has input EOS and target -100.
    """
    step = plan.at(position)
    part = slice(*np.searchsorted(step.lane_P, [lanes.start, lanes.stop]).tolist())
    row_P, column_P, count_P = step.lane_P[part] - lanes.start, step.column_P[part], step.count_P[part]
    begins_P = step.offset_P[part] == 0
    # The token in front of a piece is its first input; in front of a document that is EOS.
    first_P = np.maximum(step.offset_P[part] - 1, 0)
    # A token is the target of one position and the input of the next; EOS stands wherever no document does.
    shown_BL = np.full((len(lanes), plan.segment + 1), eos, dtype=np.int32)
    _copy_tokens(
        documents,
        (step.document_P[part], first_P, count_P + ~begins_P, row_P * (plan.segment + 1) + column_P + begins_P),
        shown_BL.reshape(-1),
    )
    tokens_BL, targets_BL = shown_BL[:, :-1].astype(np.int64), shown_BL[:, 1:].astype(np.int64)
    # A plan may end a document before its last token, which then stands behind its last input.
    tokens_BL[row_P[begins_P], column_P[begins_P]] = eos
    place_P = row_P * plan.segment + column_P
    behind = np.concatenate([[0], place_P + count_P])
    _pad(tokens_BL, targets_BL, eos, behind, np.concatenate([place_P, [tokens_BL.size]]))
    starts_BC = np.zeros((len(lanes), plan.segment // plan.window), dtype=np.bool_)
    starts_BC[row_P[begins_P], column_P[begins_P] // plan.window] = True
    tensors = [torch.from_numpy(array) for array in (tokens_BL, targets_BL, starts_BC)]
    return Batch(tensors[0], tensors[1], tensors[2], step.predicted, position, step, lanes)


def _copy_tokens(documents: TokenSource, pieces: tuple[np.ndarray, ...], shown: np.ndarray) -> None:
    """Copies pieces, given as arrays of document, first token, most tokens, and place in `shown`."""
    # Plain numbers, and no object for each piece: a batch has thousands, and Python's collector would go through them.
    for document, first, count, place in zip(*(array.tolist() for array in pieces), strict=True):
        read = documents.tokens(document, first, count)
        shown[place : place + len(read)] = read


def _pad(tokens_BL: np.ndarray, targets_BL: np.ndarray, eos: int, first: np.ndarray, last: np.ndarray) -> None:
    """Nothing is predicted from each place of `first` to that of `last`, the lanes laid end to end."""
    tokens, targets = tokens_BL.reshape(-1), targets_BL.reshape(-1)
    gaps = first < last
    for begin, end in zip(first[gaps].tolist(), last[gaps].tolist(), strict=True):
        tokens[begin:end] = eos
        targets[begin:end] = IGNORED_TARGET


class _End:
    """Put behind the last batch; with the reader's error, if that is why it is the last."""

    def __init__(self, error: BaseException | None = None):
        self.error = error


class Loader:
    """Iterates over the batches of `lanes` from position `first` on; a thread reads up to `prefetch` ahead.

    An error of the thread is raised once, by the `next` that would have given the batch; afterwards, and behind the
    end of a finite plan, iteration is over. After `close`, which any thread may call, it is over as well.
    """

    def __init__(
        self, documents: TokenSource, plan: LanePlan, eos: int, lanes: range, first: int = 0, prefetch: int = 4
    ) -> None:
        if prefetch < 1:
            raise ValueError(f"prefetch is {prefetch}; at least 1 batch must fit the queue")
        self._documents, self._plan, self._eos, self._lanes = documents, plan, eos, lanes
        self._ready: queue.Queue[Batch | _End] = queue.Queue(prefetch)
        self._closing = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._read, args=(first,), name="lane loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._ended:
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, Batch):
            return item
        self._ended = True
        if item.error is not None:
            raise item.error
        raise StopIteration

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, patience: float = 10.0) -> None:
        """Ends the thread; a read that hangs is left behind after `patience` seconds."""
        self._closing.set()
        self._empty()  # makes room for the one batch that the thread may be holding
        self._thread.join(patience)
        self._ended = True
        self._empty()
        with suppress(queue.Full):
            self._ready.put_nowait(_End())  # wakes a consumer that waits in another thread

    def _empty(self) -> None:
        while True:
            try:
                self._ready.get_nowait()
            except queue.Empty:
                return

    def _read(self, position: int) -> None:
        try:
            positions = self._plan.positions
            while not self._closing.is_set() and (positions is None or position < positions):
                self._ready.put(read_batch(self._documents, self._plan, self._eos, position, self._lanes))
                position += 1
        except BaseException as error:
            self._ready.put(_End(error))
        else:
            if not self._closing.is_set():
                self._ready.put(_End())
