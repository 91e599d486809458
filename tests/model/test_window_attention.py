"""Sliding-window attention: the rungs that run anywhere against one naive softmax, and the choice among all."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    AttentionCase,
    assert_near,
    assert_rung_is_the_twin,
    attend,
    attend_naively,
    gradients,
)

from brt_dist.model.window_attention import attend_all, choose_rung, distances, pair_blocks, visible, window_attention

CPU_RUNGS = ["explicit", "sdpa"]


@pytest.mark.parametrize("rung", CPU_RUNGS)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("window", [1, 3, 8])
def test_chunked_attention_equals_one_softmax_over_all_tokens(rung: str, with_bias: bool, window: int) -> None:
    case = AttentionCase(window, 5, with_bias, torch.float64)
    leaves, starts_BC = case.leaves("cpu"), case.starts("cpu")
    ours, naive = attend(rung, leaves, starts_BC), attend_naively(leaves, starts_BC)
    assert_near(ours, naive, 1e-12, "output")
    expected = gradients(naive, leaves)
    for name, gradient in gradients(ours, leaves).items():
        # With a window of one key the softmax is constant: these gradients are zero but for rounding.
        largest = max(1.0, expected[name].abs().max().item())
        assert (gradient - expected[name]).abs().max() <= 1e-12 * largest, name


@pytest.mark.parametrize("rung", CPU_RUNGS)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_rung_on_cpu_is_the_twin_in_values_and_gradients(rung: str, with_bias: bool, dtype: torch.dtype) -> None:
    assert_rung_is_the_twin(rung, AttentionCase(16, 32, with_bias, dtype))


@pytest.mark.parametrize("rung", CPU_RUNGS)
def test_a_token_sees_exactly_the_window_before_it_and_never_itself(rung: str) -> None:
    window, blocks = 4, 3
    length = window * blocks
    # Token j's value is the j-th unit vector (the cache's come first), so outputs are the attention weights themselves.
    unit_vectors = torch.eye(window + length, dtype=torch.float64)[None, :, None]
    queries = torch.zeros(1, length, 1, window + length, dtype=torch.float64)
    starts_BC = torch.zeros(1, blocks, dtype=torch.bool)
    keys = pair_blocks(queries, torch.zeros(1, window, 1, window + length, dtype=torch.float64), starts_BC)
    values = pair_blocks(unit_vectors[:, window:], unit_vectors[:, :window], starts_BC)
    weights_LM = window_attention(queries, keys, values, torch.ones(1, dtype=torch.float64), None, rung)[0, :, 0]
    for token in range(length):
        seen = weights_LM[token].nonzero().flatten().tolist()
        assert seen == list(range(token, token + window))  # counted from the cache's first key, W before token 0
        torch.testing.assert_close(weights_LM[token, seen], torch.full((window,), 1 / window, dtype=torch.float64))


def test_the_window_is_the_same_seen_from_distances() -> None:
    distance_WX = distances(3, torch.device("cpu"))
    assert distance_WX.tolist() == [[3, 2, 1, 0, -1, -2], [4, 3, 2, 1, 0, -1], [5, 4, 3, 2, 1, 0]]
    assert visible(distance_WX).int().tolist() == [[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0]]


@pytest.mark.parametrize("rung", CPU_RUNGS)
def test_the_zeros_in_front_of_a_document_take_softmax_mass(rung: str) -> None:
    window = 4
    ones = torch.ones(1, window, 1, 2, dtype=torch.float64)
    pieces = pair_blocks(ones, 5 * ones, torch.tensor([[True]]))
    out = window_attention(torch.zeros_like(ones), pieces, pieces, ones.new_ones(1), None, rung)
    # Token i sees W - i zeros and i ones, all with score 0.
    torch.testing.assert_close(out[0, :, 0, 0], torch.arange(window) / torch.tensor(window, dtype=torch.float64))


def test_blocks_are_paired_with_the_one_before_and_zeros_where_a_document_starts() -> None:
    current = torch.arange(1.0, 7.0).reshape(1, 6, 1, 1)
    cache = torch.tensor([-2.0, -1.0]).reshape(1, 2, 1, 1)
    pieces = pair_blocks(current, cache, torch.tensor([[False, True, False]]))
    assert pieces.flatten(2).tolist() == [[[-2, -1, 1, 2], [0, 0, 3, 4], [3, 4, 5, 6]]]


def test_the_bias_is_multiplied_by_the_scale_too() -> None:
    case = AttentionCase(4, 8, True, torch.float64)
    leaves, starts_BC = case.leaves("cpu"), case.starts("cpu")
    folded = leaves | {
        "queries": leaves["queries"] * leaves["scale"][:, None],
        "bias": leaves["bias"] * leaves["scale"][:, None],
        "scale": torch.ones_like(leaves["scale"]),
    }
    for rung in CPU_RUNGS:
        torch.testing.assert_close(attend(rung, folded, starts_BC), attend(rung, leaves, starts_BC))


def test_dense_attention_is_a_softmax_over_all_keys_without_a_hidden_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(2, n, 3, 5, generator=generator, dtype=torch.float64) for n in (4, 7, 7))
    scale_H = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    weights = (torch.einsum("bqhk,bmhk->bhqm", queries, keys) * scale_H[:, None, None]).softmax(-1)
    expected = torch.einsum("bhqm,bmhk->bqhk", weights, values)
    torch.testing.assert_close(attend_all(queries, keys, values, scale_H), expected)


HALF, WIDE = (torch.bfloat16, torch.float16), (torch.float32, torch.float64)
CHOICES = [
    *((("cpu", dtype, True, True, True), "explicit") for dtype in HALF + WIDE),
    *((("cpu", dtype, False, True, True), "sdpa") for dtype in HALF + WIDE),
    *((("mps", dtype, False, False, False), "sdpa") for dtype in HALF),
    *((("cuda", dtype, False, True, flex), "flash") for dtype in HALF for flex in (True, False)),
    *((("cuda", dtype, True, flash, True), "flex") for dtype in HALF + WIDE for flash in (True, False)),
    *((("cuda", dtype, False, True, True), "flex") for dtype in WIDE),
    *((("cuda", dtype, False, False, True), "flex") for dtype in HALF),
    *((("cuda", dtype, True, True, False), "sdpa") for dtype in HALF + WIDE),
    *((("cuda", dtype, False, True, False), "sdpa") for dtype in WIDE),
    *((("cuda", dtype, False, False, False), "sdpa") for dtype in HALF),
]


@pytest.mark.parametrize(("situation", "rung"), CHOICES, ids=lambda value: str(value))
def test_the_rung_follows_from_device_dtype_bias_and_what_is_installed(
    situation: tuple[str, torch.dtype, bool, bool, bool], rung: str
) -> None:
    assert choose_rung(*situation) == rung
