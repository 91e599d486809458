"""Where the time of a step went: every moment belongs to one share."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from brt_dist.train.time_shares import Span, length, shares_of_kernels, shares_of_operators, union, within, without

MOMENTS = st.integers(0, 30)
SPANS = st.lists(st.tuples(MOMENTS, MOMENTS).map(lambda pair: (min(pair), max(pair))), max_size=8)
STEP = (5, 25)


def moments(spans: list[Span]) -> set[int]:
    """The definition: a span is the set of its moments."""
    return {moment for begin, end in spans for moment in range(begin, end)}


def are_disjoint_and_in_order(spans: list[Span]) -> bool:
    flat = [moment for span in spans for moment in span]
    return flat == sorted(set(flat))


@given(SPANS)
def test_a_union_holds_the_same_moments_once(spans: list[Span]):
    merged = union(spans)
    assert moments(merged) == moments(spans)
    assert are_disjoint_and_in_order(merged)
    assert length(merged) == len(moments(spans))


@given(SPANS, SPANS)
def test_what_is_taken_away_is_gone_and_nothing_else(spans: list[Span], others: list[Span]):
    left = without(spans, others)
    assert moments(left) == moments(spans) - moments(others)
    assert length(left) == len(moments(left))


@given(SPANS)
def test_within_bounds_nothing_else_is_left(spans: list[Span]):
    assert moments(within(STEP, spans)) == moments(spans) & moments([STEP])


@given(SPANS, SPANS, SPANS)
def test_a_moment_of_the_cpu_is_an_operators_or_a_messages_or_a_collectives(
    operators: list[Span], collectives: list[Span], messages: list[Span]
):
    shares = shares_of_operators(STEP, operators, collectives, messages)
    waiting = moments([STEP]) & moments(messages) - moments(operators)
    assert shares.bubble == len(waiting)
    assert shares.communication == len(moments([STEP]) & moments(collectives) - moments(operators) - waiting)
    assert shares.step == STEP[1] - STEP[0]


@given(SPANS, SPANS)
def test_a_moment_of_the_gpu_is_a_kernels_or_a_collectives_or_empty(kernels: list[Span], collectives: list[Span]):
    shares = shares_of_kernels(STEP, kernels, collectives)
    assert shares.compute == len(moments([STEP]) & moments(kernels))
    assert shares.bubble == len(moments([STEP]) - moments(kernels) - moments(collectives))
    assert shares.step == STEP[1] - STEP[0]
