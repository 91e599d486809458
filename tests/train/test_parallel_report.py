"""`parallel.report`: the bytes that a run reports are those that its layout must move, and it changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_runs import SETTINGS, ZERO_0, Runs, finished

from brt_dist.parallel.parallelize import whole_shapes
from brt_dist.parallel.stages import divide_layers
from brt_dist.train.parallel_report import ProcessReport, ranges, told
from brt_dist.train.time_shares import TimeShares
from brt_dist.train.traffic import StepTraffic, Traffic

STEPS = 7
SHORT = (f"train.steps={STEPS}", "train.save_every=0")
REPORT = "parallel.report=true"
BOTH = ("parallel.tensor=2", "parallel.pipeline=2", "parallel.micro_batches=2")
MICRO_BATCHES = 2

# Bytes of a micro-batch of four lanes, which is that of all layouts here: its activations, and the states of a layer.
LANES, FLOAT, INT64 = 4, 4, 8
MODEL, SEGMENT = SETTINGS["model"], SETTINGS["data"]["segment"]
TOKENS = LANES * SEGMENT
ACTIVATIONS = TOKENS * MODEL["dim"] * FLOAT
STATES = LANES * MODEL["num_states"] * MODEL["dim"] * FLOAT
BLOCKS = SEGMENT // MODEL["window"]
# What a state has read, whole.
READ = LANES * MODEL["num_states"] * 2 * MODEL["num_heads"] * MODEL["head_dim"] * FLOAT
CELLS = {
    "lstm skip": ("model.gate=lstm", "model.cell=skip"),
    "fixed dual": ("model.gate=fixed", "model.cell=dual"),
    "lstm single": ("model.gate=lstm", "model.cell=single"),
}
# Sizes of all reductions of the state chain in a segment, forward and backward. The update behind the last block gets
# no gradient; the state's projection always does, since tokens read it.
REDUCED = {
    "lstm skip": [3 * STATES] * BLOCKS + [STATES] * BLOCKS,
    "fixed dual": [STATES] * (2 * BLOCKS) + [STATES] * (2 * BLOCKS - 1),
    "lstm single": [3 * STATES] * BLOCKS + [STATES] * BLOCKS,
}
# The sum of the step's loss over all processes.
OWN = (1, 8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Runs:
    """Four processes."""
    wanted = {
        "plain": (*BOTH, *SHORT),
        "reported": (*BOTH, *SHORT, REPORT, "train.profile_steps=1"),
        "sequence": (ZERO_0, "parallel.tensor=2", "parallel.sequence=true", "train.steps=3", REPORT),
        "zero_0": (ZERO_0, *SHORT, REPORT),
        "one_step": (ZERO_0, "train.steps=1", REPORT),
        **{name: (ZERO_0, "parallel.tensor=2", *SHORT, REPORT, *cell) for name, cell in CELLS.items()},
    }
    return finished(Runs(tmp_path_factory.mktemp("reports"), shards), "torchrun", 4, wanted)


def reported(runs: Runs, name: str = "reported") -> list[dict[str, Any]]:
    """What every process told, in order."""
    ranks: list[dict[str, Any]] = json.loads((runs.folder / name / "report.json").read_text())["ranks"]
    return ranks


def calls_and_bytes(rank: dict[str, Any], name: str) -> tuple[int, int]:
    """Of each step; all of them are the same."""
    each = {(step["traffic"][name]["calls"], step["traffic"][name]["bytes"]) for step in rank["steps"]}
    assert len(each) == 1
    return each.pop()


def not_deepspeeds(rank: dict[str, Any], name: str) -> tuple[int, int]:
    """What neither DeepSpeed nor our own loop calls: megatron-core's share."""
    calls, size = calls_and_bytes(rank, name)
    logged = rank["by_deepspeed"].get(name, {"calls": 0, "bytes": 0})
    return calls - logged["calls"] - OWN[0], size - logged["bytes"] - OWN[1]


