"""Gates of the recurrent cell: how much of the state stays and how much of a candidate comes in.

Each gate owns the projection from hidden vectors to its candidate: `next_state = gate(state, hidden)`. All of it beyond
that projection is computed in the state's dtype, float32 at least: a gate near 1 loses small updates in bfloat16.

Dimension key
  B  lanes    S  state vectors    D  model width    I  width of the hidden vectors
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from brt_dist.model.config import ModelConfig
from brt_dist.model.stacked_linear import StackedLinear


class FixedGate(nn.Module):
    """An exponential moving average with one learned rate per channel (paper, section 3.2; no bias on the candidate).

    c' = c g + z (1 - g), with g = sigmoid(bias) and z = W h, or tanh(W h) if `squash`.
    """

    def __init__(self, inputs: int, dim: int, squash: bool = False):
        super().__init__()
        self.squash = squash
        self.candidate = nn.Linear(inputs, dim, bias=False)
        self.bias_D = nn.Parameter(torch.zeros(dim))

    def forward(self, state_BSD: Tensor, hidden_BSI: Tensor) -> Tensor:
        """The next state, in the state's own dtype."""
        candidate_BSD = self.candidate(hidden_BSI).to(state_BSD.dtype)
        keep_D = torch.sigmoid(self.bias_D.to(state_BSD.dtype))
        return keep_D * state_BSD + (1 - keep_D) * (candidate_BSD.tanh() if self.squash else candidate_BSD)

    def openness(self, hidden_BSI: Tensor) -> Tensor:
        """The mean share of the candidate that comes in, a scalar between 0 and 1; the same for all hidden vectors."""
        return 1 - torch.sigmoid(self.bias_D.float()).mean()


class LSTMGate(nn.Module):
    """Input and forget gates that depend on the hidden vectors, never on the state itself (paper, section 3.2).

    c' = c sigmoid(Wf h + bf + 1) + z sigmoid(Wi h + bi - 1), with z = Wz h, or tanh(Wz h) if `squash`. The constants
    make the gate begin by remembering. The three matrices are one product: candidate, input gate, forget gate.
    """

    def __init__(self, inputs: int, dim: int, squash: bool = False):
        super().__init__()
        self.squash = squash
        self.candidate_and_gates = StackedLinear(inputs, dim, parts=3)
        self.input_bias_D = nn.Parameter(torch.zeros(dim))
        self.forget_bias_D = nn.Parameter(torch.zeros(dim))

    def forward(self, state_BSD: Tensor, hidden_BSI: Tensor) -> Tensor:
        """The next state, in the state's own dtype."""
        parts = (part.to(state_BSD.dtype) for part in self.candidate_and_gates(hidden_BSI))
        candidate_BSD, input_BSD, forget_BSD = parts
        keep_BSD = torch.sigmoid(forget_BSD + self.forget_bias_D + 1)
        admit_BSD = torch.sigmoid(input_BSD + self.input_bias_D - 1)
        return keep_BSD * state_BSD + admit_BSD * (candidate_BSD.tanh() if self.squash else candidate_BSD)

    def openness(self, hidden_BSI: Tensor) -> Tensor:
        """The mean share of the candidate that comes in, a scalar between 0 and 1."""
        _, input_BSD, _ = self.candidate_and_gates(hidden_BSI)
        return torch.sigmoid(input_BSD.float() + self.input_bias_D - 1).mean()


def make_gate(config: ModelConfig, inputs: int, squash: bool = False) -> FixedGate | LSTMGate:
    """The gate that the configuration names, for hidden vectors of width `inputs`."""
    kind = FixedGate if config.gate == "fixed" else LSTMGate
    return kind(inputs, config.dim, squash)
