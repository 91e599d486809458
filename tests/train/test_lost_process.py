"""A process that dies in the middle of a step takes all others with it, also where no launcher watches over them."""

from __future__ import annotations

import time
from pathlib import Path

from processes import BRT, finish, free_port, start
from training_runs import Runs, wait_for_lines

RANKS = 4
LAYOUT = ("parallel.tensor=2", "parallel.pipeline=2", "parallel.micro_batches=2")


def test_when_one_process_of_a_stage_is_killed_all_others_end_by_themselves(tmp_path: Path, shards: Path):
    runs = Runs(tmp_path / "runs", shards)
    meeting = {"WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    arguments = [*BRT, *runs.command("run", "train.steps=2000", *LAYOUT)]
    processes = [
        start("python", 1, arguments, {**meeting, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": RANKS})
        for rank in range(RANKS)
    ]
    try:
        wait_for_lines(runs.folder / "run" / "metrics.jsonl", 3, seconds=240)
        processes[2].kill()
        began = time.monotonic()
        done = [finish(process, timeout=60) for process in processes]
        assert time.monotonic() - began < 60
        assert all(each.returncode != 0 for each in done)
    finally:
        for process in processes:
            process.kill()
    assert not (runs.folder / "run" / "checkpoints" / "step-00002000").exists()
