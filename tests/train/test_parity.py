"""The parity matrix: every layout gives the losses, gradient norms and parameters of one process, in float32.

Twenty steps of AdamW, clipped at every one, with documents that begin inside segments, recurrent layers on both stages
of a pipeline, and two micro-batches. A run whose reference reads lanes one group after the other, or segment after
segment, is that of one process at ZeRO-1 (which test_layouts.py holds against a plain torch loop).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layouts import MODEL, Layout, covering, every_layout, pairs
from processes import run_in_turn
from training_runs import Runs, finished

from brt_dist.checkpoint.files import load_carry, load_optimizer, load_parameters, read_facts
from brt_dist.cli import main
from brt_dist.data.lanes import plan_lanes
from brt_dist.data.token_shards import TokenShards
from brt_dist.parallel.stages import divide_layers

TOLERANCE = 1e-5
STEPS = 20
SHORT = covering(every_layout())
EIGHT = Layout(2, 2, 2, "segments", 1, "full", True, "lstm:dual")
# The whole product of the layouts; the cells take turns.
LONG = [layout for index, layout in enumerate(every_layout()) if index % 3 == index // 3 % 3]

# One run that changes its layout as it goes, and the same in one process. Its learning rate knows no last step.
CHANGING = ("optimizer.schedule=rsqrt", "optimizer.lr=0.01")
ROUTE = [
    Layout(tensor=2, pipeline=2, sequence=True),
    Layout(data=4, zero_stage=2, recompute="full"),
    Layout(tensor=2, data=2, zero_stage=0),
    Layout(pipeline=4),
]


def trained(folder: Path, shards: Path, layouts: Sequence[Layout]) -> Runs:
    """The layouts' runs and their references, by name, in few launches."""
    runs = Runs(folder, shards)
    wanted: dict[int, dict[str, tuple[str, ...]]] = {1: {each.reference: each.sequential for each in layouts}}
    for layout in layouts:
        wanted.setdefault(layout.world, {})[layout.name] = layout.overrides
    for world, by_name in sorted(wanted.items()):
        finished(runs, "python" if world == 1 else "torchrun", world, by_name)
    return runs


@pytest.fixture(scope="module")
def matrix(folder: Path, shards: Path) -> Runs:
    """The short form."""
    return trained(folder / "parity", shards, SHORT)


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def assert_same_run(runs: Runs, name: str, reference: str, steps: int = STEPS) -> None:
    """Losses and norms to 1e-5 of their size, parameters, moments and carry to 1e-5."""
    assert [line["step"] for line in runs.metrics(name)] == list(range(1, steps + 1))
    assert runs.losses(name) == pytest.approx(runs.losses(reference), rel=TOLERANCE, abs=0)
    assert runs.norms(name) == pytest.approx(runs.norms(reference), rel=TOLERANCE, abs=0)
    ours, theirs = runs.checkpoint(name, steps), runs.checkpoint(reference, steps)
    assert largest_difference(load_parameters(ours), load_parameters(theirs)) < TOLERANCE
    assert largest_difference(load_optimizer(ours), load_optimizer(theirs)) < TOLERANCE
    lanes = range(runs.loaded().data.lanes)
    assert largest_difference(load_carry(ours, lanes), load_carry(theirs, lanes)) < TOLERANCE
    for fact in ("position", "tokens"):
        assert read_facts(ours)[fact] == read_facts(theirs)[fact]


def test_the_short_form_has_every_pair_of_values_that_any_layout_has():
    covered = set().union(*map(pairs, SHORT))
    assert covered == set().union(*map(pairs, every_layout()))
    assert {layout.world for layout in SHORT} == {1, 2, 4}


def test_the_long_form_has_every_layout_and_in_each_of_its_parts_every_cell():
    assert {replace(layout, cell="") for layout in LONG} == {replace(layout, cell="") for layout in every_layout()}
    assert min(Counter((layout.cell, layout.world) for layout in LONG).values()) >= 2


def test_recurrent_layers_are_on_both_stages_of_these_runs(matrix: Runs):
    model = matrix.loaded(*MODEL).model
    stages = divide_layers(model, 2)
    assert [len(set(stage) & set(model.recurrent_layers)) for stage in stages] == [1, 1]


def test_documents_start_inside_segments_and_go_on_over_steps_in_these_runs(matrix: Runs, shards: Path):
    config = matrix.loaded(*MODEL)
    lengths = TokenShards.open(shards, "none").split("train").lengths
    plan = plan_lanes(lengths, config.data.lanes, config.data.segment, config.model.window, seed=config.data.seed)
    pieces = [piece for step in range(STEPS) for lane in plan.at(step).pieces for piece in lane]
    assert sum(piece.offset == 0 and piece.column > 0 for piece in pieces) > 10
    assert sum(piece.offset > 0 for piece in pieces) > 40


