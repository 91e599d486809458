"""Which lanes a process owns, and how the processes of a run meet."""

from __future__ import annotations

import re
from datetime import timedelta
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import free_port

from brt_dist.model.config import ModelConfig
from brt_dist.parallel import process_groups
from brt_dist.parallel.config import ParallelConfig
from brt_dist.parallel.launcher import Launch, LaunchError
from brt_dist.parallel.process_groups import Axis, Processes, connected, grid, joined


def of_rank(rank: int, ranks: int) -> Processes:
    return Processes(rank, rank, torch.device("cpu"), data=Axis(rank, tuple(range(ranks))))


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
            assert (processes.data.position, processes.data.size, processes.leads) == (0, 1, True)
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
    def meet(place: str, *_: object, **__: object) -> None:
        raise MeetingError(place)

    monkeypatch.setattr(process_groups, "rendezvous", meet)
    with pytest.raises(MeetingError, match=where), joined(launch, ParallelConfig()):
        pass


def test_a_process_whose_others_never_come_says_so_in_time():
    launch = Launch(0, 2, 0, 2, "127.0.0.1", int(free_port()))
    with (
        pytest.raises(
            LaunchError, match=r"rank 0: 2 processes should meet at tcp://127.0.0.1:\d+, but not all of them"
        ),
        connected(launch, timedelta(seconds=2)),
    ):
        pass
    assert not torch.distributed.is_initialized()


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
        ({"zero_stage": 0, "pipeline": 2}, "set parallel.zero_stage=1 or parallel.pipeline=1"),
        ({"zero_stage": 2, "pipeline": 2}, "set parallel.zero_stage=1 or parallel.pipeline=1"),
        ({"zero_stage": 3, "pipeline": 2}, "set parallel.zero_stage=1 or parallel.pipeline=1"),
        ({"zero_stage": 3, "tensor": 2}, "set parallel.zero_stage=2 or parallel.tensor=1"),
        ({"zero_stage": 0, "offload": "optimizer"}, "set parallel.zero_stage=1 or parallel.offload=none"),
        ({"pipeline": 2, "offload": "optimizer"}, "set parallel.offload=none or parallel.pipeline=1"),
        ({"zero_stage": 2, "offload": "all"}, "set parallel.zero_stage=3 or parallel.offload=optimizer"),
        ({"recompute_layers": (1,)}, "parallel.recompute_layers is [1], but parallel.recompute is none"),
    ],
)
def test_keys_that_exclude_each_other_are_named_with_what_is_nearest(settings: dict[str, Any], line: str):
    with pytest.raises(ValueError, match=re.escape(line)) as told:
        ParallelConfig(**settings).check_combination()
    assert all(f"parallel.{key}" in str(told.value) for key in settings)


@pytest.mark.parametrize(
    ("settings", "model", "line"),
    [
        ({"tensor": 3}, {}, "model.num_heads is 8, which parallel.tensor 3 does not divide"),
        ({"tensor": 8}, {"mlp_dim": 4}, "model.mlp_dim is 4, which parallel.tensor 8 does not divide"),
        ({"tensor": 8}, {"vocab_size": 32100}, "model.vocab_size is 32100, which parallel.tensor 8 does not divide"),
        ({"pipeline": 13}, {}, "parallel.pipeline is 13, but there are only 12 layers"),
        ({"pipeline": 2}, {"feedback": True}, "set parallel.pipeline=1 or model.feedback=false"),
        ({"tensor": 2, "sequence": True}, {"feedback": True}, "set parallel.sequence=false or model.feedback=false"),
        ({"recompute": "full", "recompute_layers": (12,)}, {}, "parallel.recompute_layers holds 12, but there are 12"),
        ({"recompute": "full", "recompute_layers": (1,)}, {"feedback": True}, "set parallel.recompute=selective"),
        ({"recompute": "full", "zero_stage": 3}, {"feedback": True}, "set parallel.recompute=none or"),
        ({"recompute": "selective", "zero_stage": 3}, {"feedback": True}, "set parallel.recompute=none or"),
    ],
)
def test_a_model_that_cannot_be_divided_like_this_is_refused_with_both_numbers(
    settings: dict[str, Any], model: dict[str, Any], line: str
):
    with pytest.raises(ValueError, match=re.escape(line)):
        ParallelConfig(**settings).check_model(ModelConfig(**model))


def test_a_segment_whose_tokens_cannot_be_shared_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"data\.segment is 4100, which parallel\.tensor 8 does not divide"):
        ParallelConfig(tensor=8, sequence=True).check_segment(4100)
    ParallelConfig(tensor=8).check_segment(4100)


LAYOUTS = [(tensor, data, pipeline) for tensor in (1, 2, 4) for data in (1, 2, 3) for pipeline in (1, 2, 3)]


@pytest.mark.parametrize(("tensor", "data", "pipeline"), LAYOUTS)
def test_every_rank_has_one_place_and_neighbours_share_a_layer(tensor: int, data: int, pipeline: int):
    rows = grid(tensor * data * pipeline, ParallelConfig(tensor=tensor, pipeline=pipeline))
    sizes = {"tensor": tensor, "data": data, "pipeline": pipeline}
    for name, size in sizes.items():
        assert {len(row) for row in rows[name]} == {size}
        assert sorted(chain.from_iterable(rows[name])) == list(range(tensor * data * pipeline))
    assert rows["tensor"][0] == list(range(tensor))
    assert rows["data"][0] == [d * tensor for d in range(data)]
    assert rows["pipeline"][0] == [p * tensor * data for p in range(pipeline)]
