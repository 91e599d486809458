"""The recurrent layer: two phases against one block after the other, and what the state may see."""

from __future__ import annotations

import pytest
import torch
from small_models import WINDOW, small_config, small_model, some_carry, starts_at
from torch import Tensor

from brt_dist.model.carry import LayerCarry
from brt_dist.model.recurrent_layer import RecurrentLayer

BLOCKS = 4


def layer_and_inputs() -> tuple[RecurrentLayer, Tensor, LayerCarry]:
    layer = small_model().layers[1]
    assert isinstance(layer, RecurrentLayer)
    generator = torch.Generator().manual_seed(0)
    x_BLD = torch.randn(2, BLOCKS * WINDOW, small_config().dim, generator=generator, dtype=torch.float64)
    return layer, x_BLD, some_carry(small_config(), 2).layers[1]


def states_behind(layer: RecurrentLayer, x_BLD: Tensor, carry: LayerCarry, starts_BC: Tensor) -> list[Tensor]:
    """state_BSD behind each block."""
    states: list[Tensor] = []
    handle = layer.cell.register_forward_hook(lambda cell, inputs, outputs: states.append(outputs[0]))
    layer(x_BLD, carry, starts_BC)
    handle.remove()
    return states


def test_two_phases_equal_one_block_after_the_other() -> None:
    layer, x_BLD, carry = layer_and_inputs()
    starts_BC = starts_at(2, BLOCKS, (1, 2))
    whole, last = layer(x_BLD, carry, starts_BC)
    outs = []
    for block, x_BWD in enumerate(x_BLD.split(WINDOW, dim=1)):
        out, carry = layer(x_BWD, carry, starts_BC[:, block : block + 1])
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=1), whole, rtol=0, atol=1e-13)
    torch.testing.assert_close(carry.state_BSD, last.state_BSD, rtol=0, atol=1e-13)


def test_tokens_read_the_state_as_it_was_before_their_own_block_updated_it() -> None:
    layer, x_BLD, carry = layer_and_inputs()
    out, _ = layer(x_BLD, carry, starts_at(2, BLOCKS))
    handle = layer.cell.register_forward_hook(
        lambda cell, inputs, outputs: (outputs[0] + 1, *outputs[1:])  # every update differs, what is read does not
    )
    changed, _ = layer(x_BLD, carry, starts_at(2, BLOCKS))
    handle.remove()
    assert torch.equal(out[:, :WINDOW], changed[:, :WINDOW])
    assert not torch.isclose(out[:, WINDOW:], changed[:, WINDOW:]).all(-1).any()


@pytest.mark.parametrize("changed_block", range(BLOCKS))
def test_a_token_reaches_the_states_from_its_own_block_on(changed_block: int) -> None:
    layer, x_BLD, carry = layer_and_inputs()
    starts_BC = starts_at(2, BLOCKS)
    other_BLD = x_BLD.clone()
    other_BLD[:, (changed_block + 1) * WINDOW - 1] += 1
    before, after = (states_behind(layer, x, carry, starts_BC) for x in (x_BLD, other_BLD))
    for block in range(BLOCKS):
        assert torch.equal(before[block], after[block]) == (block < changed_block)


def test_the_state_sees_both_blocks_without_mask_or_order() -> None:
    layer, x_BLD, _ = layer_and_inputs()
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 2, 2 * WINDOW, 2, 4, generator=generator, dtype=torch.float64)
    state = torch.randn(2, 3, x_BLD.shape[-1], generator=generator, dtype=torch.float64)
    values.requires_grad_()
    after, _, _ = layer.cell(state, keys, values)
    (gradient,) = torch.autograd.grad(after.square().sum(), values)
    assert (gradient.abs().amax((-1, -2)) > 0).all()
    order = torch.randperm(2 * WINDOW, generator=generator)
    shuffled, _, _ = layer.cell(state, keys[:, order], values[:, order])
    torch.testing.assert_close(shuffled, after, rtol=0, atol=1e-13)


def test_the_state_never_reads_the_layers_token_output() -> None:
    layer, x_BLD, carry = layer_and_inputs()
    before = states_behind(layer, x_BLD, carry, starts_at(2, BLOCKS))
    with torch.no_grad():
        layer.tokens.attention_output.weight.normal_()
        layer.tokens.mlp.input.weight.normal_()
        layer.tokens.scale_H.add_(1)
    after = states_behind(layer, x_BLD, carry, starts_at(2, BLOCKS))
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_the_ids_are_added_behind_the_norm_and_never_to_the_state_itself() -> None:
    layer, x_BLD, carry = layer_and_inputs()
    with torch.no_grad():
        layer.cell.gate.bias_D.fill_(1000.0)  # keeps all of the state
        layer.cell.ids_SD.mul_(50)
    _, left = layer(x_BLD, carry, starts_at(2, BLOCKS))
    assert carry.state_BSD is not None
    assert left.state_BSD is not None
    assert torch.equal(left.state_BSD, carry.state_BSD)
