"""T5's buckets and rotary angles."""

from __future__ import annotations

import math

import pytest
import torch

from brt_dist.model.positions import RelativeBias, bucket_distances, rotate

EPSILON_OF_FLOAT32 = 2.0**-23


def test_distances_fall_into_the_buckets_of_the_formula() -> None:
    found = bucket_distances(torch.arange(2000)).tolist()
    for distance, bucket in enumerate(found):
        logarithm = math.log(max(distance, 1) / 16 + EPSILON_OF_FLOAT32) / math.log(8)
        assert bucket == (distance if distance < 16 else min(31, 16 + int(16 * logarithm))), distance


def test_buckets_begin_where_they_are_known_to_begin() -> None:
    found = bucket_distances(torch.arange(129))
    begins = [int((found == bucket).nonzero()[0]) for bucket in range(32)]
    assert begins[:17] == list(range(17))
    # 16 * 8^(k/16), rounded up: worked out by hand from 8^(1/16) = 1.1388.
    assert begins[17:] == [19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
    assert found[128] == 31


def test_the_bias_holds_the_table_by_distance_and_shares_its_gradient_within_a_bucket() -> None:
    bias = RelativeBias(num_heads=2, window=40)
    with torch.no_grad():
        bias.table.copy_(torch.arange(64).reshape(2, 32))
    bias_HW = bias()
    assert bias_HW.shape == (2, 40)
    buckets = bucket_distances(torch.arange(1, 41))
    assert torch.equal(bias_HW, torch.stack([buckets, 32 + buckets]).float())
    bias_HW.sum().backward()
    counts = torch.bincount(buckets, minlength=32).float()
    assert torch.equal(bias.table.grad, counts.expand(2, 32))
    assert counts[0] == 0  # distance 0 is the token itself


def vectors(length: int, width: int = 8) -> torch.Tensor:
    return torch.randn(1, length, 2, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("shift", [-7, 1, 4096])
def test_rotary_scores_depend_on_the_distance_alone(shift: int) -> None:
    queries, keys = vectors(5), vectors(5).flip(-1)
    scores, shifted = (
        torch.einsum("blhk,bmhk->bhlm", rotate(queries, first), rotate(keys, first)) for first in (0, shift)
    )
    torch.testing.assert_close(shifted, scores, rtol=0, atol=1e-10)
    assert not torch.isclose(scores, torch.einsum("blhk,bmhk->bhlm", queries, keys)).all()


def test_rotation_keeps_lengths_and_leaves_position_zero_alone() -> None:
    turned = rotate(vectors(6), -2)
    torch.testing.assert_close(turned.norm(dim=-1), vectors(6).norm(dim=-1))
    assert torch.equal(turned[:, 2], vectors(6)[:, 2])
    assert not torch.isclose(turned[:, [0, 1, 3, 4, 5]], vectors(6)[:, [0, 1, 3, 4, 5]]).all(-1).any()


def test_each_pair_of_channels_turns_at_its_own_rate() -> None:
    width = 6
    ones = torch.zeros(1, 4, 1, width, dtype=torch.float64)
    ones[..., : width // 2] = 1
    turned = rotate(ones, 0)
    for pair in range(width // 2):
        for position in range(4):
            angle = position / 10000 ** (2 * pair / width)
            assert abs(turned[0, position, 0, pair].item() - math.cos(angle)) < 1e-12
            assert abs(turned[0, position, 0, pair + width // 2].item() - math.sin(angle)) < 1e-12


def test_rotation_by_large_positions_is_exact_in_bfloat16() -> None:
    # A bfloat16 position of 4097 would be 4096: the angles must be float32.
    exact = rotate(vectors(3), 4096)
    assert (rotate(vectors(3).bfloat16(), 4096) - exact).abs().max() < 0.02
