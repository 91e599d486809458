"""The tokenizer's sample is a fair one, and the same for every number of ranks and every order of reading."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest

from preprocessing.ranks import Ranks
from preprocessing.sample import BLOCK, Block, Sample

TEXTS = {f"document {number}": f"{number:04} {'word ' * 30}\n" * 100 for number in range(200)}
SIZE = len(TEXTS["document 0"])


class ThreadRanks(Ranks):
    """Ranks that are threads of one process."""

    def __init__(self, rank: int, size: int, shared: list[Any], barrier: Barrier):
        self.rank, self.size, self.shared, self.barrier = rank, size, shared, barrier

    def gather(self, value: Any) -> list[Any]:
        values = self._all(value)
        return values if self.rank == 0 else []

    def lead(self, act: Callable[[], Any]) -> Any:
        return self._all(act() if self.rank == 0 else None)[0]

    def _all(self, value: Any) -> list[Any]:
        self.shared[self.rank] = value
        self.barrier.wait(timeout=20)
        values = list(self.shared)
        self.barrier.wait(timeout=20)
        return values


def sampled(room: int, ranks: int = 1, order: int = 0, seed: int = 0) -> list[Block]:
    """The sample that `ranks` agree on when documents are dealt out to them at random."""
    names = list(TEXTS)
    draw = random.Random(order)
    shuffled = draw.sample(names, len(names))
    owner = {name: draw.randrange(ranks) for name in names}
    shared, barrier = [None] * ranks, Barrier(ranks)

    def take_part(rank: int) -> list[Block]:
        sample = Sample(room, seed)
        for name in shuffled:
            if owner[name] == rank:
                sample.offer(names.index(name) // 10, names.index(name) % 10, name, (0, 0), TEXTS[name])
        return sample.agreed(ThreadRanks(rank, ranks, shared, barrier))

    with ThreadPoolExecutor(ranks) as threads:
        return next(iter(threads.map(take_part, range(ranks))))


@pytest.mark.parametrize("room", [50_000, 300_000, 10**9])
def test_the_sample_is_the_same_for_every_number_of_ranks_and_every_order(room: int):
    expected = sampled(room)
    assert expected
    for ranks, order in ((1, 1), (2, 2), (3, 3)):
        assert sampled(room, ranks, order) == expected


def test_a_sample_that_has_room_for_all_is_all_of_it_in_the_order_of_the_corpus():
    assert "".join(block.text for block in sampled(10**9)) == "".join(TEXTS.values())


def test_a_sample_fills_its_room_from_all_over_the_corpus():
    room = 400_000
    blocks = sampled(room)
    assert room - BLOCK < sum(block.size for block in blocks) <= room
    by_document = Counter((block.unit, block.number) for block in blocks)
    # An eighth of all blocks, of which each document has four: one expects 83 documents in it.
    assert 65 < len(by_document) < 100
    assert len({block.offset for block in blocks}) == 4


def test_another_seed_is_another_sample():
    assert sampled(50_000, seed=1) != sampled(50_000)