def test_a_report_changes_no_loss_and_no_gradient(runs: Runs):
    assert runs.losses("reported") == runs.losses("plain")
    assert runs.norms("reported") == runs.norms("plain")


def test_every_process_is_told_with_its_place_and_its_steps(runs: Runs):
    ranks = reported(runs)
    assert [(rank["stage"], rank["data"], rank["tensor"]) for rank in ranks] == [
        (0, 0, 0),
        (0, 0, 1),
        (1, 0, 0),
        (1, 0, 1),
    ]
    assert all([step["step"] for step in rank["steps"]] == [2, 3, 4] for rank in ranks)


def test_tensor_ranks_move_the_same(runs: Runs):
    first, second, third, fourth = (rank["steps"] for rank in reported(runs))
    for left, right in ((first, second), (third, fourth)):
        assert [step["traffic"] for step in left] == [step["traffic"] for step in right]


def test_activations_go_forward_with_starts_and_slot_and_gradients_come_back(runs: Runs):
    first, last = (reported(runs)[rank] for rank in (0, 2))
    forward = ACTIVATIONS + LANES * BLOCKS * INT64 + INT64
    assert calls_and_bytes(first, "send") == (3 * MICRO_BATCHES, MICRO_BATCHES * forward)
    assert calls_and_bytes(last, "recv") == calls_and_bytes(first, "send")
    assert calls_and_bytes(last, "send") == (MICRO_BATCHES, MICRO_BATCHES * ACTIVATIONS)
    assert calls_and_bytes(first, "recv") == calls_and_bytes(last, "send")


@pytest.mark.parametrize("stage", [0, 1])
def test_tensor_ranks_add_up_as_often_as_the_layers_ask(runs: Runs, stage: int):
    numbers = divide_layers(runs.loaded().model, 2)[stage]
    recurrent = len({*numbers} & {*MODEL["recurrent_layers"]})
    # Forward the outputs of attention and MLP, backward their inputs; behind the embedding, in front of the head.
    activations = 4 * len(numbers) + 1
    # Forward the candidate of the skip cell's gate, backward the input of the state's projection.
    states = 2 * BLOCKS * recurrent
    # The largest logit, then the target's and the sum.
    losses = [TOKENS * FLOAT, 2 * TOKENS * FLOAT] if stage == 1 else []
    assert not_deepspeeds(reported(runs)[2 * stage], "all_reduce") == (
        MICRO_BATCHES * (activations + states + len(losses)),
        MICRO_BATCHES * (activations * ACTIVATIONS + states * STATES + sum(losses)),
    )


