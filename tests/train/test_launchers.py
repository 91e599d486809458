"""torchrun and deepspeed start the same training; when one process dies the others end, and the run can go on.

mpiexec starts the resumed runs of test_resume.py.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest
from processes import BRT, finish, run, start
from training_runs import Runs, wait_for_lines

LONG = ("train.steps=40", "train.save_every=10")


def test_when_a_process_is_killed_all_end_and_another_launcher_goes_on_as_if_unbroken(
    folder: Path, shards: Path, pair: Runs
):
    runs = Runs(folder / "killed", shards)
    torchrun = start("torchrun", 2, [*BRT, *runs.command("long", *LONG)])
    wait_for_lines(runs.folder / "long" / "metrics.jsonl", 14, seconds=90)
    ranks = [p for p in psutil.Process(torchrun.pid).children(recursive=True) if "brt_dist" in p.cmdline()]
    assert len(ranks) == 2
    next(process for process in ranks if process.environ()["RANK"] == "1").kill()
    began = time.monotonic()
    ended = finish(torchrun, timeout=60)
    assert ended.returncode != 0
    assert time.monotonic() - began < 60
    assert not any(process.is_running() for process in ranks)
    assert not runs.checkpoint("long", 40).exists()
    assert [line.split()[0] for line in ended.stderr.splitlines()[1:3]] == ["padding:", "step"]
    assert ended.stdout == ""
    before = [json.loads(line) for line in (runs.folder / "long" / "metrics.jsonl").read_text().splitlines()[:14]]
    assert [line["loss"] for line in before] == pair.losses("long")[:14]

    done = run("deepspeed", 2, [*BRT, *runs.command("long", *LONG)])
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in runs.metrics("long")] == list(range(1, 41))
    assert runs.losses("long") == pair.losses("long")
    for path in pair.checkpoint("long", 40).iterdir():
        assert path.read_bytes() == (runs.checkpoint("long", 40) / path.name).read_bytes(), path.name

    # The launcher's own lines begin with a time in brackets; ours are the leading process's alone.
    lines = [line for line in [*done.stdout.splitlines(), *done.stderr.splitlines()] if not line.startswith("[20")]
    assert " parameters, data ranks: 2, on cpu, 8 lanes x 32 tokens a step, " in lines[0]
    assert lines[1].startswith("padding: ")
    assert lines[2].startswith("going on behind step ")
    assert all(line.startswith("step ") for line in lines[3:])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.lanes=9", "data.lanes is 9, which 2 data ranks x parallel.micro_batches 1 = 2 does not divide"),
        ("tokenizer.vocab_size=300", "model.vocab_size is 300, but the shards in {shards} were made with a tokenizer"),
    ],
)
def test_bad_input_is_told_once_by_all_processes_together(folder: Path, shards: Path, override: str, words: str):
    runs = Runs(folder / "refused", shards)
    done = run("torchrun", 2, [*BRT, *runs.command("run", override)])
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("brt:")]
    assert len(told) == 1
    assert words.format(shards=shards) in told[0]
