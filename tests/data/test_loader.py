"""Batches: inputs EOS + tokens, targets tokens + EOS, starts, padding; and the thread that reads them ahead."""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brt_dist.data.lanes import LanePlan, plan_lanes
from brt_dist.data.loader import IGNORED_TARGET, Loader, read_batch

EOS = 1


class InMemory:
    """Documents in one array, as a shard holds them; counts its reads, and fails or waits where it is told to."""

    def __init__(self, texts: list[list[int]], fail_at: int | None = None, gate: threading.Event | None = None):
        self.flat = np.array([token for text in texts for token in text], dtype=np.uint16)
        self.lengths = np.array([len(text) for text in texts], dtype=np.int64)
        self.first = np.cumsum([0, *self.lengths])
        self.reads, self.fail_at, self.gate = 0, fail_at, gate

    def tokens(self, index: int, first: int = 0, count: int | None = None) -> np.ndarray:
        self.reads += 1
        if self.gate is not None:
            self.gate.wait()
        if self.fail_at is not None and self.reads >= self.fail_at:
            raise OSError("the disk is gone")
        start, stop = int(self.first[index]), int(self.first[index + 1])
        return self.flat[start + first : stop if count is None else min(stop, start + first + count)]


def numbered(lengths: list[int]) -> InMemory:
    """Documents whose token p is 100 * document + p + 2."""
    return InMemory([[100 * document + p + 2 for p in range(n)] for document, n in enumerate(lengths)])


def small(lengths: list[int] | None = None, **changes: Any) -> tuple[InMemory, LanePlan]:
    documents = numbered(lengths or [13, 4, 7, 1])
    return documents, plan_lanes(documents.lengths, **{"lanes": 2, "segment": 8, "window": 4, **changes})


def test_inputs_begin_with_eos_targets_end_with_it_and_padding_is_ignored() -> None:
    documents, plan = small([5], lanes=1, epochs=1)
    batch = read_batch(documents, plan, EOS, 0, range(1))
    assert batch.tokens_BL.tolist() == [[EOS, 2, 3, 4, 5, 6, EOS, EOS]]
    assert batch.targets_BL.tolist() == [[2, 3, 4, 5, 6, EOS, IGNORED_TARGET, IGNORED_TARGET]]
    assert batch.starts_BC.tolist() == [[True, False]]
    assert (batch.predicted, batch.position) == (6, 0)
    assert batch.tokens_BL.dtype == batch.targets_BL.dtype == torch.int64
    assert batch.starts_BC.dtype == torch.bool


def test_the_first_token_of_a_segment_is_the_last_target_of_the_one_before() -> None:
    documents, plan = small([30], lanes=1, epochs=1)
    batches = [read_batch(documents, plan, EOS, position, range(1)) for position in range(plan.positions or 0)]
    for before, behind in pairwise(batches):
        assert behind.tokens_BL[0, 0] == before.targets_BL[0, -1]
        assert not behind.starts_BC.any()


def test_an_empty_document_is_one_prediction_of_its_end() -> None:
    documents, plan = small([0], lanes=1, epochs=1)
    batch = read_batch(documents, plan, EOS, 0, range(1))
    assert batch.targets_BL.tolist() == [[EOS, *[IGNORED_TARGET] * 7]]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=12),
    st.integers(1, 4),
    st.sampled_from(["block", "segment"]),
)
def test_every_lane_laid_end_to_end_gives_back_whole_documents(lengths: list[int], lanes: int, align: Any) -> None:
    documents = numbered(lengths)
    plan = plan_lanes(documents.lengths, lanes, segment=8, window=4, align=align, epochs=1)
    batches = [read_batch(documents, plan, EOS, p, range(lanes)) for p in range(plan.positions or 0)]
    tokens, targets = (torch.cat([getattr(b, name) for b in batches], 1) for name in ("tokens_BL", "targets_BL"))
    starts = torch.cat([batch.starts_BC for batch in batches], 1)
    read = []
    for tokens_L, targets_L, starts_C in zip(tokens, targets, starts, strict=True):
        first_columns = (starts_C.nonzero().flatten() * 4).tolist()
        for first, last in zip(first_columns, [*first_columns, len(tokens_L)][1:], strict=True):
            kept = targets_L[first:last] != IGNORED_TARGET
            shown = int(kept.sum())
            assert kept[:shown].all()
            inputs, outputs = tokens_L[first:last][kept].tolist(), targets_L[first:last][kept].tolist()
            assert inputs == [EOS, *outputs[:-1]]
            assert outputs[-1] == EOS
            assert (tokens_L[first + shown : last] == EOS).all()
            read.append(outputs[:-1])
    assert sorted(read) == sorted(documents.tokens(d).tolist() for d in range(len(lengths)))


