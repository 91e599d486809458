"""One GPU trains like the CPU, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import BRT, finish, start
from training_runs import Runs

# A GPU adds up in another order than the CPU does.
TOLERANCE = 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("position", ["t5", "rotary"])
def test_a_gpu_gives_the_losses_and_norms_of_the_cpu(position: str, tmp_path: Path, shards: Path):
    runs = Runs(tmp_path / "runs", shards)
    for name, told in (("gpu", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})):
        command = runs.command(name, f"model.position={position}", "model.head_dim=32", "model.window=16")
        done = finish(start("python", 1, [*BRT, *command], told), timeout=300)
        assert done.returncode == 0, done.stderr
        assert f" on {'cuda' if name == 'gpu' else 'cpu'}, " in done.stderr
    assert runs.losses("gpu") == pytest.approx(runs.losses("cpu"), rel=TOLERANCE)
    assert runs.norms("gpu") == pytest.approx(runs.norms("cpu"), rel=TOLERANCE)