@pytest.mark.parametrize("layout", SHORT, ids=lambda layout: layout.name)
def test_a_layout_gives_the_losses_norms_and_parameters_of_one_process(layout: Layout, matrix: Runs):
    assert min(matrix.norms(layout.reference)) > matrix.loaded().train.clip_norm
    assert_same_run(matrix, layout.name, layout.reference)


def test_steps_over_two_segments_are_not_those_over_two_groups_of_lanes(matrix: Runs):
    lanes, segments = (f"one process {axis} fixed:skip" for axis in ("lanes", "segments"))
    assert matrix.losses(lanes) != pytest.approx(matrix.losses(segments), rel=1e-3)
    facts = [read_facts(matrix.checkpoint(name, STEPS)) for name in (lanes, segments)]
    assert [each["position"] for each in facts] == [STEPS, 2 * STEPS]
    assert facts[1]["tokens"] > 1.5 * facts[0]["tokens"]


@pytest.fixture(scope="module")
def changing(folder: Path, shards: Path) -> Runs:
    """Five steps in each of several layouts, one behind the other; and all of them in one process."""
    runs = Runs(folder / "changing", shards)
    steps = len(ROUTE) * 5
    settings = (*ROUTE[0].sequential, *CHANGING, "train.evaluate_every=5")
    finished(runs, "python", 1, {"unbroken": (*settings, f"train.steps={steps}")})
    route = [
        runs.command("changing", *layout.overrides, *settings[len(layout.sequential) :], f"train.steps={5 * (n + 1)}")
        for n, layout in enumerate(ROUTE)
    ]
    done = run_in_turn("torchrun", 4, route)
    assert [status for status, _ in done] == [0] * len(ROUTE), done
    return runs


def test_a_run_goes_on_in_other_layouts_as_if_it_had_stayed(changing: Runs):
    assert_same_run(changing, "changing", "unbroken")


def test_evaluations_of_every_layout_are_those_of_one_process(changing: Runs):
    ours, theirs = changing.evaluations("changing"), changing.evaluations("unbroken")
    assert [line["step"] for line in ours] == [5, 10, 15, 20]
    for here, there in zip(ours, theirs, strict=True):
        assert here.keys() == there.keys()
        assert here == pytest.approx(there, abs=TOLERANCE)


def test_the_health_of_the_state_is_heard_in_every_layout(changing: Runs):
    for here, there in zip(changing.metrics("changing"), changing.metrics("unbroken"), strict=True):
        assert sorted(here) == sorted(there)
        for name in ("gate_openness/1", "gate_openness/2", "state_change/1", "state_change/2"):
            assert here.get(name, 0.0) == pytest.approx(there.get(name, 0.0), rel=1e-4)
    heard = [line for line in changing.metrics("changing") if "state_attention/1" in line]
    assert [line["step"] for line in heard] == [10, 20]


def test_one_process_evaluates_the_checkpoint_of_a_pipeline(changing: Runs, tmp_path: Path):
    names = sorted(path.name for path in changing.checkpoint("changing", STEPS).glob("parameters*"))
    assert names == [f"parameters-layers-{n:03d}-{n + 1:03d}.safetensors" for n in range(4)]
    folders = [str(changing.folder / name) for name in ("changing", "unbroken")]
    assert main(["evaluate", *folders, "--split", "validation", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "validation.json").read_text())
    ours, theirs = report["runs"]
    for unit in ("token", "byte"):
        assert ours[f"bits_per_{unit}"] == pytest.approx(theirs[f"bits_per_{unit}"], abs=TOLERANCE)


def test_eight_processes_give_the_losses_norms_and_parameters_of_one(folder: Path, shards: Path):
    runs = trained(folder / "eight", shards, [EIGHT])
    assert_same_run(runs, EIGHT.name, EIGHT.reference)


@pytest.fixture(scope="module")
def whole(folder: Path, shards: Path) -> Runs:
    """The long form."""
    return trained(folder / "whole", shards, LONG)


@pytest.mark.long
@pytest.mark.parametrize("layout", LONG, ids=lambda layout: layout.name)
def test_every_layout_gives_the_losses_norms_and_parameters_of_one_process(layout: Layout, whole: Runs):
    assert_same_run(whole, layout.name, layout.reference)
