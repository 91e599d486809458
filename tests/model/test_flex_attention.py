"""The FlexAttention rung without a GPU: its mask and its bias table by the eager, dense form of FlexAttention."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from attention_cases import AttentionCase, assert_rung_is_the_twin, attend
from torch.nn.attention import flex_attention as torch_flex

from brt_dist.model import flex_attention
from brt_dist.model.flex_attention import flex_is_usable
from brt_dist.model.window_attention import distances, visible

CPU = torch.device("cpu")


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention without its compiler."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_attention, "_compiled_flex", lambda: torch_flex.flex_attention)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    ("window", "head_dim", "dtype"),
    [(2, 16, torch.float64), (5, 16, torch.float64), (16, 32, torch.float32), (16, 32, torch.bfloat16)],
    ids=str,
)
def test_the_mask_and_the_bias_by_distance_are_those_of_the_twin(
    window: int, head_dim: int, dtype: torch.dtype, with_bias: bool
) -> None:
    assert_rung_is_the_twin("flex", AttentionCase(window, head_dim, with_bias, dtype), backward=False)


@pytest.mark.parametrize("window", [1, 3, 16, 130])
def test_the_block_mask_sees_what_the_strict_window_sees(window: int) -> None:
    mask = flex_attention._window_mask(window, CPU)
    assert mask.shape == (1, 1, window, 2 * window)
    query, key = torch.arange(window)[:, None], torch.arange(2 * window)
    assert torch.equal(mask.mask_mod(0, 0, query, key), visible(distances(window, CPU)))


@pytest.mark.usefixtures("eager")
def test_a_mask_made_in_an_evaluation_can_be_trained_with() -> None:
    flex_attention._window_mask.cache_clear()
    case = AttentionCase(4, 16, True, torch.float32)
    with torch.inference_mode():
        attend("flex", case.leaves("cpu"), case.starts("cpu"))
    mask = flex_attention._window_mask(4, CPU)
    tensors = [part for part in mask.as_tuple() if isinstance(part, torch.Tensor)]
    assert tensors
    assert not any(tensor.is_inference() for tensor in tensors)


@pytest.mark.parametrize(
    ("triton", "capability", "head_dim", "usable"),
    [
        (True, (7, 5), 16, True),
        (True, (9, 0), 128, True),
        (True, (9, 0), 8, False),
        (True, (7, 0), 128, False),
        (False, (9, 0), 128, False),
    ],
)
def test_flex_needs_triton_and_a_gpu_and_heads_that_it_compiles_for(
    monkeypatch: pytest.MonkeyPatch, triton: bool, capability: tuple[int, int], head_dim: int, usable: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found: Any = object() if triton else None
    monkeypatch.setattr(flex_attention.importlib.util, "find_spec", lambda name: found)
    # Unwrapped: what this test pretends must not stay in a cache.
    assert inspect.unwrap(flex_is_usable)(torch.device("cuda"), head_dim) == usable
