"""Gates of the recurrent cell: how much of the state stays and how much of the update comes in.

Dimension key
  B  lanes    S  state vectors    D  model width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FixedGate(nn.Module):
    """An exponential moving average with one learned rate per channel (paper, section 3.2; no bias on the update)."""

    def __init__(self, dim: int):
        super().__init__()
        self.bias_D = nn.Parameter(torch.zeros(dim))

    def forward(self, state_BSD: Tensor, update_BSD: Tensor) -> Tensor:
        """The next state, in the state's own dtype (float32: a gate near 1 loses small updates in bfloat16)."""
        keep_D = torch.sigmoid(self.bias_D.to(state_BSD.dtype))
        return keep_D * state_BSD + (1 - keep_D) * update_BSD.to(state_BSD.dtype)
