"""Mixing: what was read of each corpus keeps to its weight, and every corpus goes through its documents by itself."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brt_dist.data.errors import BadInput
from brt_dist.data.lanes import LanePlan, plan_lanes
from brt_dist.data.mixture import Mixture, mixture_by_name

NAMES = ("books", "code", "wiki")


def mixed(corpora: list[np.ndarray], weights: list[float], lanes: int, unit: int, **others: Any) -> LanePlan:
    """The plan of a mixture; a position is one unit, unless `segment` is told."""
    corpus_of = np.repeat(np.arange(len(corpora)), [len(lengths) for lengths in corpora])
    mixture = Mixture(corpus_of, tuple(weight / sum(weights) for weight in weights))
    return plan_lanes(np.concatenate(corpora), lanes, others.pop("segment", unit), unit, mixture=mixture, **others)


def largest_surplus(plan: LanePlan, positions: int) -> float:
    """The most by which what was read of a corpus was ever off its weight's share of all, in tokens."""
    assert plan.mixture is not None
    read, weights = np.zeros(len(plan.mixture.weights)), np.array(plan.mixture.weights)
    most = 0.0
    for position in range(positions):
        step = plan.at(position)
        np.add.at(read, plan.mixture.corpus_of[step.document_P], step.count_P)
        most = max(most, float(np.abs(read - weights * read.sum()).max()))
    return most


lengths = st.one_of(
    st.lists(st.integers(0, 80), min_size=1, max_size=12),
    st.builds(lambda count, length: [length] * count, st.integers(1, 5), st.integers(0, 80)),
)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(lengths, st.integers(1, 30)), min_size=2, max_size=4),
    st.integers(1, 40),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, 2**32 - 1),
)
def test_at_every_step_each_corpus_is_within_a_document_of_its_weight(
    corpora: list[tuple[list[int], int]], lanes: int, unit: int, seed: int
) -> None:
    plan = mixed([np.array(each) for each, _ in corpora], [weight for _, weight in corpora], lanes, unit, seed=seed)
    longest = int(plan.lengths.max()) + 1
    # All lanes may end documents at once, and what those lack of their last units is read of no corpus.
    assert largest_surplus(plan, 80) <= longest + lanes * unit / 8


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("spread", [0.0, 0.4])
def test_books_and_short_files_keep_within_a_book_in_a_thousand_lanes(share: float, spread: float) -> None:
    generator = np.random.default_rng(0)
    books, code = (
        np.minimum(mean * generator.lognormal(0, spread, count), 3 * mean).astype(int)
        for mean, count in ((100_000, 300), (2_000, 3_000))
    )
    plan = mixed([books, code], [share, 1 - share], lanes=1024, unit=512, segment=2048)
    # Every lane ends a book at least once.
    assert largest_surplus(plan, 110) <= books.max() + 1


def test_a_rare_long_document_is_drawn_as_early_as_late() -> None:
    # Half a document before the weights ask for it, so that it brings no more than half of it too much.
    corpora = [np.full(count, length) for count, length in ((3, 200), (4, 16), (4, 0))]
    assert largest_surplus(mixed(corpora, [30, 2, 968], lanes=31, unit=8), 700) <= 201


def test_documents_that_end_together_are_known_to_lack_a_part_of_their_last_unit() -> None:
    corpora = [np.full(20, 200), np.full(50, 15)]
    assert largest_surplus(mixed(corpora, [1, 1], lanes=128, unit=8), 400) <= 201


def test_every_corpus_is_shuffled_by_itself_and_read_whole_before_it_is_read_again() -> None:
    generator = np.random.default_rng(1)
    corpora = [generator.integers(0, 60, count) for count in (40, 25, 10)]
    plan = mixed(corpora, [1, 1, 2], lanes=3, unit=8)
    corpus_of = np.repeat(np.arange(3), [40, 25, 10])
    begun = np.zeros(75, dtype=np.int64)
    orders: list[list[int]] = [[], [], []]
    for position in range(600):
        step = plan.at(position)
        for lane_pieces in step.pieces:
            for piece in lane_pieces:
                if piece.offset == 0:
                    begun[piece.document] += 1
                    orders[corpus_of[piece.document]].append(piece.document)
        for corpus in range(3):
            of_corpus = begun[corpus_of == corpus]
            assert of_corpus.max() - of_corpus.min() <= 1
    assert begun[corpus_of == 2].min() > begun[corpus_of == 0].max() > 2
    for order, size in zip(orders, (40, 25, 10), strict=True):
        assert order[:size] != order[size : 2 * size]
        assert sorted(order[:size]) != order[:size]


def test_a_corpus_of_weight_0_is_left_out() -> None:
    plan = mixed([np.full(5, 9), np.full(5, 500), np.full(5, 7)], [1, 0, 3], lanes=4, unit=8)
    shown = {int(document) for position in range(100) for document in plan.at(position).document_P}
    assert shown == {*range(5), *range(10, 15)}
    # Its documents neither lengthen the horizon nor change anything else.
    other = mixed([np.full(5, 9), np.full(5, 3), np.full(5, 7)], [1, 0, 3], lanes=4, unit=8)
    assert all(plan.at(position).pieces == other.at(position).pieces for position in range(50))


def digest(plan: LanePlan, positions: int) -> str:
    """Of all that the lanes read."""
    found = hashlib.blake2b(digest_size=16)
    for position in range(positions):
        step = plan.at(position)
        for array in (step.lane_P, step.document_P, step.offset_P, step.column_P, step.count_P):
            found.update(array.astype("<i8").tobytes())
    return found.hexdigest()


