"""Which layers each stage of a pipeline holds: consecutive ones, so that the dearest stage is as cheap as can be."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

from brt_dist.model.config import ModelConfig
from brt_dist.model.flops import head_flops, layer_flops


def divide_layers(config: ModelConfig, stages: int) -> list[range]:
    """The layers of each stage, at least one. The head, which costs as much as several layers, is on the last one."""
    costs = [layer_flops(config, index) for index in range(config.num_layers)]
    return balance(costs, stages, last=head_flops(config))


def balance(costs: Sequence[float], parts: int, last: float = 0.0) -> list[range]:
    """Cut a row of items into `parts` runs, none empty, of which the dearest is as cheap as possible.

    last: what the last run costs besides. Among equals the cut with the longer early runs is taken, for those of the
    first stages hold the fewest activations in a pipeline that is empty behind. ValueError for more parts than items.
    """
    if not 1 <= parts <= len(costs):
        raise ValueError(f"{len(costs)} layers cannot be divided into {parts} stages")
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    @cache
    def best(first: int, left: int) -> tuple[float, int]:
        """The dearest of the runs that hold the items from `first` on, and where the first of these runs ends."""
        if left == 1:
            return sums[-1] - sums[first] + last, len(costs)
        ends = range(len(costs) - left + 1, first, -1)
        return min(
            ((max(sums[end] - sums[first], best(end, left - 1)[0]), end) for end in ends), key=lambda cut: cut[0]
        )

    cuts = [0]
    for left in range(parts, 0, -1):
        cuts.append(best(cuts[-1], left)[1])
    return [range(first, end) for first, end in pairwise(cuts)]
