"""The lane plan: every position of every document once, in order, greedily, whatever was asked before."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brt_dist.data.lanes import LanePlan, Piece, document_order, plan_lanes

examples = settings(deadline=None, max_examples=40)


@dataclass(frozen=True)
class Visit:
    """One reading of a document: where in its lane it begins, and how many positions have been shown."""

    lane: int
    start: int  # in tokens of the lane
    document: int
    shown: int


plans = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(0, 70), min_size=1, max_size=40),
        "lanes": st.integers(1, 6),
        "segment": st.sampled_from([4, 8, 12]),
        "window": st.sampled_from([2, 4]),
        "seed": st.integers(0, 2**64 - 1),
        "epoch": st.integers(0, 5),
        "align": st.sampled_from(["block", "segment"]),
    }
)


def unit(arguments: dict[str, Any]) -> int:
    return arguments["window"] if arguments["align"] == "block" else arguments["segment"]


def visits(plan: LanePlan, positions: int) -> list[Visit]:
    """The readings that begin below `positions`, lane by lane; asserts that each is contiguous and in order."""
    found: list[Visit] = []
    steps = [plan.at(position).pieces for position in range(positions)]
    for lane in range(plan.lanes):
        for position, pieces in enumerate(steps):
            column = 0
            for piece in pieces[lane]:
                assert piece.column >= column
                assert piece.count >= 1
                assert piece.column + piece.count <= plan.segment
                column = piece.column + piece.count
                where = position * plan.segment + piece.column
                if piece.offset == 0:
                    found.append(Visit(lane, where, piece.document, piece.count))
                else:
                    before = found.pop()
                    assert before.lane == lane
                    assert before.document == piece.document
                    assert before.shown == piece.offset
                    assert before.start + piece.offset == where
                    found.append(Visit(lane, before.start, piece.document, before.shown + piece.count))
    return found


@examples
@given(plans)
def test_one_epoch_reads_every_position_of_every_document_exactly_once(arguments: dict[str, Any]) -> None:
    plan = plan_lanes(**arguments, epochs=1)
    positions = plan.positions
    assert positions is not None
    seen = Counter(
        (piece.document, offset)
        for position in range(positions)
        for pieces in plan.at(position).pieces
        for piece in pieces
        for offset in range(piece.offset, piece.offset + piece.count)
    )
    assert seen == Counter((d, offset) for d, n in enumerate(arguments["lengths"]) for offset in range(n + 1))


@examples
@given(plans)
def test_documents_are_contiguous_in_their_lane_and_start_at_their_alignment(arguments: dict[str, Any]) -> None:
    plan = plan_lanes(**arguments, epochs=1)
    read = visits(plan, plan.positions or 0)
    assert all(visit.start % unit(arguments) == 0 for visit in read)
    assert all(visit.shown == arguments["lengths"][visit.document] + 1 for visit in read)


@examples
@given(plans)
def test_an_endless_plan_has_no_idle_block(arguments: dict[str, Any]) -> None:
    plan = plan_lanes(**arguments)
    size = unit(arguments)
    for position in range(12):
        for pieces in plan.at(position).pieces:
            taken = [(p.column // size + i) for p in pieces for i in range(-(-p.count // size))]
            assert taken == list(range(plan.segment // size))


@examples
@given(plans)
def test_the_next_document_goes_to_the_lane_that_is_free_first(arguments: dict[str, Any]) -> None:
    plan = plan_lanes(**arguments, epochs=2)
    size = unit(arguments)
    read = sorted(visits(plan, plan.positions or 0), key=lambda visit: (visit.start, visit.lane))
    expected = [
        int(document)
        for epoch in (arguments["epoch"], arguments["epoch"] + 1)
        for document in document_order(plan.lengths, "seeded", arguments["seed"], epoch)
    ]
    assert [visit.document for visit in read] == expected
    free = [0] * plan.lanes
    for visit in read:
        assert visit.start == min(free)
        assert visit.lane == free.index(min(free))
        free[visit.lane] += -(-visit.shown // size) * size


@examples
@given(plans, st.randoms(use_true_random=False))
def test_what_a_position_shows_does_not_depend_on_what_was_asked_before(arguments: dict[str, Any], random: Any) -> None:
    positions = list(range(15))
    in_order = plan_lanes(**arguments)
    expected = {position: in_order.at(position).pieces for position in positions}
    random.shuffle(positions)
    shuffled = plan_lanes(**arguments)
    assert {position: shuffled.at(position).pieces for position in positions} == expected


@examples
@given(plans)
def test_a_longer_plan_begins_as_a_shorter_one_of_the_same_documents(arguments: dict[str, Any]) -> None:
    one, two, endless = plan_lanes(**arguments, epochs=1), plan_lanes(**arguments, epochs=2), plan_lanes(**arguments)
    first = visits(one, one.positions or 0)
    assert set(first) <= set(visits(two, two.positions or 0))
    assert set(first) <= set(visits(endless, one.positions or 0)) | {
        visit for visit in first if visit.start + visit.shown > (one.positions or 0) * one.segment
    }


@examples
@given(plans)
def test_predicted_counts_the_targets_of_all_lanes(arguments: dict[str, Any]) -> None:
    plan = plan_lanes(**arguments, epochs=1)
    steps = [plan.at(position) for position in range(plan.positions or 0)]
    assert all(step.predicted == sum(p.count for pieces in step.pieces for p in pieces) for step in steps)
    assert sum(step.predicted for step in steps) == sum(n + 1 for n in arguments["lengths"])


@examples
@given(plans, st.data())
def test_any_share_of_the_lanes_reads_its_part_of_the_same_plan(arguments: dict[str, Any], data: Any) -> None:
    cut = data.draw(st.integers(0, arguments["lanes"]))
    step = plan_lanes(**arguments).at(3)
    assert step.of(range(cut)) + step.of(range(cut, arguments["lanes"])) == step.pieces


def test_a_plan_over_many_stretches_still_reads_everything_once() -> None:
    lengths = np.random.default_rng(5).integers(0, 40, 30_000)
    lengths[17] = 90_000  # spans many stretches in its lane
    plan = plan_lanes(lengths, lanes=5, segment=32, window=8, epochs=1)
    seen = np.zeros(len(lengths), dtype=np.int64)
    begun = np.zeros(len(lengths), dtype=np.int64)
    for position in range(plan.positions or 0):
        step = plan.at(position)
        assert np.all(np.diff(step.lane_P * plan.segment + step.column_P) > 0)
        np.add.at(seen, step.document_P, step.count_P)
        np.add.at(begun, step.document_P, step.offset_P == 0)
    assert np.array_equal(seen, lengths + 1)
    assert np.all(begun == 1)


def test_a_small_example_is_laid_out_as_by_hand() -> None:
    # Blocks of 2: documents of 5, 1 and 3 tokens take 3, 1 and 2 blocks; the longest goes first.
    plan = plan_lanes([3, 5, 1], lanes=2, segment=4, window=2, epochs=1, order="longest")
    assert plan.positions == 2
    assert plan.at(0).pieces == ((Piece(1, 0, 0, 4),), (Piece(0, 0, 0, 4),))
    assert plan.at(1).pieces == ((Piece(1, 4, 0, 2),), (Piece(2, 0, 0, 2),))


def test_the_seeded_order_never_changes() -> None:
    lengths = np.zeros(8, dtype=np.int64)
    # Fixed for ever: a resumed run relies on it.
    assert document_order(lengths, "seeded", 0, 0).tolist() == by_plain_integers(8, 0, 0)
    assert document_order(lengths, "seeded", 2**64 - 1, 3).tolist() == by_plain_integers(8, 2**64 - 1, 3)
    assert document_order(lengths, "seeded", 7, 1).tolist() == [0, 3, 2, 6, 5, 7, 4, 1]


def by_plain_integers(documents: int, seed: int, epoch: int) -> list[int]:
    def mixed(value: int) -> int:
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    stream = mixed((mixed(seed) + epoch) % 2**64)
    return sorted(range(documents), key=lambda index: mixed((stream + (index + 1) * 0x9E3779B97F4A7C15) % 2**64))


def test_epochs_and_seeds_have_different_orders_and_each_is_a_permutation() -> None:
    lengths = np.zeros(200, dtype=np.int64)
    orders = {tuple(document_order(lengths, "seeded", seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert all(sorted(order) == list(range(200)) for order in orders)


def test_every_document_is_equally_likely_to_come_first() -> None:
    lengths = np.zeros(10, dtype=np.int64)
    first = Counter(int(document_order(lengths, "seeded", seed, 0)[0]) for seed in range(5000))
    chi_squared = sum((first[d] - 500) ** 2 / 500 for d in range(10))
    assert chi_squared < 27.9  # 0.1 % of uniform draws lie above, at 9 degrees of freedom


def test_the_hash_differs_whenever_an_argument_does() -> None:
    base: dict[str, Any] = {"lengths": [3, 9, 4], "lanes": 2, "segment": 8, "window": 4}
    changes: list[dict[str, Any]] = [
        {},
        {"lengths": [3, 9, 5]},
        {"lanes": 3},
        {"segment": 16},
        {"window": 2},
        {"seed": 1},
        {"epoch": 1},
        {"align": "segment"},
        {"epochs": 1},
        {"order": "longest"},
    ]
    assert len({plan_lanes(**{**base, **change}).hash for change in changes}) == len(changes)
    assert plan_lanes(**base).hash == plan_lanes(**base).hash


def test_a_plan_keeps_its_own_copy_of_the_lengths() -> None:
    lengths = np.array([5, 6, 7])
    plan = plan_lanes(lengths, 1, 4, 2)
    expected = plan_lanes([5, 6, 7], 1, 4, 2).at(4).pieces
    lengths[:] = 0
    assert plan.at(4).pieces == expected


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        ({"lengths": []}, "0 documents"),
        ({"lengths": [4, -1]}, "-1"),
        ({"lanes": 0}, "0 lanes"),
        ({"segment": 10}, "10 .* 4"),
        ({"segment": 0}, "0 .* 4"),
        ({"window": 0}, "8 .* 0"),
        ({"epochs": 0}, "epochs 0"),
        ({"epoch": -2}, "epoch -2"),
        ({"align": "token"}, "token"),
        ({"order": "shortest"}, "shortest"),
    ],
)
def test_sizes_that_cannot_work_are_refused_with_their_numbers(change: dict[str, Any], numbers: str) -> None:
    good: dict[str, Any] = {"lengths": [3, 4], "lanes": 2, "segment": 8, "window": 4}
    with pytest.raises(ValueError, match=numbers):
        plan_lanes(**{**good, **change})


def test_positions_outside_a_finite_plan_are_refused() -> None:
    plan = plan_lanes([3, 4], 1, 8, 4, epochs=1)
    assert plan.positions == 2
    for position in (-1, 2, 1000):
        with pytest.raises(IndexError, match=str(position)):
            plan.at(position)