def example(**others: Any) -> LanePlan:
    return plan_lanes([(index * 7919) % 400 for index in range(1000)], 7, 64, 16, seed=3, **others)


def test_plans_never_change() -> None:
    # Fixed for ever: a resumed run relies on it. The first two were so before there were mixtures.
    found = [(plan.hash, digest(plan, 200)) for plan in (example(), example(align="segment"))]
    assert found == [
        ("66fd535998080003c70c36ab45e412f7", "17cc07867a5b7e3825b7aa603a7503f8"),
        ("eaea6dfbc052bacd26ccbc9bc607500b", "1defe677f705f15b390b3e279d3462e9"),
    ]
    plan = example(mixture=Mixture(np.arange(1000) % 3, (0.5, 0.3, 0.2)))
    assert (plan.hash, digest(plan, 200)) == ("a94c783e0998ee131eda032c5a38f84f", "9eed908de2acaf7698f3b21fb0bda145")


def test_a_mixed_plan_is_the_same_whatever_was_asked_before_and_by_whom() -> None:
    mixture = Mixture(np.arange(1000) % 3, (0.5, 0.3, 0.2))
    whole = example(mixture=mixture)
    steps = [whole.at(position).pieces for position in range(120)]
    shuffled = example(mixture=mixture)
    for position in np.random.default_rng(2).permutation(120).tolist():
        assert shuffled.at(position).pieces == steps[position]
    resumed = example(mixture=mixture)
    assert resumed.at(100).of(range(2)) + resumed.at(100).of(range(2, 7)) == steps[100]
    assert whole.hash == shuffled.hash == resumed.hash


def test_the_hash_tells_weights_and_corpora_apart() -> None:
    corpus_of = np.arange(1000) % 2
    mixtures = [
        None,
        Mixture(corpus_of, (0.5, 0.5)),
        Mixture(corpus_of, (0.25, 0.75)),
        Mixture(1 - corpus_of, (0.5, 0.5)),
        Mixture(corpus_of, (0.5, 0.5, 0.0)),
    ]
    assert len({example(mixture=mixture).hash for mixture in mixtures}) == len(mixtures)


def test_padding_is_exact_over_an_epoch_and_what_a_mixture_comes_to() -> None:
    plan = plan_lanes([3, 8, 15], lanes=1, segment=8, window=4, epochs=1)
    # Documents of 4, 9 and 16 positions take 1, 3 and 4 blocks: 3 positions of 32 are padding.
    assert plan.padding == 3 / 32
    corpora = [np.random.default_rng(3).integers(0, 60, 50), np.full(50, 2)]
    endless = mixed(corpora, [3, 1], lanes=6, unit=8)
    predicted = sum(endless.at(position).predicted for position in range(1500))
    assert endless.padding == pytest.approx(1 - predicted / (1500 * 6 * 8), abs=0.003)
    assert endless.padding > plan_lanes(np.concatenate(corpora[:1]), 6, 8, 8).padding + 0.1


def test_a_finite_or_sorted_plan_with_a_mixture_is_refused() -> None:
    for others in ({"epochs": 1}, {"order": "longest"}):
        with pytest.raises(BadInput, match="goes on for ever"):
            example(mixture=Mixture(np.zeros(1000, np.int64), (1.0,)), **others)


@pytest.mark.parametrize(
    ("corpus_of", "weights", "said"),
    [
        ([0, 1], (0.5, 0.5), "3 documents, and corpora are told for 2"),
        ([0, 1, 2], (0.5, 0.5), "2 weights, and corpora up to number 2"),
        ([0, 0, 0], (0.5, 0.5), "corpus 1 has weight 0.5 and no document"),
        ([0, 1, 1], (1.5, -0.5), "must not be negative"),
        ([0, 1, 1], (0.5, 0.6), "their sum must be 1"),
    ],
)
def test_a_mixture_that_does_not_fit_its_documents_is_refused(corpus_of: list[int], weights: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        plan_lanes([1, 2, 3], 1, 8, 8, mixture=Mixture(np.array(corpus_of), weights))


def test_weights_are_shares_by_name_in_the_order_of_the_corpora() -> None:
    corpus_of = np.array([0, 1, 2])
    mixture = mixture_by_name(NAMES, corpus_of, {"wiki": 1, "books": 3, "code": 0}, "shards")
    assert mixture is not None
    assert mixture.weights == (0.75, 0.0, 0.25)
    assert mixture_by_name(NAMES, corpus_of, {}, "shards") is None


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"book": 1.0}, "names the corpus 'book', but those of shards are: books, code, wiki"),
        ({"books": 1.0, "code": 1.0}, "does not name the corpus 'wiki' of shards"),
        ({"books": 1.0, "code": 1.0, "wiki": 0.5}, "data.weights.wiki is 0.5, but shards holds no document of 'wiki'"),
    ],
)
def test_weights_that_do_not_fit_the_shards_are_one_line(weights: dict[str, float], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        mixture_by_name(NAMES, np.array([0, 1, 1]), weights, "shards")


def test_a_single_corpus_without_a_name_is_told_when_weights_name_one() -> None:
    with pytest.raises(BadInput, match="but those of shards are: a single one, without a name"):
        mixture_by_name(("",), np.array([0, 0]), {"books": 1.0}, "shards")
