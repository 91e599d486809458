"""How a recurrent cell turns what its states have read into their next values: *skip*, *dual* or *single*.

Gates stand where a layer of tokens has residual connections (paper, section 3.2).

Dimension key
  B  lanes    S  state vectors    D  model width    R  width of what was read = 2 x heads x head width    M  width of
  the MLP
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from brt_dist.model.config import ModelConfig
from brt_dist.model.gates import make_gate
from brt_dist.model.transformer_layer import EPSILON


class StateNorm(nn.RMSNorm):
    """RMSNorm computed in the state's own dtype, which is float32 in every precision of the model."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=EPSILON)

    def forward(self, state_BSD: Tensor) -> Tensor:
        """In the dtype of the weights."""
        gain_D = self.weight.to(state_BSD.dtype)
        return F.rms_norm(state_BSD, gain_D.shape, gain_D, EPSILON).to(self.weight.dtype)


class Skip(nn.Module):
    """One gate, no MLP."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = make_gate(config, 2 * config.num_heads * config.head_dim)

    def forward(self, state_BSD: Tensor, read_BSR: Tensor) -> Tensor:
        """The next state."""
        return self.gate(state_BSD, read_BSR)


class Dual(nn.Module):
    """A gate, then an MLP behind a norm with a second gate: the shape of an ordinary layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = make_gate(config, 2 * config.num_heads * config.head_dim)
        self.mlp_norm = StateNorm(config.dim)
        self.mlp_input = nn.Linear(config.dim, config.mlp_dim, bias=False)
        self.mlp_gate = make_gate(config, config.mlp_dim)

    def forward(self, state_BSD: Tensor, read_BSR: Tensor) -> Tensor:
        """The next state."""
        state_BSD = self.gate(state_BSD, read_BSR)
        return self.mlp_gate(state_BSD, F.relu(self.mlp_input(self.mlp_norm(state_BSD))))


class Single(nn.Module):
    """An MLP on what was read, without norm or projection before it, and one gate, whose candidate goes through tanh.

    The reference squashes the candidate here and nowhere else, whatever the gate.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.mlp_input = nn.Linear(2 * config.num_heads * config.head_dim, config.mlp_dim, bias=False)
        self.gate = make_gate(config, config.mlp_dim, squash=True)

    def forward(self, state_BSD: Tensor, read_BSR: Tensor) -> Tensor:
        """The next state."""
        return self.gate(state_BSD, F.relu(self.mlp_input(read_BSR)))


UPDATES: dict[str, type[Skip | Dual | Single]] = {"skip": Skip, "dual": Dual, "single": Single}


def make_update(config: ModelConfig) -> Skip | Dual | Single:
    """The update that the configuration names as its cell."""
    return UPDATES[config.cell](config)
