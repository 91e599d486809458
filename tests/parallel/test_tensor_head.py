"""The head that tensor ranks share is the plain head, its gradients included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.multiprocessing
from tensor_head_ranks import RANKS, compare_heads


def test_two_tensor_ranks_give_the_logits_losses_and_gradients_of_the_whole_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    torch.multiprocessing.spawn(compare_heads, (tmp_path / "meeting",), RANKS)
