"""MPI ranks share the work: all of them work, and any of them may be the one in whom something is wrong."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
from processes import finish, run, start

from preprocessing.ranks import Ranks

# Every rank takes 0.1 s for an item, and the items in `bad` end with an error.
PROGRAM = """
import json, sys, time
from brt_dist.data.errors import BadInput
from brt_dist.parallel.launcher import read_launch
from preprocessing.ranks import opened_ranks

bad, bug = json.loads(sys.argv[1])

def work(item, tell):
    for part in range(10):
        time.sleep(0.01)
        tell((item, part))
    if item in bad:
        raise BadInput(f"item {item} is bad")
    if item in bug:
        raise RuntimeError(f"item {item} shows a bug")
    return ranks.rank

with opened_ranks(read_launch().world_size) as ranks:
    done, heard, raised = {}, [], None
    try:
        ranks.divide(range(20) if ranks.rank == 0 else (), work, done.__setitem__, heard.append)
    except BadInput as error:
        raised = f"{type(error).__name__}: {error}"
    told = ranks.gather(raised)
    told_again = ranks.lead(lambda: ["from", "rank", ranks.rank])
    assert told_again == ["from", "rank", 0]
    if ranks.rank == 0:
        print(json.dumps([done, heard, told]))
"""

SLEEPING = """
import time
from brt_dist.parallel.launcher import read_launch
from preprocessing.ranks import opened_ranks

with opened_ranks(read_launch().world_size) as ranks:
    print("begun")
    time.sleep(50)
"""


def divided(ranks: int, bad: tuple[int, ...] = ()) -> tuple[dict[str, int], list[list[int]], list[Any]]:
    """Which rank did each item, what was heard, and what each rank raised."""
    done = run("mpiexec", ranks, ["-c", PROGRAM, json.dumps([bad, []])])
    assert done.returncode == 0, done.stderr
    items, heard, raised = json.loads(done.stdout)
    return items, heard, raised


def test_all_ranks_work_rank_0_too_and_every_item_is_done_once():
    items, heard, raised = divided(3)
    assert sorted(map(int, items)) == list(range(20))
    by_rank = [list(items.values()).count(rank) for rank in range(3)]
    assert min(by_rank) >= 4, by_rank
    assert sorted(map(tuple, heard)) == [(item, part) for item in range(20) for part in range(10)]
    assert raised == [None] * 3


@pytest.mark.parametrize("bad", [(0,), (1,), (0, 1, 2)])
def test_an_error_in_any_rank_is_raised_in_all_of_them_and_what_was_begun_is_taken(bad: tuple[int, ...]):
    items, _, raised = divided(3, bad)
    assert raised[0] in [f"SharedBadInput: item {item} is bad" for item in bad]
    assert raised == [raised[0]] * 3
    done = set(map(int, items))
    assert {0, 1, 2} - set(bad) <= done
    assert not done & set(bad)
    assert len(done) < 6


def test_a_bug_in_one_rank_ends_all_of_them():
    done = run("mpiexec", 3, ["-c", PROGRAM, json.dumps([[], [5]])], timeout=60)
    assert done.returncode != 0
    assert "item 5 shows a bug" in done.stderr


def test_processes_that_mpi_does_not_know_as_one_launch_are_refused():
    """As with the mpiexec of another MPI: each would do all the work, and write over the others'."""
    done = finish(start("python", 1, ["-c", PROGRAM, "[[], []]"], told={"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 0}))
    assert done.returncode != 0
    assert "2 processes were started, but MPI sees 1" in done.stderr


def test_one_process_needs_no_mpi():
    done: dict[int, int] = {}
    heard: list[int] = []

    def work(item: int, tell: Any) -> int:
        tell(item)
        return item * item

    Ranks().divide(range(4), work, done.__setitem__, heard.append)
    assert done == {0: 0, 1: 1, 2: 4, 3: 9}
    assert heard == [0, 1, 2, 3]


def test_an_interruption_ends_all_ranks_with_one_line_and_no_traces():
    process = start("mpiexec", 3, ["-u", "-c", SLEEPING])
    assert process.stdout is not None
    process.stdout.read(3 * len("begun\n"))
    process.send_signal(signal.SIGINT)
    done = finish(process, timeout=60)
    assert done.returncode == 130
    assert done.stderr.count("brt: interrupted") == 1
    assert "Traceback" not in done.stderr
