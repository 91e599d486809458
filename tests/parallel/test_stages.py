"""Stages hold consecutive layers, and the dearest stage is as cheap as any division of the layers allows."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brt_dist.model.config import ModelConfig
from brt_dist.model.flops import head_flops, layer_flops
from brt_dist.parallel.stages import balance, divide_layers

costs = st.lists(st.integers(1, 20).map(float), min_size=1, max_size=9)


def dearest(row: list[float], runs: list[range], last: float) -> float:
    sums = [sum(row[i] for i in run) for run in runs]
    return max([*sums[:-1], sums[-1] + last])


@given(costs, st.integers(1, 9), st.integers(0, 40).map(float))
def test_no_other_division_has_a_cheaper_dearest_run(row: list[float], parts: int, last: float):
    parts = min(parts, len(row))
    runs = balance(row, parts, last)
    assert [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])]
    assert runs[-1].stop == len(row)
    assert all(len(run) >= 1 for run in runs)
    every = (
        [range(first, end) for first, end in pairwise((0, *cuts, len(row)))]
        for cuts in combinations(range(1, len(row)), parts - 1)
    )
    assert dearest(row, runs, last) == min(dearest(row, each, last) for each in every)


@pytest.mark.parametrize("parts", [0, 4])
def test_more_stages_than_layers_are_refused_with_both_numbers(parts: int):
    with pytest.raises(ValueError, match=f"3 layers cannot be divided into {parts} stages"):
        balance([1.0, 1.0, 1.0], parts)


def test_the_last_stage_has_fewer_layers_because_it_has_the_head():
    config = ModelConfig(num_layers=24, recurrent_layers=())
    stages = divide_layers(config, 4)
    assert len(stages[-1]) < len(stages[0])
    assert head_flops(config) > 2 * layer_flops(config, 0)


def test_a_recurrent_layer_counts_for_about_two():
    config = ModelConfig(num_layers=8, recurrent_layers=(6, 7), vocab_size=128)
    assert layer_flops(config, 6) / layer_flops(config, 0) == pytest.approx(1.9, abs=0.1)
    assert divide_layers(config, 2) == [range(0, 5), range(5, 8)]
