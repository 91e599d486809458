"""Where the time of a step went: this process's own work, communication, or waiting.

Spans are pairs (begin, end) in nanoseconds, each without its end. Every moment of a step belongs to one share, so the
three add up to the step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Span = tuple[int, int]


@dataclass(frozen=True)
class TimeShares:
    """The parts of a step, in nanoseconds."""

    compute: int
    communication: int
    bubble: int

    @property
    def step(self) -> int:
        """The whole step."""
        return self.compute + self.communication + self.bubble


def shares_of_operators(
    step: Span, operators: Iterable[Span], collectives: Iterable[Span], messages: Iterable[Span]
) -> TimeShares:
    """Of a process that computes on the CPU, in the thread that also waits.

    operators     of that thread
    collectives   from the call to the end of what was called
    messages      the same, of what goes between neighbouring stages

    bubble: a message is under way and no operator runs. communication: the same with a collective, if it is no bubble.
    compute: all else, so also what Python does between operators.
    """
    waiting = without(within(step, messages), operators)
    communicating = without(without(within(step, collectives), operators), waiting)
    rest = step[1] - step[0] - length(waiting) - length(communicating)
    return TimeShares(rest, length(communicating), length(waiting))


def shares_of_kernels(step: Span, kernels: Iterable[Span], collectives: Iterable[Span]) -> TimeShares:
    """Of a process that computes on a GPU.

    kernels       of computation, and copies
    collectives   the kernels of collectives

    compute: a kernel runs. communication: only a collective's kernel runs. bubble: all else. Then the GPU is idle,
    because it waits for the host, or it exchanges messages with a neighbouring stage, which is mostly waiting too.
    """
    computing = within(step, kernels)
    communicating = without(within(step, collectives), computing)
    rest = step[1] - step[0] - length(computing) - length(communicating)
    return TimeShares(length(computing), length(communicating), rest)


def union(spans: Iterable[Span]) -> list[Span]:
    """The same moments as disjoint spans that don't touch, in order."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        elif begin < end:
            merged.append((begin, end))
    return merged


def without(spans: Iterable[Span], others: Iterable[Span]) -> list[Span]:
    """The moments of `spans` that are in none of `others`, as `union` gives them."""
    left, cuts, next_cut = [], union(others), 0
    for begin, end in union(spans):
        while next_cut < len(cuts) and cuts[next_cut][1] <= begin:
            next_cut += 1
        cut = next_cut
        while cut < len(cuts) and cuts[cut][0] < end:
            left.append((begin, cuts[cut][0]))
            begin = max(begin, cuts[cut][1])
            cut += 1
        left.append((begin, end))
    return [(begin, end) for begin, end in left if begin < end]


def within(bounds: Span, spans: Iterable[Span]) -> list[Span]:
    """The moments of `spans` inside `bounds`, as `union` gives them."""
    return union((max(begin, bounds[0]), min(end, bounds[1])) for begin, end in spans)


def length(spans: Iterable[Span]) -> int:
    """How long disjoint spans are together."""
    return sum(end - begin for begin, end in spans)
