"""The training loop around the engine, which does nothing here: what is waited for, saved and shown, and when."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from shard_folders import finished_folder, row
from torch import Tensor
from training_runs import Runs

from brt_dist.cli import main
from brt_dist.data.loader import Batch, Loader
from brt_dist.model.config import ModelConfig
from brt_dist.model.recurrent_layer import RecurrentLayer
from brt_dist.parallel.config import ParallelConfig
from brt_dist.parallel.parallelize import build_stage
from brt_dist.parallel.process_groups import Processes
from brt_dist.parallel.stage_scorer import StageScorer
from brt_dist.train import trainer
from brt_dist.train.config import OptimizerConfig, TrainConfig
from brt_dist.train.engine import StepResult


class IdleEngine:
    """Takes the place of the engine: learns nothing, and what the lanes carry stays fresh."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        train: TrainConfig,
        processes: Processes,
        lanes: int,
    ):
        self.stage, self.lanes = build_stage(model, parallel, processes, train.seed), lanes
        self.processes = processes
        self.optimizer = SimpleNamespace(progress=dict)

    def step(self, batches: Sequence[Batch], lr: float, seed: int) -> StepResult:
        return StepResult(1.0, 0.5)

    def shapes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self.parameters().items()}

    def restore(self, *_: Any) -> None:
        """There is nothing to restore."""

    @contextmanager
    def scoring(self) -> Iterator[StageScorer]:
        layers = self.stage.layers_by_number()
        states = {number: each.initial_state_SD for number, each in layers.items() if isinstance(each, RecurrentLayer)}
        yield StageScorer(self.stage, self.processes, torch.float32, False, states)

    def parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.stage.named_parameters()}

    def optimizer_state(self) -> dict[str, Tensor]:
        return {}

    def carry(self) -> dict[str, Tensor]:
        return self.stage.fresh_carry(self.lanes, torch.device("cpu"), torch.float32).detach().tensors()


