"""Block feedback: the loop over blocks, who reads which state, and how far influence reaches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import CELLS, WINDOW, small_model, some_carry, some_tokens, starts_at, variant_name
from torch import Tensor

from brt_dist.model.recurrent_layer import RecurrentLayer
from brt_dist.model.transformer import BlockRecurrentTransformer
from brt_dist.model.transformer_layer import TransformerLayer

BLOCKS = 4
HEADS = 8  # columns of all self-attention heads: 2 x 4
EVERY_CELL = pytest.mark.parametrize("variant", CELLS, ids=variant_name)


def tokens_of(model: BlockRecurrentTransformer, index: int) -> TransformerLayer:
    layer = model.layers[index]
    return layer.tokens if isinstance(layer, RecurrentLayer) else layer


def make_blind(tokens: TransformerLayer) -> None:
    """The layer's tokens get nothing of the state that they read."""
    assert tokens.reads_state
    with torch.no_grad():
        tokens.attention_output.weight[:, HEADS:].zero_()


def without_feedback(model: BlockRecurrentTransformer, **variant: Any) -> BlockRecurrentTransformer:
    """The model of ordinary layers with the same weights, where they have a place for them."""
    plain = small_model(**variant)
    given = model.state_dict()
    plain.load_state_dict(
        {
            # Queries to the state are the last rows of a projection, its heads the last columns of an output matrix.
            name: given[name][tuple(slice(size) for size in value.shape)]
            for name, value in plain.state_dict().items()
        }
    )
    return plain


def run_and_differentiate(
    model: BlockRecurrentTransformer, starts_BC: Tensor
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor | None]]:
    tokens_BL = some_tokens(2, BLOCKS * WINDOW)
    logits, carry = model(tokens_BL, some_carry(model.config, 2), starts_BC)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    model.zero_grad()
    (logits * weights).sum().backward()
    return logits, carry.tensors(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("recurrent_layers", [(1,), (0, 2)], ids=str)
@EVERY_CELL
def test_feedback_that_nobody_listens_to_leaves_the_ordinary_layers(
    variant: dict[str, Any], recurrent_layers: tuple[int, ...]
) -> None:
    """The loop over blocks against the two phases: results, carries and gradients."""
    variant = variant | {"recurrent_layers": recurrent_layers}
    model = small_model(feedback=True, **variant)
    for index in range(3):
        if index not in recurrent_layers:
            make_blind(tokens_of(model, index))
    plain = without_feedback(model, **variant)
    starts_BC = starts_at(2, BLOCKS, (0, 0), (1, 2))
    logits, carry, gradients = run_and_differentiate(model, starts_BC)
    expected, expected_carry, expected_gradients = run_and_differentiate(plain, starts_BC)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    for name, tensor in expected_carry.items():
        torch.testing.assert_close(carry[name], tensor, rtol=0, atol=1e-12, msg=name)
    for name, gradient in expected_gradients.items():
        assert gradient is not None
        found = gradients[name]
        assert found is not None
        shared = found[tuple(slice(size) for size in gradient.shape)]
        torch.testing.assert_close(shared, gradient, rtol=1e-10, atol=1e-11, msg=name)


@EVERY_CELL
def test_every_other_layer_listens(variant: dict[str, Any]) -> None:
    tokens_BL = some_tokens(2, BLOCKS * WINDOW)
    for index in (0, 2):
        model = small_model(feedback=True, **variant)
        logits, _ = model(tokens_BL)
        make_blind(tokens_of(model, index))
        assert not torch.isclose(logits, model(tokens_BL)[0]).all(-1).any()


def inputs_of_mlps(model: BlockRecurrentTransformer, carry: Any, blocks: int = 1) -> list[Tensor]:
    """What stands behind the attention of each layer, x_BLD."""
    seen: list[list[Tensor]] = [[] for _ in model.layers]
    handles = [
        tokens_of(model, index).mlp_norm.register_forward_hook(
            lambda module, inputs, output, index=index: seen[index].append(inputs[0])
        )
        for index in range(len(model.layers))
    ]
    model(some_tokens(2, blocks * WINDOW), carry, starts_at(2, blocks))
    for handle in handles:
        handle.remove()
    return [torch.cat(pieces, dim=1) for pieces in seen]


@pytest.mark.parametrize("recurrent_layers", [(0, 2), (2, 0)], ids=str)
@EVERY_CELL
def test_the_last_recurrent_layers_state_is_fed_back_and_no_other(
    variant: dict[str, Any], recurrent_layers: tuple[int, ...]
) -> None:
    """Recurrent layers 0 and 2 read their own states; layers 1 and 3 read that of layer 2."""
    changes: Any = variant | {"recurrent_layers": recurrent_layers, "num_layers": 4, "feedback": True}
    # Which layers differ behind their attention if one layer's state differs, and that layer is deaf to it or not.
    for changed, deaf, expected in (
        (0, True, [False, False, False, False]),
        (0, False, [True, True, True, True]),
        (2, True, [False, True, True, True]),
        (2, False, [False, True, True, True]),
    ):
        model = small_model(**changes)
        if deaf:
            make_blind(tokens_of(model, changed))
        carry = some_carry(model.config, 2)
        before = inputs_of_mlps(model, carry)
        state_BSD = carry.layers[changed].state_BSD
        assert state_BSD is not None
        state_BSD.copy_(state_BSD.flip(0) + 1)
        after = inputs_of_mlps(model, carry)
        differs = [not torch.equal(one, other) for one, other in zip(before, after, strict=True)]
        assert differs == expected


@pytest.mark.parametrize("feedback", [False, True], ids=["without", "with"])
@EVERY_CELL
def test_only_with_feedback_does_a_lower_layer_know_what_a_higher_one_remembers(
    variant: dict[str, Any], feedback: bool
) -> None:
    """The first layer sees W tokens back; through the state of layer 2, all tokens before its own block as well."""
    model = small_model(feedback=feedback, recurrent_layers=(2,), **variant)
    embedded: list[Tensor] = []

    def as_leaf(module: object, inputs: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    model.embedding.register_forward_hook(as_leaf)
    first_BLD = inputs_of_mlps(model, None, BLOCKS)[0]
    for position in (WINDOW, 2 * WINDOW, 3 * WINDOW + 1):
        (gradient,) = torch.autograd.grad(first_BLD[0, position].square().sum(), embedded[0], retain_graph=True)
        reached = gradient[0].abs().amax(-1).nonzero().flatten().tolist()
        block = position // WINDOW * WINDOW
        remembered = range(block) if feedback else range(0)
        assert reached == sorted({*remembered, *range(position - WINDOW, position + 1)})


@EVERY_CELL
def test_what_is_fed_back_is_the_state_in_front_of_the_block(variant: dict[str, Any]) -> None:
    """An update that a block makes is heard from the next block on, by all layers."""
    model = small_model(feedback=True, **variant)
    layer = model.layers[1]
    before = inputs_of_mlps(model, some_carry(model.config, 2), 2)
    layer.cell.register_forward_hook(lambda cell, inputs, output: output.flip(-1) + 1)
    after = inputs_of_mlps(model, some_carry(model.config, 2), 2)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[:, :WINDOW], other[:, :WINDOW])
        assert not torch.isclose(one[:, WINDOW:], other[:, WINDOW:]).all(-1).any()


def test_only_recurrent_layers_advance_a_state() -> None:
    model = small_model(feedback=True)
    _, carry = model(some_tokens(2, 2 * WINDOW))
    assert [layer.state_BSD is not None for layer in carry.layers] == [False, True, False]
    assert [tokens_of(model, index).reads_state for index in range(3)] == [True, True, True]
