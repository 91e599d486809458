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
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from brt_dist.data.lanes import LanePlan, Piece

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
    pieces: tuple[tuple[Piece, ...], ...]


def read_batch(documents: TokenSource, plan: LanePlan, eos: int, position: int, lanes: range) -> Batch:
    """Reads what `lanes` (global numbers) show at `position`.

    A document's inputs are EOS and its tokens, its targets its tokens and EOS. Padding has input EOS and target -100.
    """
    step = plan.at(position)
    pieces = step.of(lanes)
    tokens_BL = np.full((len(lanes), plan.segment), eos, dtype=np.int64)
    targets_BL = np.full((len(lanes), plan.segment), IGNORED_TARGET, dtype=np.int64)
    starts_BC = np.zeros((len(lanes), plan.segment // plan.window), dtype=np.bool_)
    for tokens_L, targets_L, starts_C, lane_pieces in zip(tokens_BL, targets_BL, starts_BC, pieces, strict=True):
        for piece in lane_pieces:
            end = piece.column + piece.count
            _read_piece(documents, eos, piece, tokens_L[piece.column : end], targets_L[piece.column : end])
            if piece.offset == 0:
                starts_C[piece.column // plan.window] = True
    tensors = [torch.from_numpy(array) for array in (tokens_BL, targets_BL, starts_BC)]
    return Batch(tensors[0], tensors[1], tensors[2], step.predicted, position, pieces)


def _read_piece(documents: TokenSource, eos: int, piece: Piece, inputs: np.ndarray, targets: np.ndarray) -> None:
    """Fills views of `piece.count` inputs and targets; position p has input token p - 1 and target token p."""
    first, last = piece.offset, piece.offset + piece.count
    before = max(first - 1, 0)
    behind = min(last, int(documents.lengths[piece.document]))
    read = documents.tokens(piece.document, before, behind - before)
    if first == 0:
        inputs[0] = eos
        inputs[1:] = read[: piece.count - 1]
    else:
        inputs[:] = read[: piece.count]
    seen = read[first - before :]
    targets[: len(seen)] = seen
    targets[len(seen) :] = eos


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