@pytest.fixture
def runs(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.setattr(trainer, "Engine", IdleEngine)
    return Runs(tmp_path / "runs", shards)


def test_the_time_spent_waiting_for_the_loader_is_recorded(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    class SlowLoader(Loader):
        def __next__(self) -> Batch:
            time.sleep(0.05)
            return super().__next__()

    monkeypatch.setattr(trainer, "Loader", SlowLoader)
    assert main(runs.command("run", "train.steps=3", "parallel.micro_batches=2")) == 0
    for line in runs.metrics("run"):
        assert 0.1 <= line["data_seconds"] <= line["step_seconds"]


@pytest.mark.parametrize(
    ("save_every", "steps"), [(0, [7]), (3, [3, 6, 7]), (7, [7]), (100, [7])], ids=["never", "3", "7", "100"]
)
def test_a_checkpoint_is_made_every_so_many_steps_and_at_the_end(runs: Runs, save_every: int, steps: list[int]):
    assert main(runs.command("run", "train.steps=7", f"train.save_every={save_every}")) == 0
    folders = sorted(path.name for path in (runs.folder / "run" / "checkpoints").iterdir())
    assert folders == [f"step-{step:08d}" for step in steps]
    facts = json.loads((runs.checkpoint("run", 7) / "checkpoint.json").read_text())
    assert (facts["step"], facts["position"], facts["lanes"], facts["seed"]) == (7, 7, 8, 3)


def test_the_run_folder_holds_the_resolved_configuration(runs: Runs):
    assert main(runs.command("run", "train.steps=1")) == 0
    again = runs.loaded(f"run.dir={runs.folder / 'run'}", "train.steps=1")
    assert main(["train", str(runs.folder / "run" / "config.yaml")]) == 0
    assert yaml.safe_load((runs.folder / "run" / "config.yaml").read_text()) == again.as_dict()


def test_a_profile_covers_the_steps_behind_the_first(runs: Runs):
    assert main(runs.command("run", "train.steps=4", "train.profile_steps=2")) == 0
    trace = json.loads((runs.folder / "run" / "profile" / "rank-00000.json").read_text())
    steps = {event["name"] for event in trace["traceEvents"] if event["name"].startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#1", "ProfilerStep#2"}


def test_a_run_that_diverges_stops_with_one_line_and_keeps_no_step_of_it(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    class DivergingEngine(IdleEngine):
        steps = 0

        def step(self, *_: Any) -> StepResult:
            self.steps += 1
            return StepResult(float("nan") if self.steps == 8 else 1.0, 0.5)

    monkeypatch.setattr(trainer, "Engine", DivergingEngine)
    assert main(runs.command("run")) == 2
    assert "diverged: step 8 has loss nan" in capsys.readouterr().err
    assert [line["step"] for line in runs.metrics("run")] == list(range(1, 8))
    assert [path.name for path in (runs.folder / "run" / "checkpoints").iterdir()] == ["step-00000005"]


@pytest.mark.parametrize(("warmup", "told"), [(2, False), (3, True), (1000, True)])
def test_a_run_says_that_its_learning_rate_only_rises(
    runs: Runs, warmup: int, told: bool, capsys: pytest.CaptureFixture[str]
):
    assert main(runs.command("run", "train.steps=3", f"optimizer.warmup_steps={warmup}")) == 0
    line = f"the learning rate rises to the last step: optimizer.warmup_steps is {warmup}, train.steps 3"
    assert (line in capsys.readouterr().err.splitlines()) == told


class ReadingEngine(IdleEngine):
    """Reads the batches, so that there is something to listen to, with tokens that take nothing from the state."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        with torch.no_grad():
            output = self.stage.layers["1"].tokens.attention_output.weight
            output[:, output.shape[1] // 2 :] = 0

    def step(self, batches: Sequence[Batch], *rest: Any) -> StepResult:
        for batch in batches:
            carry = self.stage.fresh_carry(len(batch.tokens_BL), torch.device("cpu"), torch.float32)
            self.stage(batch.tokens_BL, carry, batch.starts_BC)
        return super().step(batches, *rest)


EVALUATED = ("train.evaluate_every=3", "train.evaluate_documents=5", "train.save_every=0")


def test_a_run_warns_once_of_every_sign_that_its_state_is_dead(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(trainer, "Engine", ReadingEngine)
    assert main(runs.command("run", *EVALUATED, "train.evaluate_tokens=100", "train.health_every=4")) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    # The evaluation at step 3 is still within the warm-up.
    assert [line.split(" is dead")[0] for line in lines] == [
        "warning at step 4: the state of layer 1",
        "warning at step 6: the state",
    ]
    assert [line["step"] for line in runs.metrics("run") if "state_attention/1" in line] == [4, 8, 12]
    assert [line["state_gap"] for line in runs.evaluations("run")] == pytest.approx([0.0] * 4, abs=1e-6)


def test_documents_within_one_segment_say_nothing_about_what_a_state_is_worth_beyond_it(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(trainer, "Engine", ReadingEngine)
    assert main(runs.command("run", *EVALUATED, "train.evaluate_tokens=32", "train.health_every=0")) == 0
    assert "warning" not in capsys.readouterr().err
    for line in runs.evaluations("run"):
        assert "state_gap" not in line
        assert line["gap"] == pytest.approx(0, abs=1e-6)


# --- corpora ---

WEIGHTS = ("data.weights.books=3", "data.weights.code=1")


@pytest.fixture
def corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Runs on shards of two corpora, books of 300 tokens and code of 20."""
    monkeypatch.setattr(trainer, "Engine", IdleEngine)
    rows = {
        "books.arrow": [row(f"book {number}", np.full(300, 7)) for number in range(6)],
        "code.arrow": [row(f"file {number}", np.full(20, 8)) for number in range(40)],
    }
    names = {"books.arrow": "books", "code.arrow": "code"}
    return Runs(tmp_path / "runs", finished_folder(tmp_path / "mixed", rows, names, vocab_size=384))


def test_tokens_and_epochs_of_every_corpus_are_recorded(corpora: Runs):
    assert main(corpora.command("run", *WEIGHTS, "train.steps=40")) == 0
    for line in corpora.metrics("run"):
        books, code = line["corpus_tokens/books"], line["corpus_tokens/code"]
        assert books + code == line["tokens"]
        assert abs(books - 0.75 * line["tokens"]) <= 301
        assert line["corpus_epochs/books"] == books / (6 * 301)
        assert line["corpus_epochs/code"] == code / (40 * 21)


def test_tokens_of_a_corpus_are_counted_on_after_a_restart_and_alike_in_every_layout(corpora: Runs):
    assert main(corpora.command("whole", *WEIGHTS)) == 0
    assert main(corpora.command("broken", *WEIGHTS, "train.steps=5")) == 0
    assert main(corpora.command("broken", *WEIGHTS)) == 0
    assert main(corpora.command("lanes", *WEIGHTS, "parallel.micro_batches=2")) == 0
    segments = ("parallel.micro_batches=2", "parallel.micro_batch_axis=segments", "train.steps=6")
    assert main(corpora.command("segments", *WEIGHTS, *segments)) == 0

    def counted(name: str) -> list[dict[str, float]]:
        return [{key: line[key] for key in line if key.startswith("corpus_")} for line in corpora.metrics(name)]

    assert counted("broken") == counted("lanes") == counted("whole")
    # A step of two segments reads what two steps of one do.
    assert counted("segments") == counted("whole")[1::2]


def test_without_weights_corpora_are_read_in_one_order_and_counted_all_the_same(corpora: Runs):
    assert main(corpora.command("plain", "train.steps=12")) == 0
    last = corpora.metrics("plain")[-1]
    assert last["corpus_tokens/books"] + last["corpus_tokens/code"] == last["tokens"]
    assert main(corpora.command("mixed", *WEIGHTS, "train.steps=12")) == 0
    plans = [json.loads((corpora.folder / name / "stream.json").read_text())["plan"] for name in ("plain", "mixed")]
    assert plans[0] != plans[1]


def test_a_run_of_one_corpus_tells_nothing_of_corpora(runs: Runs):
    assert main(runs.command("run", "train.steps=1")) == 0
    assert not [key for key in runs.metrics("run")[0] if key.startswith("corpus_")]


def test_a_run_says_what_share_of_its_positions_is_padding(corpora: Runs, capsys: pytest.CaptureFixture[str]):
    # In blocks of 8 books take 38 of them, code 3: an epoch reads 6 * 301 + 40 * 21 of 6 * 304 + 40 * 24 positions.
    assert main(corpora.command("plain", "train.steps=1")) == 0
    lines = capsys.readouterr().err.splitlines()
    assert "padding: 4.96% of the positions; every other one predicts a token" in lines
    assert main(corpora.command("mixed", *WEIGHTS, "train.steps=1")) == 0
    # A token takes 304/301 positions in 3/4 of all cases, 24/21 in 1/4.
    lines = capsys.readouterr().err.splitlines()
    assert "padding: 4.14% of the positions are to be expected; every other one predicts a token" in lines


def test_weights_that_do_not_fit_the_shards_are_refused_before_anything_is_written(
    corpora: Runs, capsys: pytest.CaptureFixture[str]
):
    assert main(corpora.command("run", "data.weights={books: 1, cod: 1}")) == 2
    assert "data.weights names the corpus 'cod'" in capsys.readouterr().err
    assert not (corpora.folder / "run").exists()