@pytest.mark.parametrize("name", CELLS)
def test_the_state_chain_of_every_cell_is_added_up_as_often_as_it_must_be(runs: Runs, name: str):
    activations = 4 * MODEL["num_layers"] + 2
    losses, norm = [TOKENS * FLOAT, 2 * TOKENS * FLOAT], [FLOAT]
    expected = [ACTIVATIONS] * activations + losses + norm + REDUCED[name]
    for rank in reported(runs, name):
        assert not_deepspeeds(rank, "all_reduce") == (len(expected), sum(expected))
        others = {kind for step in rank["steps"] for kind in step["traffic"]} - {"all_reduce"}
        if name != "lstm single":
            assert others == set()
            continue
        assert calls_and_bytes(rank, "all_gather") == (BLOCKS, BLOCKS * READ // 2)
        assert calls_and_bytes(rank, "reduce_scatter") == (BLOCKS - 1, (BLOCKS - 1) * READ)


def test_with_shared_tokens_they_gather_and_scatter_instead(runs: Runs):
    layers = MODEL["num_layers"]
    scattered = 4 * layers + 2
    # Backward a layer's two column matrices gather their input again, for the gradient of their weights.
    gathered = 4 * layers + 2 + 2 * layers
    for rank in reported(runs, "sequence"):
        assert calls_and_bytes(rank, "reduce_scatter") == (scattered, scattered * ACTIVATIONS)
        assert calls_and_bytes(rank, "all_gather") == (gathered, gathered * ACTIVATIONS // 2)
        assert rank["by_deepspeed"] is None


def test_without_sharding_data_ranks_add_up_every_gradient_once(runs: Runs):
    parameters = sum(shape.numel() for shape in whole_shapes(runs.loaded().model).values())
    for rank in reported(runs, "zero_0"):
        assert rank["by_deepspeed"] == {"all_reduce": {"calls": 1, "bytes": parameters * FLOAT}}
        assert not_deepspeeds(rank, "all_reduce") == (0, 0)
        assert all(step["traffic"].keys() == {"all_reduce"} for step in rank["steps"])


def test_what_deepspeed_logs_is_among_what_the_profiler_sees(runs: Runs):
    for rank in reported(runs):
        assert {"send", "recv", "all_reduce"} <= rank["by_deepspeed"].keys()
        for name, logged in rank["by_deepspeed"].items():
            calls, size = calls_and_bytes(rank, name)
            assert logged["calls"] <= calls
            assert logged["bytes"] <= size


def test_the_shares_of_time_make_up_the_step(runs: Runs):
    for name, has_bubble in (("reported", True), ("sequence", False)):
        took = {line["step"]: line["step_seconds"] * 1e9 for line in runs.metrics(name)}
        for rank in reported(runs, name):
            assert rank["peak_memory_bytes"] > 50 * 2**20
            for step in rank["steps"]:
                times = step["nanoseconds"]
                assert times["step"] == times["compute"] + times["communication"] + times["bubble"]
                assert times["compute"] > 0
                assert times["communication"] > 0
                assert (times["bubble"] > 0) == has_bubble
                assert rank["rank"] or times["step"] >= 0.99 * took[step["step"]]


def test_a_person_reads_a_line_for_every_process_and_the_traffic_of_like_ones_together(runs: Runs):
    lines = (runs.folder / "reported.txt").read_text().splitlines()
    begin = next(index for index, line in enumerate(lines) if line.startswith("parallel.report: means of steps 2 to 4"))
    assert [line.split()[:4] for line in lines[begin + 3 : begin + 7]] == [
        [str(rank), str(stage), "0", str(tensor)]
        for rank, stage, tensor in ((0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1))
    ]
    assert "  ranks 0-1" in lines
    assert "  ranks 2-3" in lines


def test_a_trace_is_written_of_a_step_behind_the_report(runs: Runs):
    assert len(list((runs.folder / "reported" / "profile").iterdir())) == 4


def test_a_run_of_one_step_says_that_there_is_nothing_to_tell(runs: Runs):
    assert "has no step behind its first one" in (runs.folder / "one_step.txt").read_text()
    assert not (runs.folder / "one_step" / "report.json").exists()


def test_one_process_alone_waits_for_nobody(tmp_path: Path, shards: Path):
    alone = finished(Runs(tmp_path, shards), "python", 1, {"plain": SHORT, "reported": (*SHORT, REPORT)})
    (rank,) = reported(alone)
    assert all(step["nanoseconds"]["bubble"] == 0 for step in rank["steps"])
    assert not {"send", "recv", "all_to_all"} & {name for step in rank["steps"] for name in step["traffic"]}
    assert alone.losses("reported") == alone.losses("plain")


@pytest.mark.parametrize(
    ("ranks", "text"), [([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8"), (list(range(512)), "0-511")]
)
def test_ranks_are_named_in_few_words(ranks: list[int], text: str):
    assert ranges(ranks) == text


def test_steps_that_move_different_amounts_are_told_by_their_mean():
    steps = [StepTraffic(TimeShares(1, 2, 3), False, {"send": Traffic(calls, 10)}) for calls in (1, 2)]
    lines = told([ProcessReport(0, 0, 0, 0, 2**30, steps)], 2, "cpu")
    assert lines[-1].split() == ["send", "1.5", "calls", "10", "bytes"]
