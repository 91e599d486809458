"""Which lanes a process owns, and how the processes of a run meet."""

from __future__ import annotations

import re
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from brt_dist.parallel import process_groups
from brt_dist.parallel.config import ParallelConfig
from brt_dist.parallel.launcher import Launch
from brt_dist.parallel.process_groups import Processes, joined


def of_rank(rank: int, ranks: int) -> Processes:
    return Processes(rank, ranks, rank, torch.device("cpu"))


@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 5))
def test_micro_batches_share_all_lanes_in_order_and_evenly(ranks: int, micro_batches: int, group: int):
    lanes = ranks * micro_batches * group
    owned = [of_rank(rank, ranks).micro_batch_lanes(lanes, micro_batches) for rank in range(ranks)]
    assert [len(groups) for groups in owned] == [micro_batches] * ranks
    assert {len(lanes) for groups in owned for lanes in groups} == {group}
    assert list(chain.from_iterable(chain.from_iterable(owned))) == list(range(lanes))


def test_a_ranks_lanes_do_not_depend_on_the_number_of_its_micro_batches():
    for micro_batches in (1, 2, 4):
        groups = of_rank(1, 2).micro_batch_lanes(16, micro_batches)
        assert list(chain.from_iterable(groups)) == list(range(8, 16))


def test_one_process_joins_alone_and_leaves_again():
    for _ in range(2):
        with joined(Launch(), ParallelConfig()) as processes:
            assert (processes.data_rank, processes.data_ranks, processes.leads) == (0, 1, True)
            assert processes.sum(1.5, 2.0**40 + 1) == [1.5, 2.0**40 + 1]
            assert processes.on_leader(lambda: "done") == "done"
            processes.on_all(lambda: None)
        assert not torch.distributed.is_initialized()


def test_an_error_of_the_leading_process_stays_what_it_is():
    with (
        pytest.raises(ZeroDivisionError),
        joined(Launch(), ParallelConfig()) as processes,
    ):
        processes.on_leader(lambda: 1 // 0)
    with (
        pytest.raises(ZeroDivisionError),
        joined(Launch(), ParallelConfig()) as processes,
    ):
        processes.on_all(lambda: print(1 // 0))
    assert not torch.distributed.is_initialized()


class MeetingError(Exception):
    """Ends `joined` where the processes would meet."""


@pytest.mark.parametrize(
    ("launch", "where"),
    [
        (Launch(0, 4, 0, 2, "node0", 1234), "tcp://node0:1234"),
        (Launch(0, 4, 0, 2, "node0"), "tcp://node0:29500"),
        (Launch(0, 2, 0, 2, None, 1234), "tcp://127.0.0.1:1234"),
        (Launch(0, 2, 0, 2, "node0", 1234), "tcp://node0:1234"),
    ],
)
def test_processes_meet_where_they_were_told(launch: Launch, where: str, monkeypatch: pytest.MonkeyPatch):
    def meet(backend: str, init_method: str, **_: object) -> None:
        raise MeetingError(init_method)

    monkeypatch.setattr(torch.distributed, "init_process_group", meet)
    with pytest.raises(MeetingError, match=where), joined(launch, ParallelConfig()):
        pass


def test_processes_of_one_mpiexec_choose_the_same_port_without_being_told(monkeypatch: pytest.MonkeyPatch):
    chosen = [process_groups._meeting_point(Launch(rank, 2, rank, 2)) for rank in range(2)]
    assert chosen[0] == chosen[1]
    assert 1024 < chosen[0][1] < 32768
    monkeypatch.setattr("os.getppid", lambda: 4_194_304 - 1)
    assert 1024 < process_groups._meeting_point(Launch(0, 2, 0, 2))[1] < 32768


@pytest.mark.parametrize(
    ("key", "value"), [("tensor", 0), ("pipeline", -1), ("zero_stage", 4), ("zero_stage", -1), ("micro_batches", 0)]
)
def test_an_impossible_layout_is_refused_by_name(key: str, value: int):
    with pytest.raises(ValueError, match=rf"parallel\.{key} is {value}; it must be"):
        ParallelConfig(**{key: value})


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"tensor": 2}, "parallel.tensor is 2; this version runs 1 only"),
        ({"pipeline": 2}, "parallel.pipeline is 2; this version runs 1 only"),
        ({"zero_stage": 3}, "parallel.zero_stage is 3; this version runs 0, 1 and 2"),
        ({"micro_batch_axis": "segments"}, "parallel.micro_batch_axis is 'segments'; this version runs 'lanes' only"),
        ({"zero_stage": 0, "pipeline": 2}, "set parallel.zero_stage=1 or parallel.pipeline=1"),
    ],
)
def test_a_layout_that_cannot_run_yet_can_be_named_but_not_run(settings: dict[str, Any], line: str):
    config = ParallelConfig(**settings)
    with pytest.raises(ValueError, match=re.escape(line)):
        config.check_supported()


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_every_zero_stage_below_3_can_run(zero_stage: int):
    ParallelConfig(zero_stage=zero_stage, micro_batches=4).check_supported()
