"""Several projections of one input in one matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StackedLinear(nn.Module):
    """`parts` matrices of equal size, row under row, without biases.

    The parts are parameters of their own in the paper and the reference. What looks at whole matrices (Adafactor's and
    Muon's steps, slices of tensor parallelism, the reference's names) must look at each part; `parts_by_name` tells.
    """

    def __init__(self, inputs: int, outputs: int, parts: int):
        super().__init__()
        self.parts = parts
        self.weight = nn.Parameter(torch.zeros(parts * outputs, inputs))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The parts' products, each [..., outputs]."""
        return F.linear(x, self.weight).chunk(self.parts, dim=-1)


def parts_by_name(model: nn.Module) -> dict[str, int]:
    """How many matrices each stacked parameter of `model` holds; parameters that are not listed are one."""
    return {
        f"{name}.weight" if name else "weight": module.parts
        for name, module in model.named_modules()
        if isinstance(module, StackedLinear)
    }