def test_ranks_that_share_the_lanes_read_what_one_would_and_know_the_same_predicted_count() -> None:
    documents, plan = small(lanes=4)
    for position in range(5):
        whole = read_batch(documents, plan, EOS, position, range(4))
        parts = [read_batch(documents, plan, EOS, position, lanes) for lanes in (range(1), range(1, 4))]
        for name in ("tokens_BL", "targets_BL", "starts_BC"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
        assert {part.predicted for part in parts} == {whole.predicted}
        assert whole.predicted == int((whole.targets_BL != IGNORED_TARGET).sum())
        assert parts[0].pieces + parts[1].pieces == whole.pieces


def test_a_plan_that_shows_only_the_first_positions_predicts_tokens_there_and_no_end() -> None:
    documents = numbered([20])
    plan = plan_lanes([5], 1, 8, 4, epochs=1)
    batch = read_batch(documents, plan, EOS, 0, range(1))
    assert batch.targets_BL.tolist() == [[2, 3, 4, 5, 6, 7, IGNORED_TARGET, IGNORED_TARGET]]


def test_behind_the_first_positions_of_a_longer_document_comes_padding_or_the_next_start() -> None:
    documents = numbered([20, 20])
    # 8 positions fill two blocks, 6 positions leave padding.
    for length, columns in ((7, [0, 8]), (5, [0, 6, 7, 8, 14, 15])):
        batch = read_batch(documents, plan_lanes([length, length], 1, 16, 4, epochs=1), EOS, 0, range(1))
        assert [column for column, token in enumerate(batch.tokens_BL[0].tolist()) if token == EOS] == columns


def test_the_loader_gives_the_batches_of_the_plan_from_any_position_on() -> None:
    documents, plan = small()
    for first in (0, 3):
        with Loader(documents, plan, EOS, range(2), first) as loader:
            for position in range(first, first + 7):
                batch, expected = next(loader), read_batch(documents, plan, EOS, position, range(2))
                assert batch.position == position
                assert torch.equal(batch.tokens_BL, expected.tokens_BL)
                assert torch.equal(batch.targets_BL, expected.targets_BL)


def test_the_loader_of_a_finite_plan_ends_with_it_and_stays_ended() -> None:
    documents, plan = small(epochs=1)
    with Loader(documents, plan, EOS, range(2)) as loader:
        assert [batch.position for batch in loader] == list(range(plan.positions or 0))
        assert list(loader) == []


def test_the_loader_reads_ahead_as_far_as_its_queue_and_no_further() -> None:
    documents, plan = small([4000], lanes=1)
    with Loader(documents, plan, EOS, range(1), prefetch=3) as loader:
        next(loader)
        deadline = time.monotonic() + 10
        while documents.reads < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        # One was taken, three wait in the queue, and the thread holds one more.
        assert documents.reads == 5


def test_a_slow_reader_loses_nothing() -> None:
    documents, plan = small(epochs=1)
    documents.gate = threading.Event()
    with Loader(documents, plan, EOS, range(2)) as loader:
        threading.Timer(0.1, documents.gate.set).start()
        assert sum(int((batch.targets_BL != IGNORED_TARGET).sum()) for batch in loader) == 25 + 4


def test_an_error_of_the_reader_comes_behind_the_good_batches_and_once() -> None:
    documents, plan = small([4000], lanes=1)
    documents.fail_at = 4
    with Loader(documents, plan, EOS, range(1)) as loader:
        assert [next(loader).position for _ in range(3)] == [0, 1, 2]
        with pytest.raises(OSError, match="the disk is gone"):
            next(loader)
        with pytest.raises(StopIteration):
            next(loader)


def test_closing_ends_the_thread_whatever_it_does() -> None:
    documents, plan = small()
    for wait in (0.0, 0.05):  # while it reads, and while it waits for room in the queue
        loader = Loader(documents, plan, EOS, range(2), prefetch=1)
        time.sleep(wait)
        loader.close()
        assert not loader._thread.is_alive()
        loader.close()
        with pytest.raises(StopIteration):
            next(loader)


def test_closing_wakes_a_consumer_that_waits() -> None:
    documents, plan = small()
    documents.gate = threading.Event()  # never set before the end: no batch comes
    loader = Loader(documents, plan, EOS, range(2))
    got: list[object] = []
    consumer = threading.Thread(target=lambda: got.extend(loader), daemon=True)
    consumer.start()
    time.sleep(0.05)
    loader.close(patience=0.05)
    consumer.join(10)
    documents.gate.set()
    assert not consumer.is_alive()
    assert got == []


def test_a_queue_without_room_is_refused() -> None:
    documents, plan = small()
    with pytest.raises(ValueError, match="prefetch is 0"):
        Loader(documents, plan, EOS, range(2), prefetch=0)
