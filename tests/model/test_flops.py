"""The cost of a token against the figures of the paper's sizes, and against what torch counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from brt_dist.model.config import ModelConfig
from brt_dist.model.flops import forward_flops_per_token
from brt_dist.model.transformer import BlockRecurrentTransformer

PAPER = ModelConfig()


def mega_flops(**changes: object) -> float:
    return forward_flops_per_token(replace(PAPER, **changes)) / 1e6  # type: ignore[arg-type]


def test_an_ordinary_layer_costs_27_mega_flops_a_token() -> None:
    layer = mega_flops(recurrent_layers=(), num_layers=13) - mega_flops(recurrent_layers=(), num_layers=12)
    assert round(layer, 1) == 27.3


def test_a_recurrent_layer_costs_less_than_two_ordinary_ones() -> None:
    ordinary = mega_flops(recurrent_layers=(), num_layers=13) - mega_flops(recurrent_layers=(), num_layers=12)
    recurrent = ordinary + mega_flops() - mega_flops(recurrent_layers=())
    assert 50 <= recurrent <= 52.5
    assert 1.85 <= recurrent / ordinary <= 1.925


def test_the_head_costs_67_mega_flops_at_a_vocabulary_of_32768() -> None:
    assert round(mega_flops(vocab_size=32768) - mega_flops(vocab_size=1), 1) == 67.1


@pytest.mark.parametrize("num_states", [256, 512, 1024])
def test_states_cost_in_proportion_to_their_number_per_block_of_tokens(num_states: int) -> None:
    small = {"num_states": num_states, "window": num_states}
    doubled = {"num_states": 2 * num_states, "window": num_states}
    inner, dim = PAPER.num_heads * PAPER.head_dim, PAPER.dim
    per_state = 2 * (4 * dim * inner + 2 * inner * dim) + 4 * (2 * num_states + 2 * num_states) * inner
    more_pairs = 4 * num_states * inner  # each of the first states now sees as many more states
    for_tokens = 4 * num_states * inner
    expected = (per_state + more_pairs + for_tokens) / 1e6
    assert mega_flops(**doubled) - mega_flops(**small) == pytest.approx(expected)


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("cell", ["skip", "dual", "single"])
@pytest.mark.parametrize("gate", ["fixed", "lstm"])
def test_without_attention_torch_counts_the_same_products(gate: str, cell: str, feedback: bool) -> None:
    config = ModelConfig(
        vocab_size=50,
        dim=24,
        num_layers=3,
        num_heads=2,
        head_dim=8,
        mlp_dim=40,
        window=8,
        num_states=4,
        recurrent_layers=(1,),
        gate=gate,  # type: ignore[arg-type]
        cell=cell,  # type: ignore[arg-type]
        feedback=feedback,
    )
    tokens = 4 * config.window
    with torch.device("meta"):
        model = BlockRecurrentTransformer(config)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, tokens, dtype=torch.int64))
    counted = counter.get_flop_counts()["Global"]
    products = sum(count for operator, count in counted.items() if str(operator) in ("aten.mm", "aten.addmm"))
    inner = config.num_heads * config.head_dim
    readers = config.num_layers if feedback else 1
    seen_by_tokens = 4 * inner * (config.num_layers * config.window + readers * config.num_states)
    seen_by_states = 4 * inner * (config.num_states + 2 * config.window) * config.num_states / config.window
    attention = seen_by_tokens + seen_by_states
    assert products / tokens == forward_flops_per_token(config) - attention
