"""A run that goes on from a checkpoint repeats the unbroken run, bit for bit where the layout is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_runs import (
    ADAFACTOR,
    BFLOAT16,
    DROPOUT,
    EVALUATE,
    MUON,
    SAVE_EVERY,
    STEPS,
    TWO_MICRO_BATCHES_ZERO_2,
    ZERO_0,
    Runs,
    finished,
)

from brt_dist.checkpoint import files as checkpoints
from brt_dist.checkpoint.files import load_optimizer, load_parameters, read_facts

TOLERANCE = 1e-5
# Runs that two processes go on with in the same layout.
SAME_LAYOUT = {
    "plain": (),
    "micro_batches_2_zero_2": TWO_MICRO_BATCHES_ZERO_2,
    "zero_0": (ZERO_0,),
    "adafactor": ADAFACTOR,
    "muon": MUON,
    "dropout": (DROPOUT,),
}


@pytest.fixture(scope="session")
def pair_resumed(folder: Path, shards: Path, alone: Runs, pair: Runs) -> Runs:
    """Two processes, started by mpiexec, go on behind step 5 of runs that torchrun, or one process, began."""
    runs = Runs(folder / "pair resumed", shards)
    for name in SAME_LAYOUT:
        runs.broken_copy(pair.folder / name, name)
    runs.broken_copy(alone.folder / "plain", "from_one")
    runs.broken_copy(alone.folder / "zero_0", "zero_0_from_one")
    wanted = {**SAME_LAYOUT, "from_one": TWO_MICRO_BATCHES_ZERO_2, "zero_0_from_one": ()}
    return finished(runs, "mpiexec", 2, wanted)


@pytest.fixture(scope="session")
def alone_resumed(folder: Path, shards: Path, alone: Runs, pair: Runs) -> Runs:
    """One process goes on with runs of one and two processes, of another precision, with damage, and to more steps."""
    runs = Runs(folder / "alone resumed", shards)
    runs.broken_copy(pair.folder / "plain", "from_two")
    runs.broken_copy(pair.folder / "plain", "from_two_to_zero_0")
    runs.broken_copy(alone.folder / "bfloat16", "bfloat16")
    runs.broken_copy(alone.folder / "bfloat16_zero_0", "bfloat16_zero_0")
    runs.broken_copy(alone.folder / "adafactor", "lacking")
    write_without(runs.checkpoint("lacking", SAVE_EVERY), "layers.1.tokens.projection.weight[3]/momentum")
    runs.broken_copy(alone.folder / "plain", "truncated", step=10)
    runs.broken_copy(alone.folder / "plain", "altered", step=10)
    runs.broken_copy(alone.folder / "plain", "longer", step=STEPS)
    parameters = runs.checkpoint("truncated", 10) / "parameters.safetensors"
    parameters.write_bytes(parameters.read_bytes()[:-100])
    carry = runs.checkpoint("altered", 10) / "carry-00000-00008.safetensors"
    carry.write_bytes(carry.read_bytes()[:-1] + b"?")
    wanted = {
        "from_two": ("parallel.micro_batches=4",),
        "from_two_to_zero_0": (ZERO_0,),
        "bfloat16": (BFLOAT16,),
        "bfloat16_zero_0": (BFLOAT16, ZERO_0, *EVALUATE, f"train.save_every={SAVE_EVERY}"),
        "lacking": ADAFACTOR,
        "truncated": (),
        "altered": (),
        "longer": ("train.steps=14", "train.evaluate_every=7"),
    }
    return finished(runs, "python", 1, wanted, refused=("lacking",))


def write_without(checkpoint: Path, name: str) -> None:
    """Make the checkpoint again, whole in itself, without one tensor of its optimizer."""
    tensors, facts = load_optimizer(checkpoint), read_facts(checkpoint)
    del tensors[name], facts["files"]
    partial = checkpoint.rename(checkpoint.with_suffix(".partial"))
    checkpoints.write_tensors(partial, checkpoints.OPTIMIZER, tensors)
    (partial / checkpoints.FACTS).unlink()
    checkpoints.finish(partial, facts)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", SAME_LAYOUT)
def test_a_resumed_run_repeats_losses_norms_and_checkpoint_bit_for_bit(name: str, pair: Runs, pair_resumed: Runs):
    assert f"going on behind step {SAVE_EVERY}" in (pair_resumed.folder / f"{name}.txt").read_text()
    assert pair_resumed.losses(name) == pair.losses(name)
    assert pair_resumed.norms(name) == pair.norms(name)
    for step in (10, STEPS):
        ours, theirs = files(pair_resumed.checkpoint(name, step)), files(pair.checkpoint(name, step))
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if ours[name] != theirs[name]] == []


@pytest.mark.parametrize("name", ["plain", "dropout"])
def test_lines_behind_the_checkpoint_are_dropped_and_made_again(name: str, pair_resumed: Runs):
    lines = pair_resumed.metrics(name)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("name", "began"),
    [("from_one", "alone"), ("zero_0_from_one", "alone"), ("from_two", "pair"), ("from_two_to_zero_0", "pair")],
)
def test_a_run_goes_on_in_another_layout(name: str, began: str, request: pytest.FixtureRequest):
    resumed: Runs = request.getfixturevalue("pair_resumed" if began == "alone" else "alone_resumed")
    unbroken: Runs = request.getfixturevalue(began)
    assert resumed.losses(name) == pytest.approx(unbroken.losses("plain"), rel=TOLERANCE)
    assert resumed.norms(name) == pytest.approx(unbroken.norms("plain"), rel=TOLERANCE)
    ours, theirs = load_parameters(resumed.checkpoint(name)), load_parameters(unbroken.checkpoint("plain"))
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in theirs) < 1e-5
    assert [line["step"] for line in resumed.metrics(name)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16_zero_0"])
def test_bfloat16_goes_on_with_equal_losses(name: str, alone: Runs, alone_resumed: Runs):
    assert alone_resumed.losses(name) == alone.losses(name)
    assert alone_resumed.evaluations(name) == alone.evaluations(name)
    assert files(alone_resumed.checkpoint(name)) == files(alone.checkpoint(name))


def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_name(alone_resumed: Runs):
    told = (alone_resumed.folder / "lacking.txt").read_text().splitlines()[-1]
    assert told.startswith("brt: ")
    assert "step-00000005 is not of this model and optimizer: it lacks layers.1.tokens.projection.weight[3]" in told


@pytest.mark.parametrize(
    ("name", "file", "why"),
    [
        ("truncated", "parameters.safetensors", "bytes instead of"),
        ("altered", "carry-00000-00008.safetensors", "was altered"),
    ],
)
def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(
    name: str, file: str, why: str, alone: Runs, alone_resumed: Runs
):
    output = (alone_resumed.folder / f"{name}.txt").read_text()
    told = [line for line in output.splitlines() if "passed over" in line]
    assert len(told) == 1
    assert told[0].startswith("step-00000010 is passed over: ")
    assert f"{file} " in told[0]
    assert why in told[0]
    assert "going on behind step 5" in output
    assert alone_resumed.losses(name) == alone.losses("plain")
    assert files(alone_resumed.checkpoint(name, 10)) == files(alone.checkpoint("plain", 10))


def test_a_finished_run_goes_on_when_it_is_given_more_steps(alone: Runs, alone_resumed: Runs):
    assert alone_resumed.losses("longer")[:STEPS] == alone.losses("plain")
    assert [line["step"] for line in alone_resumed.metrics("longer")] == list(range(1, 15))
    assert [line["step"] for line in alone_resumed.evaluations("longer")] == [14]
    assert read_facts(alone_resumed.checkpoint("longer", 14))["step"] == 14
    assert files(alone_resumed.checkpoint("longer", STEPS)) == files(alone.checkpoint("plain"))
