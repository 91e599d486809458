"""The FlashAttention rung without a GPU: its window arithmetic on an emulation, its calls on torch's own schemas."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.attention.varlen
from attention_cases import AttentionCase, assert_rung_is_the_twin, attend, emulate_varlen
from torch import Tensor

from brt_dist.model import flash_attention
from brt_dist.model.flash_attention import flash_is_usable


class EmulatedOperators:
    """aten's two flash operators by the emulation. The backward pass checks that it gets what the forward pass gave."""

    def __init__(self) -> None:
        self.marks = torch.tensor([1]), torch.tensor([2]), torch.tensor([3])

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        query_ends: Tensor,
        key_ends: Tensor,
        longest_query: int,
        longest_keys: int,
        dropout: float,
        causal: bool,
        debug: bool,
        *,
        scale: float,
        window_size_left: int,
        window_size_right: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        assert (dropout, causal, debug) == (0.0, False, False)
        window_size = window_size_left, window_size_right
        ends = query_ends, key_ends, longest_query, longest_keys
        out = emulate_varlen(queries, keys, values, *ends, scale=scale, window_size=window_size)
        return out, *self.marks, torch.empty(0)

    def backward(
        self,
        d_out: Tensor,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        query_ends: Tensor,
        key_ends: Tensor,
        longest_query: int,
        longest_keys: int,
        dropout: float,
        causal: bool,
        rng_state: Tensor,
        unused: Tensor,
        *,
        scale: float,
        window_size_left: int,
        window_size_right: int,
    ) -> tuple[Tensor, ...]:
        assert (dropout, causal) == (0.0, False)
        assert [mark.item() for mark in (logsumexp, rng_state, unused)] == [1, 2, 3]
        inputs = [each.detach().requires_grad_() for each in (queries, keys, values)]
        window_size = window_size_left, window_size_right
        ends = query_ends, key_ends, longest_query, longest_keys
        with torch.enable_grad():
            again = emulate_varlen(*inputs, *ends, scale=scale, window_size=window_size)
        torch.testing.assert_close(again, out)
        return torch.autograd.grad(again, inputs, d_out)


@pytest.fixture(params=["varlen_attn", "operators"])
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of calling FlashAttention, in turn, with an emulation where the kernel would be."""
    monkeypatch.setattr(flash_attention, "_varlen_offers_window", lambda: request.param == "varlen_attn")
    if request.param == "varlen_attn":
        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", emulate_varlen)
    else:
        operators = EmulatedOperators()
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", operators.forward)
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", operators.backward)
    return request.param


@pytest.fixture(params=[True, False], ids=["varlen_attn", "operators"])
def offers_varlen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways in turn, with the real kernels' schemas."""
    monkeypatch.setattr(flash_attention, "_varlen_offers_window", lambda: request.param)


@pytest.mark.parametrize(
    ("window", "head_dim", "dtype"),
    [(2, 8, torch.float64), (5, 8, torch.float64), (16, 32, torch.float32), (16, 32, torch.bfloat16)],
    ids=str,
)
@pytest.mark.usefixtures("emulated")
def test_a_window_that_ends_at_the_last_key_but_one_is_the_strict_window(
    window: int, head_dim: int, dtype: torch.dtype
) -> None:
    assert_rung_is_the_twin("flash", AttentionCase(window, head_dim, False, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("offers_varlen")
def test_the_flash_operators_of_this_torch_take_our_call_forward_and_backward(dtype: torch.dtype) -> None:
    case = AttentionCase(16, 32, False, dtype)
    leaves = {name: value.detach().to("meta").requires_grad_() for name, value in case.leaves("cpu").items()}
    out = attend("flash", leaves, torch.zeros(2, 4, dtype=torch.bool, device="meta"))
    assert (out.shape, out.dtype) == (leaves["queries"].shape, dtype)
    found = torch.autograd.grad(out.sum(), list(leaves.values()))
    assert [gradient.shape for gradient in found] == [leaf.shape for leaf in leaves.values()]


def test_flash_refuses_a_bias_instead_of_leaving_it_out() -> None:
    case = AttentionCase(4, 8, True, torch.bfloat16)
    with pytest.raises(ValueError, match="bias"):
        attend("flash", case.leaves("cpu"), case.starts("cpu"))


@pytest.mark.parametrize(
    ("capability", "head_dim", "usable"),
    [((8, 0), 128, True), ((9, 0), 256, True), ((9, 0), 264, False), ((9, 0), 20, False), ((7, 5), 128, False)],
)
def test_flash_is_for_ampere_and_later_and_for_head_widths_that_it_knows(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], head_dim: int, usable: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    # Unwrapped: what this test pretends must not stay in a cache.
    assert inspect.unwrap(flash_is_usable)(torch.device("cuda"), head_dim) == usable


def test_a_torch_without_any_window_has_no_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash_attention, "_varlen_offers_window", lambda: False)
    monkeypatch.setattr(flash_attention, "_ops_offer_window", lambda: False)
    assert not inspect.unwrap(flash_is_usable)(torch.device("cuda"), 128)
