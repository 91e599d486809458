"""Processes that were started differently are told so, with what differs and between whom."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import BRT, finish, free_port, start
from training_runs import Runs

from brt_dist.parallel import agreement
from brt_dist.parallel.agreement import disagreement, versions


def test_the_first_rank_that_differs_is_named_with_both_values():
    stories = [{"a": 1, "b": 2}, {"a": 1, "b": 2}, {"a": 1, "b": 3}]
    line = disagreement(stories)
    assert line.endswith("started differently: b is 2 in rank 0 and 3 in rank 2")


def test_every_difference_is_told_and_how_many_ranks_differ():
    line = disagreement([{"a": 1}, {"a": 2, "b": 3}, {"a": 4}])
    assert "a is 1 in rank 0 and 2 in rank 1; b is missing in rank 0 and 3 in rank 1" in line
    assert line.endswith("(2 ranks of 3 differ from rank 0)")


def test_another_source_is_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "brt_dist" / "parallel"
    package.mkdir(parents=True)
    monkeypatch.setattr(agreement, "__file__", str(package / "agreement.py"))
    seen = set()
    for text in ("x = 1\n", "x = 2\n"):
        (package / "agreement.py").write_text(text)
        seen.add(tuple(versions().values()))
    (package / "more.py").write_text("")
    assert len({*seen, tuple(versions().values())}) == 3


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimizer.lr=0.004", "optimizer.lr is 0.003 in rank 0 and 0.004 in rank 1"),
        # Without a look first these two would wait for each other in different groups.
        ("parallel.pipeline=2", "parallel.pipeline is 1 in rank 0 and 2 in rank 1"),
    ],
)
def test_two_ranks_with_different_configurations_are_refused_at_the_start(
    tmp_path: Path, shards: Path, override: str, told: str
):
    assert refusals(tmp_path, shards, override) == [f"the processes of this run were started differently: {told}"]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimizer.lrr=0.1", "optimizer has no key 'lrr'; did you mean 'lr'?"),
        ("parallel.tensor=3", "model.num_heads is 2, which parallel.tensor 3 does not divide"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_own_configuration_is_refused_lets_no_other_wait(
    tmp_path: Path, shards: Path, override: str, told: str, rank: int
):
    whose = f"the configuration of rank {rank} is not that of rank {1 - rank} and is refused: "
    assert refusals(tmp_path, shards, override, rank) == [whose + told]


def refusals(tmp_path: Path, shards: Path, override: str, where: int = 1) -> list[str]:
    """What two processes without a launcher say, of which rank `where` alone is told `override`; both end with 2."""
    runs = Runs(tmp_path / "runs", shards)
    port = free_port()
    processes = []
    for rank in range(2):
        environment = {
            "RANK": rank,
            "WORLD_SIZE": 2,
            "LOCAL_RANK": rank,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        arguments = runs.command("run", *([override] if rank == where else []))
        processes.append(start("python", 1, [*BRT, *arguments], environment))
    done = [finish(process, timeout=90) for process in processes]
    assert [each.returncode for each in done] == [2, 2]
    lines = [line for each in done for line in each.stderr.splitlines() if line.startswith("brt: ")]
    assert not (runs.folder / "run").exists()
    return [line.removeprefix("brt: ") for line in lines]
