"""Groups, keys that are not used, and the learning rate of every step."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brt_dist.model.config import ModelConfig
from brt_dist.model.transformer import BlockRecurrentTransformer
from brt_dist.train.config import OptimizerConfig
from brt_dist.train.optimizer import build_adamw, learning_rate

SCHEDULE = OptimizerConfig(lr=0.01, warmup_steps=10, final_lr_ratio=0.1)
REFERENCE = Path(__file__).resolve().parent.parent / "reference" / "adafactor.npz"


def test_the_rate_rises_in_a_line_to_its_peak_and_falls_to_its_share_at_the_last_step():
    rates = [learning_rate(step, 110, SCHEDULE) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([0.001 * step for step in range(1, 11)])
    assert max(rates) == pytest.approx(0.01)
    assert all(later < earlier for earlier, later in pairwise(rates[9:]))
    assert rates[-1] == pytest.approx(0.001)


def test_half_way_down_the_rate_is_the_mean_of_peak_and_end():
    assert learning_rate(60, 110, SCHEDULE) == pytest.approx((0.01 + 0.001) / 2)
    quarter = 0.001 + 0.009 * (1 + math.cos(math.pi / 4)) / 2
    assert learning_rate(35, 110, SCHEDULE) == pytest.approx(quarter)


def test_without_warm_up_the_first_step_already_falls():
    config = OptimizerConfig(lr=0.01, warmup_steps=0, final_lr_ratio=0.0)
    assert 0.009 < learning_rate(1, 10, config) < 0.01
    assert learning_rate(10, 10, config) == 0


def test_a_run_shorter_than_its_warm_up_never_reaches_the_peak():
    assert learning_rate(5, 5, SCHEDULE) == pytest.approx(0.005)


def test_the_rate_of_the_paper_is_the_references():
    recorded = np.load(REFERENCE, allow_pickle=False)
    config = OptimizerConfig(schedule="rsqrt", lr=1.0, warmup_steps=1000)
    rates = [learning_rate(int(step), 7, config) for step in recorded["lr_rsqrt/steps"]]
    assert rates == pytest.approx(recorded["lr_rsqrt/values"].tolist(), rel=1e-12)
    assert rates == pytest.approx(recorded["lr_rsqrt/meliad"].tolist(), rel=1e-6)


def test_without_warm_up_the_rate_is_one_over_the_root_of_the_step():
    config = OptimizerConfig(schedule="rsqrt", lr=0.5, warmup_steps=0)
    assert [learning_rate(step, 10, config) for step in (1, 4, 100)] == pytest.approx([0.5, 0.25, 0.05])


def test_the_cosine_begins_behind_the_warm_up_and_the_references_at_step_0():
    """The reference's progress is max(step, warm-up) / steps; with its numbers the two differ by less than 0.3 %."""
    recorded = np.load(REFERENCE, allow_pickle=False)
    steps, warmup, peak, end = 500_000, 1000, 0.01, 0.1
    config = OptimizerConfig(lr=peak, warmup_steps=warmup, final_lr_ratio=end)
    for step, expected in zip(recorded["lr_rsqrt/steps"].tolist(), recorded["lr_cosine/meliad_max500k"], strict=True):
        cosine = (1 + math.cos(math.pi * max(step, warmup) / steps)) / 2
        assert peak * min(step, warmup) / warmup * (end + (1 - end) * cosine) == pytest.approx(expected, rel=1e-6)
        assert learning_rate(step, steps, config) == pytest.approx(expected, rel=3e-3)


@pytest.fixture(scope="module")
def model() -> BlockRecurrentTransformer:
    sizes = {"vocab_size": 20, "dim": 16, "num_layers": 2, "num_heads": 2, "head_dim": 8, "mlp_dim": 32, "window": 4}
    return BlockRecurrentTransformer(ModelConfig(**sizes, num_states=4, recurrent_layers=(1,), position="t5"))


def test_only_matrices_decay(model: BlockRecurrentTransformer):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_adamw(dict(model.named_parameters()), OptimizerConfig(weight_decay=0.3)).param_groups
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert {decay[name] for name in decay if name.endswith((".projection.weight", "output.weight"))} == {0.3}
    kept = ("norm.weight", "scale_H", "bias_D", "bias.table", "ids_SD", "initial_state_SD", "embedding.weight")
    for ending in kept:
        found = [name for name in decay if name.endswith(ending)]
        assert found, ending
        assert {decay[name] for name in found} == {0.0}


def test_every_parameter_is_in_one_group_and_only_the_embedding_has_a_rate_of_its_own(
    model: BlockRecurrentTransformer,
):
    config = OptimizerConfig(embedding_lr_ratio=5.0, betas=(0.8, 0.9), eps=1e-5)
    optimizer = build_adamw(dict(model.named_parameters()), config)
    placed = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(placed) == sorted(id(parameter) for parameter in model.parameters())
    ratios = {id(p): group["lr_ratio"] for group in optimizer.param_groups for p in group["params"]}
    assert ratios.pop(id(model.embedding.weight)) == 5.0
    assert set(ratios.values()) == {1.0}
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["eps"] == 1e-5


def test_a_model_without_a_kind_of_parameter_has_no_empty_group(model: BlockRecurrentTransformer):
    groups = build_adamw(dict(model.layers[0].mlp.named_parameters()), OptimizerConfig()).param_groups
    assert [len(group["params"]) for group in groups] == [2]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 0.0),
        ("warmup_steps", -1),
        ("final_lr_ratio", 1.5),
        ("betas", (0.9, 1.0)),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("embedding_lr_ratio", 0.0),
        ("momentum", 1.0),
        ("momentum", -0.1),
    ],
)
def test_an_impossible_setting_is_refused_by_name(key: str, value: object):
    with pytest.raises(ValueError, match=rf"optimizer\.{key} "):
        OptimizerConfig(**{key: value})


@pytest.mark.parametrize(
    ("settings", "ignored"),
    [
        ({}, []),
        ({"name": "adafactor"}, []),
        ({"name": "muon", "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2, "momentum": 0.8}, []),
        ({"momentum": 0.9, "eps": 1e-6}, ["momentum"]),
        ({"name": "adafactor", "eps": 1e-6, "weight_decay": 0.0, "momentum": 0.5}, ["eps", "weight_decay"]),
        ({"schedule": "rsqrt", "final_lr_ratio": 0.2}, ["final_lr_ratio"]),
    ],
)
def test_keys_that_an_optimizer_does_not_use_are_known_where_they_were_set(
    settings: dict[str, Any], ignored: list[str]
):
    assert OptimizerConfig(**settings).ignored() == ignored
