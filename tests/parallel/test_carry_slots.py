"""Slots keep the carry of each group of lanes by its number, whatever the order in which groups come."""

from __future__ import annotations

import torch
from small_models import WINDOW, all_lanes, small_config, small_model, some_carry, some_tokens, starts_at

from brt_dist.model.carry import Carry
from brt_dist.parallel.carry_slots import CarrySlots

CONFIG = small_config()


def slot(number: int) -> torch.Tensor:
    return torch.tensor([number])


def assert_same(ours: Carry, theirs: Carry) -> None:
    for name, tensor in theirs.tensors().items():
        assert torch.equal(ours.tensors()[name], tensor), name


def test_each_slot_gives_back_what_was_put_there_last():
    slots = CarrySlots(some_carry(CONFIG, 2, seed=0), 3)
    first, second, third = (some_carry(CONFIG, 2, seed=seed) for seed in (1, 2, 3))
    for number, carry in ((2, first), (0, second), (2, third)):
        slots.write(slot(number), carry)
    assert_same(slots.read(slot(0)), second)
    assert_same(slots.read(slot(1)), some_carry(CONFIG, 2, seed=0))
    assert_same(slots.read(slot(2)), third)


def test_a_carry_that_was_read_does_not_change_when_its_slot_is_written():
    slots = CarrySlots(some_carry(CONFIG, 2, seed=0), 1)
    read = slots.read(slot(0))
    slots.write(slot(0), some_carry(CONFIG, 2, seed=1))
    assert_same(read, some_carry(CONFIG, 2, seed=0))


def test_no_gradient_goes_through_a_slot():
    model = small_model()
    slots = CarrySlots(some_carry(CONFIG, 2), 1)
    hidden, carry = model.hidden(some_tokens(2, 2 * WINDOW), slots.read(slot(0)), starts_at(2, 2, (0, 0)))
    slots.write(slot(0), carry)
    assert hidden.requires_grad
    assert not any(tensor.requires_grad for tensor in slots.read(slot(0)).tensors().values())


def test_the_lanes_of_all_slots_come_in_order_and_go_back_in_order():
    slots = CarrySlots(some_carry(CONFIG, 2), 2)
    groups = [some_carry(CONFIG, 2, seed=seed) for seed in (4, 5)]
    for number, carry in enumerate(groups):
        slots.write(slot(number), carry)
    assert_same(slots.all_lanes(), all_lanes(groups))
    again = CarrySlots(some_carry(CONFIG, 2), 2)
    again.restore(slots.all_lanes())
    for number, carry in enumerate(groups):
        assert_same(again.read(slot(number)), carry)
