"""The loss scale of float16 at ZeRO-0: halved where a step does not fit, doubled after many that did."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from brt_dist.train.config import OptimizerConfig
from brt_dist.train.loss_scale import STEPS_TO_GROW, LossScale, OutOfScale
from brt_dist.train.unsharded import UnshardedOptimizer


def test_a_scale_is_halved_at_once_and_below_1_the_run_is_lost():
    scale = LossScale(4.0)
    seen = []
    for _ in range(2):
        scale.update(overflow=True)
        seen.append(scale.scale)
    assert seen == [2.0, 1.0]
    with pytest.raises(OutOfScale, match=r"the run diverged: .* leave float16"):
        scale.update(overflow=True)


def test_a_scale_that_is_taken_up_again_grows_when_it_would_have():
    model = with_gradient(1.0)
    optimizer = UnshardedOptimizer(model, OptimizerConfig(lr=0.1), clip_norm=1.0, loss_scale=LossScale(2.0))
    held = {**dict(optimizer.parameters()), **dict(optimizer.moments())}
    progress = {"loss_scale": 64.0, "good_steps": STEPS_TO_GROW - 1}
    optimizer.restore({name: tensor.detach().clone() for name, tensor in held.items()}.__getitem__, 3, progress)
    assert optimizer.progress() == progress
    optimizer.step()
    assert optimizer.progress() == {"loss_scale": 128.0, "good_steps": 0}


def test_a_scale_doubles_after_a_thousand_good_steps_and_counts_anew():
    scale = LossScale(2.0)
    for _ in range(STEPS_TO_GROW - 1):
        scale.update(overflow=False)
    scale.update(overflow=True)
    assert (scale.scale, scale.good_steps) == (1.0, 0)
    for _ in range(2 * STEPS_TO_GROW):
        scale.update(overflow=False)
    assert scale.scale == 4.0


def with_gradient(value: float) -> nn.Module:
    model = nn.Linear(3, 2, bias=False)
    nn.init.ones_(model.weight)
    model.weight.grad = torch.full((2, 3), value)
    return model


def test_gradients_are_divided_by_the_scale_before_they_are_measured_and_clipped():
    scaled, plain = with_gradient(512.0), with_gradient(2.0)
    config = OptimizerConfig(lr=0.1)
    ours = UnshardedOptimizer(scaled, config, clip_norm=1.0, loss_scale=LossScale(256.0))
    theirs = UnshardedOptimizer(plain, config, clip_norm=1.0)
    for optimizer in (ours, theirs):
        optimizer.step()
    assert ours.grad_norm == theirs.grad_norm == pytest.approx(2 * math.sqrt(6))
    assert torch.equal(scaled.weight, plain.weight)
    assert not ours.skipped


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(value: float):
    model = with_gradient(value)
    optimizer = UnshardedOptimizer(model, OptimizerConfig(lr=0.1), clip_norm=1.0, loss_scale=LossScale(256.0))
    optimizer.step()
    assert optimizer.skipped
    assert optimizer.loss_scale == 128.0
    assert torch.equal(model.weight, torch.ones(2, 3))
    assert all(not moment.any() for _, moment in optimizer.moments())
