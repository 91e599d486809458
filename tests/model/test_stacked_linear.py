"""Several projections in one product are what each of them is alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import MODELS, small_config, variant_name
from torch import nn

from brt_dist.model.stacked_linear import StackedLinear, parts_by_name
from brt_dist.model.transformer import BlockRecurrentTransformer


def test_each_part_is_the_product_with_its_own_rows() -> None:
    torch.manual_seed(0)
    stacked, x = StackedLinear(5, 3, parts=4).double(), torch.randn(2, 7, 5, dtype=torch.float64)
    parts = stacked(x)
    assert len(parts) == 4
    for part, rows in zip(parts, stacked.weight.split(3), strict=True):
        torch.testing.assert_close(part, x @ rows.T, rtol=0, atol=1e-14)


def test_gradients_of_a_part_stay_in_its_rows() -> None:
    stacked = StackedLinear(5, 3, parts=4)
    stacked(torch.ones(2, 5))[2].sum().backward()
    assert stacked.weight.grad is not None
    assert [bool(rows.all()) for rows in stacked.weight.grad.split(3)] == [False, False, True, False]
    assert not stacked.weight.grad[[0, 1, 2, 3, 4, 5, 9, 10, 11]].any()


def test_it_has_one_parameter_and_keeps_its_parts_where_a_rank_holds_an_equal_share_of_each() -> None:
    stacked = StackedLinear(5, 6, parts=2)
    assert [(name, tuple(value.shape)) for name, value in stacked.named_parameters()] == [("weight", (12, 5))]
    whole, x = stacked.weight.detach(), torch.randn(4, 5)
    first, second = stacked(x)
    stacked.weight = nn.Parameter(torch.cat([whole[2:4], whole[8:10]]))
    torch.testing.assert_close(torch.stack(stacked(x)), torch.stack([first[:, 2:4], second[:, 2:4]]))


def test_a_stacked_layer_itself_is_named_like_any_other() -> None:
    assert parts_by_name(StackedLinear(2, 3, parts=5)) == {"weight": 5}
    assert parts_by_name(nn.Linear(2, 3)) == {}


@pytest.mark.parametrize("variant", MODELS, ids=variant_name)
def test_the_stacks_of_a_model_are_its_projections_and_its_lstm_gates(variant: dict[str, Any]) -> None:
    config = small_config(**variant)
    expected = {}
    for index in range(config.num_layers):
        recurs = index in config.recurrent_layers
        tokens = f"layers.{index}.tokens" if recurs else f"layers.{index}"
        # Queries, keys, values; and queries to the state where one is read.
        expected[f"{tokens}.projection.weight"] = 4 if recurs or config.feedback else 3
        if recurs:
            # Queries to states and to tokens, keys, values.
            expected[f"layers.{index}.cell.projection.weight"] = 4
        if recurs and config.gate == "lstm":
            for gate in ("gate", "mlp_gate") if config.cell == "dual" else ("gate",):
                expected[f"layers.{index}.cell.update.{gate}.candidate_and_gates.weight"] = 3
    model = BlockRecurrentTransformer(config)
    assert parts_by_name(model) == expected
    parameters = dict(model.named_parameters())
    assert all(parameters[name].shape[0] % parts == 0 for name, parts in expected.items())
