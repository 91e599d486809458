"""A tiny training run: its command line, and what stands in its folder afterwards."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import yaml
from processes import run_in_turn

from brt_dist.run_config import RunConfig, load_run_config

STEPS, SAVE_EVERY = 12, 5
SETTINGS: dict[str, dict[str, Any]] = {
    "tokenizer": {"vocab_size": 384},
    "model": {
        **{"dim": 32, "num_layers": 3, "num_heads": 2, "head_dim": 16, "mlp_dim": 64, "window": 8, "num_states": 8},
        **{"recurrent_layers": [1], "position": "t5"},
    },
    "data": {"segment": 32, "lanes": 8},
    # Every gradient norm of these steps is larger than clip_norm (a test looks after it).
    "optimizer": {"lr": 0.003, "eps": 1e-6, "warmup_steps": 3, "embedding_lr_ratio": 2.0},
    "train": {"steps": STEPS, "save_every": SAVE_EVERY, "clip_norm": 0.1, "seed": 3},
}

EVALUATE = ("train.evaluate_every=4", "train.evaluate_documents=5", "train.evaluate_tokens=100", "train.save_every=0")
TWO_MICRO_BATCHES_ZERO_2 = ("parallel.micro_batches=2", "parallel.zero_stage=2")
ZERO_0 = "parallel.zero_stage=0"
TWO_MICRO_BATCHES_ZERO_0 = (ZERO_0, "parallel.micro_batches=2")
# The paper's schedule, with a warm-up that fits so few steps, and like there without clipping.
ADAFACTOR = (
    *(ZERO_0, "optimizer.name=adafactor", "optimizer.lr=1.0", "optimizer.schedule=rsqrt"),
    *("optimizer.warmup_steps=100", "train.clip_norm=0"),
)
MUON = (ZERO_0, "optimizer.name=muon")
DROPOUT = "model.dropout=0.2"
BFLOAT16 = "model.dtype=bfloat16"


class Runs:
    """Runs of one configuration in folders side by side."""

    def __init__(self, folder: Path, shards: Path):
        self.folder, self.config = folder, folder / "run.yaml"
        folder.mkdir(parents=True, exist_ok=True)
        settings = {**SETTINGS, "data": {**SETTINGS["data"], "shards": str(shards)}}
        self.config.write_text(yaml.safe_dump(settings))

    def command(self, name: str, *overrides: str) -> list[str]:
        """What follows `brt` in order to train the run `name`."""
        return ["train", str(self.config), f"run.dir={self.folder / name}", *overrides]

    def loaded(self, *overrides: str) -> RunConfig:
        """The configuration with some keys set otherwise."""
        return load_run_config(self.config, overrides)

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return _lines(self.folder / name / "metrics.jsonl")

    def losses(self, name: str) -> list[float]:
        """The loss of every step, in order of the lines."""
        return [line["loss"] for line in self.metrics(name)]

    def norms(self, name: str) -> list[float]:
        """The gradient norm of every step, in order of the lines."""
        return [line["grad_norm"] for line in self.metrics(name)]

    def evaluations(self, name: str) -> list[dict[str, Any]]:
        """The lines of evaluations.jsonl."""
        return _lines(self.folder / name / "evaluations.jsonl")

    def checkpoint(self, name: str, step: int = STEPS) -> Path:
        """The folder of a checkpoint."""
        return self.folder / name / "checkpoints" / f"step-{step:08d}"

    def broken_copy(self, source: Path, name: str, step: int = SAVE_EVERY) -> Path:
        """A copy of a finished run as it stood when it was killed, some steps behind the checkpoint of `step`."""
        copy = self.folder / name
        shutil.copytree(source, copy)
        for later in (copy / "checkpoints").iterdir():
            if int(later.name.removeprefix("step-")) > step:
                shutil.rmtree(later)
        with (copy / "metrics.jsonl").open("a") as file:
            file.write('{"step": 13, "loss"')
        return copy


def finished(
    runs: Runs, launcher: str, ranks: int, wanted: dict[str, tuple[str, ...]], refused: tuple[str, ...] = ()
) -> Runs:
    """`runs` with the `wanted` ones trained, name by name, in `ranks` processes; what they printed is in NAME.txt.

    Those that are also in `refused` must end with exit status 2 instead.
    """
    done = run_in_turn(launcher, ranks, [runs.command(name, *overrides) for name, overrides in wanted.items()])
    for name, (status, output) in zip(wanted, done, strict=True):
        assert status == (2 if name in refused else 0), output
        (runs.folder / f"{name}.txt").write_text(output)
    return runs


def wait_for_lines(path: Path, count: int, seconds: float) -> None:
    """Until the file has so many lines; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < end, f"{path} has no {count} lines after {seconds} s"
        time.sleep(0.01)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
