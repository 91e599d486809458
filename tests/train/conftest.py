"""The same training in several layouts, each started once for all tests of a session."""

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
    TWO_MICRO_BATCHES_ZERO_0,
    TWO_MICRO_BATCHES_ZERO_2,
    ZERO_0,
    Runs,
    finished,
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="session")
def alone(folder: Path, shards: Path) -> Runs:
    """One process."""
    wanted = {
        "plain": (),
        "micro_batches_2_zero_2": TWO_MICRO_BATCHES_ZERO_2,
        "micro_batches_2_zero_0": TWO_MICRO_BATCHES_ZERO_0,
        "zero_0": (ZERO_0,),
        "adafactor": ADAFACTOR,
        "muon": MUON,
        "micro_batches_4": ("parallel.micro_batches=4",),
        "dropout": (DROPOUT, "parallel.micro_batches=2"),
        "evaluated": EVALUATE,
        "bfloat16": (BFLOAT16,),
        "bfloat16_zero_0": (BFLOAT16, ZERO_0, *EVALUATE, f"train.save_every={SAVE_EVERY}"),
    }
    return finished(Runs(folder / "alone", shards), "python", 1, wanted)


@pytest.fixture(scope="session")
def pair(folder: Path, shards: Path) -> Runs:
    """Two processes."""
    wanted = {
        "plain": (),
        "micro_batches_2_zero_2": TWO_MICRO_BATCHES_ZERO_2,
        "micro_batches_2_zero_0": TWO_MICRO_BATCHES_ZERO_0,
        "zero_0": (ZERO_0,),
        "adafactor": ADAFACTOR,
        "muon": MUON,
        "dropout": (DROPOUT,),
        "evaluated": EVALUATE,
        "long": ("train.steps=40", "train.save_every=10"),
    }
    return finished(Runs(folder / "pair", shards), "torchrun", 2, wanted)


@pytest.fixture(scope="session")
def four(folder: Path, shards: Path) -> Runs:
    """Four processes."""
    wanted = {
        "plain": (),
        "micro_batches_2_zero_2": TWO_MICRO_BATCHES_ZERO_2,
        "micro_batches_2_zero_0": TWO_MICRO_BATCHES_ZERO_0,
        "zero_0": (ZERO_0,),
    }
    return finished(Runs(folder / "four", shards), "torchrun", 4, wanted)
