"""`brt bench`: layers timed against each other, steps timed in whatever layout, and no file of either."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import BRT, run
from torch import nn
from training_runs import SETTINGS

from brt_dist.cli import main
from brt_dist.model import recurrent_layer, transformer_layer
from brt_dist.model.config import ModelConfig
from brt_dist.model.flops import layer_flops
from brt_dist.parallel.launcher import NAMES
from brt_dist.run_config import load_run_config
from brt_dist.train import bench
from brt_dist.train.bench import bench_layers, random_batch

STEPS = 2
PIPELINE = ("parallel.pipeline=2", "parallel.micro_batches=2")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (name for names in NAMES for name in names):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration that is the only file in the working directory; its shards don't exist."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, "shards": {"dir": "shards"}, "run": {"dir": "runs"}}))
    return path


@pytest.fixture
def model(config: Path) -> ModelConfig:
    return load_run_config(config).model


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    return told.err


# --- layers ---


@pytest.mark.parametrize("variant", [("fixed", "skip"), ("lstm", "dual")])
def test_layers_prints_both_medians_and_both_ratios_and_writes_nothing(
    variant: tuple[str, str], config: Path, model: ModelConfig, capsys: pytest.CaptureFixture[str]
):
    keys = [f"model.gate={variant[0]}", f"model.cell={variant[1]}", "model.dtype=bfloat16"]
    assert main(["bench", "layers", str(config), *keys, "--lanes", "2", "--repeat", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ordinary_seconds"] > 0
    assert found["ratio"] == found["recurrent_seconds"] / found["ordinary_seconds"]
    assert found["ratio_of_rounds"][0] <= found["ratio_of_rounds"][1]
    model = replace(model, gate=variant[0], cell=variant[1])  # type: ignore[arg-type]
    assert found["flops_ratio"] == layer_flops(model, 1) / layer_flops(model, 0)
    wanted = {"rounds": 3, "lanes": 2, "segment": 32, "dtype": "bfloat16", "gate": variant[0], "cell": variant[1]}
    assert wanted.items() <= found.items()
    assert (found["torch"], found["threads"]) == (torch.__version__, torch.get_num_threads())
    assert list(config.parent.iterdir()) == [config]


def test_a_layer_that_works_longer_takes_longer(model: ModelConfig, monkeypatch: pytest.MonkeyPatch):
    plain = recurrent_layer.RecurrentLayer.forward

    def slow(*arguments: Any) -> Any:
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
        return plain(*arguments)

    monkeypatch.setattr(recurrent_layer.RecurrentLayer, "forward", slow)
    found = bench_layers(model, segment=32, lanes=1, repeat=1)
    assert found["recurrent_seconds"] > 0.05
    assert found["ordinary_seconds"] < 0.05


def test_the_rounds_of_the_warm_up_do_not_count(model: ModelConfig, monkeypatch: pytest.MonkeyPatch):
    told = iter([100.0, 1.0] * bench.WARM_UP_ROUNDS + [2.0, 4.0, 1.0, 6.0, 3.0, 5.0])
    monkeypatch.setattr(bench, "_seconds", lambda call, device: next(told))
    found = bench_layers(model, segment=32, lanes=1, repeat=3)
    assert (found["ordinary_seconds"], found["recurrent_seconds"], found["ratio"]) == (2.0, 5.0, 2.5)
    assert found["ratio_of_rounds"] == [5 / 3, 6.0]


def test_layers_goes_back_to_every_parameter_and_to_the_input(model: ModelConfig, monkeypatch: pytest.MonkeyPatch):
    timed: list[nn.Module] = []
    inputs = []
    for kind in (transformer_layer.TransformerLayer, recurrent_layer.RecurrentLayer):

        def noting(layer: Any, x_BLD: Any, *others: Any, plain: Any = kind.forward) -> Any:
            timed.append(layer)
            inputs.append(x_BLD)
            return plain(layer, x_BLD, *others)

        monkeypatch.setattr(kind, "forward", noting)
    bench_layers(model, segment=32, lanes=2, repeat=1)
    kinds = [type(layer).__name__ for layer in timed]
    assert kinds == ["TransformerLayer", "RecurrentLayer"] * (bench.WARM_UP_ROUNDS + 1)
    # A state's parameters are reached through later blocks.
    gradients = [parameter.grad for layer in timed[-2:] for parameter in layer.parameters()] + [inputs[-1].grad]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["model.recurrent_layers=[]"], "model.recurrent_layers is empty"),
        (["model.feedback=true"], "model.feedback=false"),
        (["data.segment=12"], "window, 8"),
    ],
)
def test_layers_that_cannot_be_timed_are_one_line(
    keys: list[str], said: str, config: Path, capsys: pytest.CaptureFixture[str]
):
    assert said in refused(capsys, ["bench", "layers", str(config), *keys])


def test_layers_are_of_one_process(config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes were started" in refused(capsys, ["bench", "layers", str(config)])


# --- steps ---


def test_a_lane_reads_the_same_random_tokens_in_every_layout(model: ModelConfig):
    whole = random_batch(model, 32, 8, 5, range(8), seed=1)
    part = random_batch(model, 32, 8, 5, range(4, 6), seed=1)
    assert torch.equal(whole.tokens_BL[4:6], part.tokens_BL)
    assert torch.equal(whole.targets_BL[4:6], part.targets_BL)
    assert torch.equal(whole.starts_BC[4:6], part.starts_BC)
    assert part.predicted == 8 * 32
    assert not torch.equal(part.tokens_BL[0], part.tokens_BL[1])
    assert torch.equal(part.tokens_BL[:, 1:], part.targets_BL[:, :-1])
    assert not torch.equal(whole.tokens_BL, random_batch(model, 32, 8, 6, range(8), seed=1).tokens_BL)


def test_in_one_segment_of_four_a_document_begins_in_front_of_any_block(model: ModelConfig):
    starts_BC = torch.cat([random_batch(model, 32, 8, p, range(8), seed=0).starts_BC for p in range(200)])
    assert starts_BC.sum(1).max() == 1
    assert starts_BC.sum() / len(starts_BC) == pytest.approx(1 / bench.SEGMENTS_PER_DOCUMENT, abs=0.05)
    assert starts_BC.any(0).all()


def test_steps_of_one_process_and_of_a_pipeline_of_two_print_one_line_each_and_write_nothing(config: Path):
    arguments = [*BRT, "bench", "step", str(config), "--steps", str(STEPS)]
    alone = printed("python", 1, arguments)
    pipeline = printed("torchrun", 2, [*arguments, *PIPELINE])
    assert list(config.parent.iterdir()) == [config]
    for ranks, found in ((1, alone), (2, pipeline)):
        low, high = found["step_seconds_range"]
        assert 0 < low <= found["step_seconds"] <= high
        assert found["tokens_per_second"] == pytest.approx(8 * 32 / found["step_seconds"])
        assert found["tokens_per_second_per_device"] == pytest.approx(found["tokens_per_second"] / ranks)
        assert len(found["peak_memory_bytes"]) == ranks
        assert all(peak > 2**26 for peak in found["peak_memory_bytes"])
        assert (found["layout"]["processes"], found["layout"]["pipeline"]) == (ranks, ranks)
        wanted = {"steps": STEPS, "device": "cpu", "mfu": None, "dtype": "float32", "attention": "explicit"}
        assert wanted.items() <= found.items()
        assert {"device_name", "torch", "deepspeed", "threads"} <= set(found)
    assert alone["parameters"] == pipeline["parameters"]
    assert pipeline["layout"]["micro_batches"] == 2
    assert alone["last_loss"] != alone["first_loss"]
    for loss in ("first_loss", "last_loss"):
        assert pipeline[loss] == pytest.approx(alone[loss], rel=1e-5)


def printed(launcher: str, ranks: int, program: list[str]) -> dict[str, Any]:
    """The one JSON line on standard output."""
    done = run(launcher, ranks, program, timeout=240)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found
