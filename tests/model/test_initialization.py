"""First values of the parameters, their number, and construction without memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from small_models import small_config
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from brt_dist.model.config import ModelConfig
from brt_dist.model.initialization import initialize
from brt_dist.model.transformer import BlockRecurrentTransformer

WIDE = ModelConfig(
    vocab_size=300,
    dim=96,
    num_layers=2,
    num_heads=4,
    head_dim=16,
    mlp_dim=160,
    window=8,
    num_states=64,
    recurrent_layers=(1,),
)
# Mean and standard deviation by name: dim 96, heads x head_dim 64, mlp_dim 160.
EXPECTED = {
    "embedding.weight": (0, 1),
    "final_norm.weight": (1, 0),
    "*attention_norm.weight": (1, 0),
    "*mlp_norm.weight": (1, 0),
    "*.cell.norm.weight": (1, 0),
    "*.scale_H": (1, 0),
    "*.state_scale_H": (1, 0),
    "*.token_scale_H": (1, 0),
    "*.bias.table": (0, 0),
    "*.projection.weight": (0, 96**-0.5),
    "layers.0.attention_output.weight": (0, 64**-0.5),
    "layers.1.tokens.attention_output.weight": (0, 128**-0.5),
    "*.mlp.input.weight": (0, 96**-0.5),
    "*.mlp.output.weight": (0, 160**-0.5),
    "*.cell.update.weight": (0, 128**-0.5),
    "*.cell.gate.bias_D": (0, 0.1),
    "*.cell.ids_SD": (0, 1),
    "*.initial_state_SD": (0, 0.1),
}


def built(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(BlockRecurrentTransformer(config).state_dict())


def test_every_parameter_has_the_mean_and_the_spread_of_the_table() -> None:
    used = set()
    for name, values in built(WIDE).items():
        (pattern,) = [pattern for pattern in EXPECTED if fnmatch(name, pattern)]
        used.add(pattern)
        mean, std = EXPECTED[pattern]
        if std == 0:
            assert torch.equal(values, torch.full_like(values, mean)), name
            continue
        samples = values.numel()
        assert abs(values.mean().item() - mean) < 5 * std / math.sqrt(samples), name
        assert abs(values.std().item() / std - 1) < 5 / math.sqrt(2 * samples), name
        assert len(values.unique()) > 0.9 * samples, name
    assert used == set(EXPECTED)


def test_no_two_parameters_start_from_the_same_draws() -> None:
    values = built(WIDE)
    drawn = [value for name, value in values.items() if value.dim() == 2 and value.any()]
    firsts = [value.flatten()[:8] / value.std() for value in drawn]
    for index, first in enumerate(firsts):
        assert not any(torch.allclose(first, other, atol=1e-3) for other in firsts[:index])


def test_a_parameter_starts_the_same_whatever_else_the_model_has() -> None:
    values = built(small_config())
    deeper = built(small_config(num_layers=5))
    bigger = built(small_config(vocab_size=40, num_states=7, window=8, position="rotary"))
    assert set(values) < set(deeper)
    for name, value in values.items():
        assert torch.equal(value, deeper[name]), name
        if name in bigger and bigger[name].shape == value.shape:
            assert torch.equal(value, bigger[name]), name


def test_the_seed_of_torch_decides_and_is_used_up() -> None:
    first, again, other = built(small_config()), built(small_config()), built(small_config(), seed=1)
    torch.manual_seed(0)
    next_one = [BlockRecurrentTransformer(small_config()).state_dict() for _ in range(2)][1]
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        if value.std() > 0:
            assert not torch.isclose(value, other[name]).all(), name
            assert not torch.isclose(value, next_one[name]).all(), name


def test_a_parameter_that_the_table_does_not_know_is_named() -> None:
    model = BlockRecurrentTransformer(small_config())
    model.register_parameter("surprise", nn.Parameter(torch.zeros(2)))
    with pytest.raises(KeyError, match="surprise"):
        initialize(model, seed=0)


class NoMemory(TorchDispatchMode):
    """Fails at the first tensor of more than one entry that is not on the meta device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            assert not isinstance(leaf, Tensor) or leaf.is_meta or leaf.numel() <= 1
        return result


@pytest.fixture
def _no_memory() -> Iterator[None]:
    with NoMemory():
        yield


@pytest.mark.usefixtures("_no_memory")
def test_construction_on_the_meta_device_takes_no_memory() -> None:
    with torch.device("meta"):
        model = BlockRecurrentTransformer(ModelConfig(dim=16384, mlp_dim=65536, num_layers=4, recurrent_layers=(1,)))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) > 8 * 10**9


@pytest.mark.usefixtures("_no_memory")
def test_a_model_on_the_meta_device_tells_the_shapes_of_a_step() -> None:
    with torch.device("meta"):
        model = BlockRecurrentTransformer(ModelConfig(num_layers=2, recurrent_layers=(1,)))
        tokens_BL = torch.zeros(4, 2048, dtype=torch.int64)
    logits, carry = model(tokens_BL)
    assert logits.shape == (4, 2048, 32128)
    assert all(tensor.is_meta for tensor in carry.tensors().values())


def test_the_memory_check_of_these_tests_can_fail() -> None:
    with pytest.raises(AssertionError), NoMemory():
        BlockRecurrentTransformer(small_config())


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({"recurrent_layers": ()}, 151_023_712),
        ({"recurrent_layers": (), "num_layers": 13}, 163_608_936),
        ({}, 160_462_968),
    ],
    ids=["12 layers", "13 layers", "fixed:skip"],
)
def test_the_papers_models_have_the_papers_number_of_parameters(changes: dict[str, Any], parameters: int) -> None:
    config = ModelConfig(**changes)
    with torch.device("meta"):
        model = BlockRecurrentTransformer(config)
    embedding = config.vocab_size * config.dim
    assert embedding == 32_899_072
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters + embedding
