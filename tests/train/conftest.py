"""The same training in several layouts, each started once for all tests of a session."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_runs import BFLOAT16, DROPOUT, EVALUATE, TWO_MICRO_BATCHES_ZERO_2, Runs, finished


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="session")
def alone(folder: Path, shards: Path) -> Runs:
    """One process."""
    wanted = {
        "plain": (),
        "micro_batches_2_zero_2": TWO_MICRO_BATCHES_ZERO_2,
        "micro_batches_4": ("parallel.micro_batches=4",),
        "dropout": (DROPOUT, "parallel.micro_batches=2"),
        "evaluated": EVALUATE,
        "bfloat16": (BFLOAT16,),
    }
    return finished(Runs(folder / "alone", shards), "python", 1, wanted)


@pytest.fixture(scope="session")
def pair(folder: Path, shards: Path) -> Runs:
    """Two processes."""
    wanted = {
        "plain": (),
        "micro_batches_2_zero_2": TWO_MICRO_BATCHES_ZERO_2,
        "dropout": (DROPOUT,),
        "evaluated": EVALUATE,
        "long": ("train.steps=40", "train.save_every=10"),
    }
    return finished(Runs(folder / "pair", shards), "torchrun", 2, wanted)


@pytest.fixture(scope="session")
def four(folder: Path, shards: Path) -> Runs:
    """Four processes."""
    wanted: dict[str, tuple[str, ...]] = {"plain": (), "micro_batches_2_zero_2": TWO_MICRO_BATCHES_ZERO_2}
    return finished(Runs(folder / "four", shards), "torchrun", 4, wanted)
