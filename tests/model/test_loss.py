"""Chunked cross-entropy: the values and gradients of the plain one, and never its logits in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import some_tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from brt_dist.model.config import ModelConfig
from brt_dist.model.loss import CHUNK, IGNORED, linear_cross_entropy
from brt_dist.model.transformer import BlockRecurrentTransformer

TOKENS, WIDTH, VOCABULARY, DIVISOR = 13, 5, 17, 2.3


class LargestTensor(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.entries = max([self.entries, *sizes])
        return result


@contextmanager
def no_larger_than(entries: int) -> Iterator[LargestTensor]:
    with LargestTensor() as largest:
        yield largest
    assert 0 < largest.entries <= entries


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    targets[[0, 5, 12]] = IGNORED
    return hidden, weight, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T / DIVISOR, targets, ignore_index=IGNORED, reduction="none")


@pytest.mark.parametrize("chunk", [1, 3, 13, 1000])
def test_any_chunk_size_gives_the_losses_and_gradients_of_full_logits(chunk: int) -> None:
    hidden, weight, targets = inputs()
    nats, nats_T = linear_cross_entropy(hidden, weight, targets, DIVISOR, chunk)
    expected_T = plain(hidden, weight, targets)
    torch.testing.assert_close(nats_T, expected_T.detach(), rtol=0, atol=1e-14)
    torch.testing.assert_close(nats, expected_T.sum(), rtol=0, atol=1e-13)
    found = torch.autograd.grad(0.37 * nats, (hidden, weight))
    expected = torch.autograd.grad(0.37 * expected_T.sum(), (hidden, weight))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_gradients_are_those_of_finite_differences() -> None:
    hidden, weight, targets = inputs()
    assert torch.autograd.gradcheck(
        lambda hidden, weight: linear_cross_entropy(hidden, weight, targets, DIVISOR, 4)[0], (hidden, weight)
    )


def test_what_is_not_predicted_counts_nowhere() -> None:
    hidden, weight, targets = inputs()
    nats, nats_T = linear_cross_entropy(hidden, weight, targets, DIVISOR, 4)
    d_hidden, _ = torch.autograd.grad(nats, (hidden, weight))
    ignored = targets == IGNORED
    assert ((nats_T == 0) == ignored).all()
    assert ((d_hidden == 0).all(-1) == ignored).all()


def test_a_batch_without_a_prediction_has_no_loss_and_zero_gradients() -> None:
    hidden, weight, targets = inputs()
    nats, nats_T = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORED), DIVISOR, 4)
    assert nats == 0
    assert not nats_T.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(nats, (hidden, weight)))


def test_the_losses_of_single_tokens_are_constants() -> None:
    nats, nats_T = linear_cross_entropy(*inputs(), DIVISOR, 4)
    assert nats.requires_grad
    assert not nats_T.requires_grad


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_side_may_be_frozen(frozen: str) -> None:
    hidden, weight, targets = inputs()
    leaves = {"hidden": hidden, "weight": weight}
    leaves[frozen].requires_grad_(False)
    free = weight if frozen == "hidden" else hidden
    nats, _ = linear_cross_entropy(hidden, weight, targets, DIVISOR, 4)
    torch.testing.assert_close(
        torch.autograd.grad(nats, free), torch.autograd.grad(plain(hidden, weight, targets).sum(), free)
    )


def test_bfloat16_losses_are_float32_and_near_those_of_the_rounded_inputs() -> None:
    hidden, weight, targets = inputs(torch.bfloat16)
    nats, nats_T = linear_cross_entropy(hidden, weight, targets, DIVISOR, 4)
    assert nats.dtype == nats_T.dtype == torch.float32
    exact = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    expected_T = plain(*exact, targets)
    assert (nats_T - expected_T).abs().max() < 0.01 * expected_T.max()
    found = torch.autograd.grad(nats, (hidden, weight))
    for ours, expected in zip(found, torch.autograd.grad(expected_T.sum(), exact), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - expected).abs().max() < 0.02 * expected.abs().max()


def test_the_factor_of_the_loss_is_not_rounded_to_bfloat16() -> None:
    hidden, weight, targets = inputs(torch.bfloat16)
    factor = 1 + 2.0**-9 + 2.0**-12  # in bfloat16 it would become 1 + 2^-7 or 1
    nats, _ = linear_cross_entropy(hidden, weight, targets, DIVISOR)
    once = torch.autograd.grad(nats, (hidden, weight), retain_graph=True)
    found = torch.autograd.grad(factor * nats, (hidden, weight))
    for ours, gradient in zip(found, once, strict=True):
        assert torch.equal(ours, (factor * gradient.float()).bfloat16())


def test_logits_never_exist_beyond_one_chunk() -> None:
    tokens, vocabulary, chunk = 640, 300, 16
    hidden = torch.randn(tokens, WIDTH, requires_grad=True)
    weight = torch.randn(vocabulary, WIDTH, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    with no_larger_than(chunk * vocabulary):
        linear_cross_entropy(hidden, weight, targets, DIVISOR, chunk)[0].backward()
    with pytest.raises(AssertionError), no_larger_than(chunk * vocabulary):
        plain(hidden, weight, targets).sum().backward()


def test_training_and_scoring_the_model_make_no_full_logits() -> None:
    config = ModelConfig(
        vocab_size=400,
        dim=8,
        num_layers=2,
        num_heads=1,
        head_dim=4,
        mlp_dim=8,
        window=16,
        num_states=4,
        recurrent_layers=(1,),
    )
    model = BlockRecurrentTransformer(config)
    tokens_BL = some_tokens(2, 2 * CHUNK, vocabulary=400)
    with no_larger_than(CHUNK * config.vocab_size):
        model.loss(tokens_BL, tokens_BL)[0].backward()
    with no_larger_than(CHUNK * config.vocab_size):
        model.token_losses(tokens_BL, tokens_BL)


def test_without_gradients_one_matrix_product_a_chunk_is_all_that_is_computed() -> None:
    hidden, weight, targets = inputs()
    chunks = -(-len(targets) // 4)
    for enabled, products in ((True, 3 * chunks), (False, chunks)):
        with torch.set_grad_enabled(enabled), torch.profiler.profile() as profile:
            linear_cross_entropy(hidden, weight, targets, DIVISOR, 4)
        assert sum(event.name == "aten::mm" for event in profile.events()) == products
