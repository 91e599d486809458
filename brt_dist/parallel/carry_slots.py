"""Where a stage keeps the carry of its layers between the segments of its lanes.

Dimension key
  Z  slots    B  lanes of a slot
"""

from __future__ import annotations

import torch
from torch import Tensor

from brt_dist.model.carry import Carry


class CarrySlots:
    """One carry for each group of lanes that is a micro-batch of its own; all groups have the same size.

    A slot's number comes as a tensor, with the micro-batch: nothing here counts calls, and nothing waits for a device.
    """

    def __init__(self, fresh: Carry, slots: int):
        """fresh: what every slot holds at first, of one group."""
        self._held = fresh.map(lambda tensor: tensor.detach().expand(slots, *tensor.shape).clone())

    def read(self, slot: Tensor) -> Carry:
        """The carry in a slot; slot: int64, [1]."""
        return self._held.map(lambda held_ZB: held_ZB.index_select(0, slot)[0])

    @torch.no_grad()
    def write(self, slot: Tensor, carry: Carry) -> None:
        """Put a carry in its slot, as constants: gradients end at a segment's end."""
        new = carry.tensors()
        for name, held_ZB in self._held.tensors().items():
            held_ZB.index_copy_(0, slot, new[name][None])

    def all_lanes(self) -> Carry:
        """The carry of the lanes of all slots, in order."""
        return self._held.map(lambda held_ZB: held_ZB.flatten(0, 1))

    def restore(self, carry: Carry) -> None:
        """Take up what `all_lanes` gave."""
        for name, tensor in carry.tensors().items():
            held_ZB = self._held.tensors()[name]
            held_ZB.copy_(tensor.view_as(held_ZB))
