"""Scores whole documents, each from its first token to its last, with the carry going from segment to segment.

Dimension key
  B  lanes    L  tokens in a segment    C  blocks in a segment
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from brt_dist.data.errors import BadInput
from brt_dist.data.lanes import Align, plan_lanes
from brt_dist.data.loader import Batch, Loader, TokenSource

Progress = Callable[[int, int], None]


class LanguageModel(Protocol):
    """What is asked of a model here; `BlockRecurrentTransformer` is one."""

    training: bool
    config: Any  # has .window, the tokens of a block

    def token_losses(
        self, tokens: Tensor, targets: Tensor, carry: Any = None, starts: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """nats_BL of every target (0 where it is -100), and the carry."""

    def forget_state(self, carry: Any) -> Any:
        """The carry with its states as at the start of a document, its caches as they are."""

    def train(self, mode: bool = True) -> Any:
        """Switches dropout on or off."""


class ChosenDocuments:
    """Some documents of a source, by their index there."""

    def __init__(self, documents: TokenSource, indices: np.ndarray):
        self._documents, self._indices = documents, indices
        self.lengths = documents.lengths[indices]

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, index: int, first: int = 0, count: int | None = None) -> np.ndarray:
        """As the source gives them."""
        return self._documents.tokens(int(self._indices[index]), first, count)


def score_documents(
    model: LanguageModel,
    documents: TokenSource,
    eos: int,
    *,
    lanes: int,
    segment: int,
    clear_every: int | None = None,
    forget_state: bool = False,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    limit_tokens: int | None = None,
) -> list[np.ndarray]:
    """Nats of every predicted position of every document: float32, n + 1 for a document of n tokens.

    Documents keep their order, and their values depend neither on `lanes` nor on each other, but for rounding, and not
    on `segment` either without `forget_state`. The model's training mode is as before when this returns, and so is
    every carry held elsewhere.

    clear_every     the carry is cleared in front of every position that is a multiple of it
    forget_state    the states alone are put back in front of every position that is a multiple of `segment`
    progress        called with the positions scored so far and their total
    limit_tokens    only so many positions of each document, from its first on

    Raises BadInput where sizes do not fit.
    """
    window = model.config.window
    check_clear_every(clear_every, window)
    if limit_tokens is not None and limit_tokens < 1:
        raise BadInput(f"{limit_tokens} tokens of each document are to be scored; at least 1 is needed")
    shown = documents.lengths if limit_tokens is None else np.minimum(documents.lengths, limit_tokens - 1)
    lanes = min(lanes, max(len(shown), 1))
    # A state can be exchanged in front of a segment only, so documents must begin there too.
    align: Align = "segment" if forget_state else "block"
    plan = plan_lanes(shown, lanes, segment, window, epochs=1, order="longest", align=align)
    nats = [np.empty(length + 1, dtype=np.float32) for length in shown.tolist()]
    done, total, carry = 0, int(shown.sum()) + len(shown), None
    # Not inference_mode: a mask or table that the model made there and kept could not be used in training afterwards.
    with torch.no_grad(), _without_dropout(model), Loader(documents, plan, eos, range(lanes)) as batches:
        for batch in batches:
            starts_BC = batch.starts_BC if clear_every is None else batch.starts_BC | _clearings(batch, clear_every)
            if forget_state and carry is not None:
                carry = model.forget_state(carry)
            tensors = (batch.tokens_BL.to(device), batch.targets_BL.to(device), carry, starts_BC.to(device))
            nats_BL, carry = model.token_losses(*tensors)
            _keep(nats, nats_BL.float().cpu().numpy(), batch)
            done += batch.predicted
            if progress is not None:
                progress(done, total)
    return nats


def check_clear_every(clear_every: int | None, window: int) -> None:
    """BadInput unless a carry can be cleared so often: only in front of a block."""
    if clear_every is not None and (clear_every < 1 or clear_every % window):
        raise BadInput(
            f"the carry cannot be cleared every {clear_every} tokens: not a multiple of the window, {window}"
        )


def balanced_lanes(lengths: np.ndarray, most: int) -> int:
    """Lanes in which a single pass over documents of these lengths leaves few lanes idle; `most` at most.

    A pass takes no less than its longest document, so that lanes beyond the total over the longest only wait for it.
    """
    positions = np.asarray(lengths, dtype=np.int64) + 1
    return max(1, min(most, len(positions), -(-int(positions.sum()) // int(positions.max(initial=1)))))


def _clearings(batch: Batch, clear_every: int) -> Tensor:
    """True in front of every block that begins at a multiple of clear_every in its document; a multiple of the window.

    Documents begin at blocks, so every such position does.
    """
    clear_BC = torch.zeros_like(batch.starts_BC)
    window = batch.tokens_BL.shape[1] // batch.starts_BC.shape[1]
    for clear_C, pieces in zip(clear_BC, batch.pieces, strict=True):
        for piece in pieces:
            first = piece.column + -piece.offset % clear_every
            for column in range(first, piece.column + piece.count, clear_every):
                clear_C[column // window] = True
    return clear_BC


def _keep(nats: list[np.ndarray], nats_BL: np.ndarray, batch: Batch) -> None:
    for nats_L, pieces in zip(nats_BL, batch.pieces, strict=True):
        for piece in pieces:
            scored = nats_L[piece.column : piece.column + piece.count]
            nats[piece.document][piece.offset : piece.offset + piece.count] = scored


@contextmanager
def _without_dropout(model: LanguageModel) -> Iterator[None]:
    training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(training)
