"""The recurrent layer: two phases against one block after the other, and what the state may see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import CELLS, WINDOW, hold_gates, small_config, small_model, some_carry, starts_at, variant_name
from torch import Tensor

from brt_dist.model.carry import LayerCarry
from brt_dist.model.recurrent_layer import RecurrentLayer

BLOCKS = 4
EVERY_CELL = pytest.mark.parametrize("variant", CELLS, ids=variant_name)


def layer_and_inputs(**variant: Any) -> tuple[RecurrentLayer, Tensor, LayerCarry]:
    layer = small_model(**variant).layers[1]
    assert isinstance(layer, RecurrentLayer)
    generator = torch.Generator().manual_seed(0)
    x_BLD = torch.randn(2, BLOCKS * WINDOW, small_config().dim, generator=generator, dtype=torch.float64)
    return layer, x_BLD, some_carry(small_config(), 2).layers[1]


def states_behind(layer: RecurrentLayer, x_BLD: Tensor, carry: LayerCarry, starts_BC: Tensor) -> list[Tensor]:
    """state_BSD behind each block."""
    states: list[Tensor] = []
    handle = layer.cell.register_forward_hook(lambda cell, inputs, output: states.append(output))
    layer(x_BLD, carry, starts_BC)
    handle.remove()
    return states


@EVERY_CELL
def test_two_phases_equal_one_block_after_the_other(variant: dict[str, Any]) -> None:
    layer, x_BLD, carry = layer_and_inputs(**variant)
    starts_BC = starts_at(2, BLOCKS, (1, 2))
    whole, last = layer(x_BLD, carry, starts_BC)
    outs = []
    for block, x_BWD in enumerate(x_BLD.split(WINDOW, dim=1)):
        out, carry = layer(x_BWD, carry, starts_BC[:, block : block + 1])
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=1), whole, rtol=0, atol=1e-13)
    torch.testing.assert_close(carry.state_BSD, last.state_BSD, rtol=0, atol=1e-13)


@EVERY_CELL
def test_tokens_read_the_state_as_it_was_before_their_own_block_updated_it(variant: dict[str, Any]) -> None:
    layer, x_BLD, carry = layer_and_inputs(**variant)
    out, _ = layer(x_BLD, carry, starts_at(2, BLOCKS))
    # Every update differs; what is read of the state in front of the first block does not.
    handle = layer.cell.register_forward_hook(lambda cell, inputs, output: output.flip(-1) + 1)
    changed, _ = layer(x_BLD, carry, starts_at(2, BLOCKS))
    handle.remove()
    assert torch.equal(out[:, :WINDOW], changed[:, :WINDOW])
    assert not torch.isclose(out[:, WINDOW:], changed[:, WINDOW:]).all(-1).any()


@EVERY_CELL
@pytest.mark.parametrize("changed_block", range(BLOCKS))
def test_a_token_reaches_the_states_from_its_own_block_on(changed_block: int, variant: dict[str, Any]) -> None:
    layer, x_BLD, carry = layer_and_inputs(**variant)
    starts_BC = starts_at(2, BLOCKS)
    other_BLD = x_BLD.clone()
    other_BLD[:, (changed_block + 1) * WINDOW - 1] += 1
    before, after = (states_behind(layer, x, carry, starts_BC) for x in (x_BLD, other_BLD))
    for block in range(BLOCKS):
        assert torch.equal(before[block], after[block]) == (block < changed_block)


@EVERY_CELL
def test_the_state_sees_both_blocks_without_mask_or_order(variant: dict[str, Any]) -> None:
    layer, x_BLD, _ = layer_and_inputs(**variant)
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 2, 2 * WINDOW, 2, 4, generator=generator, dtype=torch.float64)
    state = torch.randn(2, 3, x_BLD.shape[-1], generator=generator, dtype=torch.float64)
    values.requires_grad_()
    views = layer.cell.view(state)
    after = layer.cell(state, views, keys, values)
    (gradient,) = torch.autograd.grad(after.square().sum(), values)
    assert (gradient.abs().amax((-1, -2)) > 0).all()
    order = torch.randperm(2 * WINDOW, generator=generator)
    shuffled = layer.cell(state, views, keys[:, order], values[:, order])
    torch.testing.assert_close(shuffled, after, rtol=0, atol=1e-13)


@EVERY_CELL
def test_the_state_never_reads_the_layers_token_output(variant: dict[str, Any]) -> None:
    layer, x_BLD, carry = layer_and_inputs(**variant)
    before = states_behind(layer, x_BLD, carry, starts_at(2, BLOCKS))
    with torch.no_grad():
        layer.tokens.attention_output.weight.normal_()
        layer.tokens.mlp.input.weight.normal_()
        layer.tokens.scale_H.add_(1)
    after = states_behind(layer, x_BLD, carry, starts_at(2, BLOCKS))
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@EVERY_CELL
def test_the_ids_are_added_behind_the_norm_and_never_to_the_state_itself(variant: dict[str, Any]) -> None:
    layer, x_BLD, carry = layer_and_inputs(**variant)
    hold_gates(layer, 1000)  # all of the state stays
    with torch.no_grad():
        layer.cell.ids_SD.mul_(50)
    _, left = layer(x_BLD, carry, starts_at(2, BLOCKS))
    assert carry.state_BSD is not None
    assert left.state_BSD is not None
    assert torch.equal(left.state_BSD, carry.state_BSD)


@EVERY_CELL
def test_state_ids_break_the_symmetry_between_states(variant: dict[str, Any]) -> None:
    layer, x_BLD, carry = layer_and_inputs(**variant)
    with torch.no_grad():
        layer.initial_state_SD.copy_(layer.initial_state_SD[:1].expand(3, -1))
    starts_BC = starts_at(2, BLOCKS, (0, 0), (1, 0))
    distinct = layer(x_BLD, carry, starts_BC)[1].state_BSD
    with torch.no_grad():
        layer.cell.ids_SD.zero_()
    alike = layer(x_BLD, carry, starts_BC)[1].state_BSD
    torch.testing.assert_close(alike, alike[:, :1].expand_as(alike), rtol=0, atol=1e-14)
    gaps_BSS = (distinct[:, :, None] - distinct[:, None]).abs().amax(-1) + torch.eye(3)
    assert (gaps_BSS > 1e-3).all()


@EVERY_CELL
def test_updates_too_small_for_bfloat16_are_not_lost_in_it(variant: dict[str, Any]) -> None:
    layer, x_BLD, carry = layer_and_inputs(**variant)
    hold_gates(layer, 9)  # 0.99988 of the state stays
    state_BSD = 1 + torch.rand(2, 3, x_BLD.shape[-1], generator=torch.Generator().manual_seed(3)).double()
    moved = []
    layer = layer.bfloat16()
    for dtype in (torch.bfloat16, torch.float64):
        state_dtype = torch.promote_types(dtype, torch.float32)
        layer_carry = LayerCarry(carry.keys_BWHK.to(dtype), carry.values_BWHK.to(dtype), state_BSD.to(state_dtype))
        for _ in range(3):
            _, layer_carry = layer.to(dtype)(x_BLD.bfloat16().to(dtype), layer_carry, starts_at(2, BLOCKS))
        assert layer_carry.state_BSD is not None
        assert layer_carry.state_BSD.dtype == state_dtype
        moved.append(layer_carry.state_BSD.double() - state_BSD.to(state_dtype))
    rounded_BSD, exact_BSD = moved
    # Between 1 and 2, where the state is, bfloat16 has steps of 1/128: each of the 12 updates would be rounded away.
    assert exact_BSD.abs().max() / 12 < 1 / 512
    assert exact_BSD.abs().max() > 1e-3
    assert (rounded_BSD - exact_BSD).norm() < 0.05 * exact_BSD.norm()
