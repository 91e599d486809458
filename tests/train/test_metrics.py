"""What a run writes down, and what it tells the person who watches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from brt_dist.train.metrics import Reporter, peak_flops


def figures(step: int) -> dict[str, float]:
    return {"step": step, "loss": 2.0 / step, "tokens_per_second": 1000.0, "step_seconds": 0.5}


def test_a_reporter_goes_on_behind_the_finished_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with Reporter(tmp_path, steps=6, done=0, active=True) as report:
        for step in range(1, 5):
            report.step(figures(step))
        report.evaluation({"step": 4, "carried": 1.5, "cleared": 1.75})
    with Reporter(tmp_path, steps=6, done=2, active=True) as report:
        for step in range(3, 7):
            report.step(figures(step))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [figures(step) for step in range(1, 7)]
    assert (tmp_path / "evaluations.jsonl").read_text() == ""
    assert list((tmp_path / "tensorboard").iterdir())
    told = capsys.readouterr()
    assert told.out == ""
    assert "1.5000 nats per token, 1.7500 with the carry cleared" in told.err
    assert "step 6/6  loss 0.3333  1,000 tokens/s  0 s left" in told.err


def test_every_line_is_on_the_disk_when_its_step_is_done(tmp_path: Path):
    with Reporter(tmp_path, steps=2, done=0, active=True) as report:
        report.step(figures(1))
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == figures(1)


def test_a_process_that_does_not_lead_writes_and_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with Reporter(tmp_path, steps=1, done=0, active=False) as report:
        report.step(figures(1))
        report.evaluation({"step": 1, "carried": 1.0, "cleared": 1.0})
        report.say("a line")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_no_peak_is_claimed_for_a_processor():
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
