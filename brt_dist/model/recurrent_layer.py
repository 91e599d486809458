"""The block-recurrent layer (paper, section 3), in two phases.

Phase one is sequential, block by block, and holds only what must be: the state reads itself and the tokens' keys and
values and is updated through a gate. Phase two runs over the whole segment at once: the tokens attend to each other and
to the states of all blocks. This equals the block-by-block computation, because the state update never reads the
layer's token output, and tokens read the state as it was before their own block updated it.

Dimension key
  B  lanes    L  tokens in a segment    C  blocks in a segment    X  token keys that a block sees = 2W
  S  state vectors    D  model width    H  heads    K  head width
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brt_dist.model.carry import LayerCarry
from brt_dist.model.config import ModelConfig
from brt_dist.model.gates import FixedGate
from brt_dist.model.transformer_layer import EPSILON, TransformerLayer, unit
from brt_dist.model.window_attention import attend_all, pair_blocks


class RecurrentCell(nn.Module):
    """The horizontal direction: advances the state by one block. Configuration *skip*: a gate, no MLP."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.head_dim = config.head_dim
        self.norm = nn.RMSNorm(config.dim, eps=EPSILON)
        # Without the ids all state vectors would be treated alike and could collapse into one.
        self.ids_SD = nn.Parameter(torch.zeros(config.num_states, config.dim))
        self.projection = nn.Linear(config.dim, 4 * inner, bias=False)
        self.scale_H = nn.Parameter(torch.ones(config.num_heads))
        self.token_scale_H = nn.Parameter(torch.ones(config.num_heads))
        self.update = nn.Linear(2 * inner, config.dim, bias=False)
        self.gate = FixedGate(config.dim)

    def forward(
        self, state_BSD: Tensor, token_keys_BXHK: Tensor, token_values_BXHK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The state behind this block, and keys_BSHK and values_BSHK of the state in front of it.

        The state sees all 2W tokens of this block and the previous one, without mask, order or bias (reference).
        """
        dtype = token_keys_BXHK.dtype
        gain_D = self.norm.weight.to(state_BSD.dtype)
        h_BSD = F.rms_norm(state_BSD, gain_D.shape, gain_D, EPSILON).to(dtype) + self.ids_SD
        parts = self.projection(h_BSD).unflatten(-1, (4, -1, self.head_dim)).unbind(2)
        self_queries, token_queries, keys_BSHK = (unit(part) for part in parts[:3])
        values_BSHK = parts[3]
        heads = torch.cat(
            [
                attend_all(self_queries, keys_BSHK, values_BSHK, self.scale_H.abs()).flatten(-2),
                attend_all(token_queries, token_keys_BXHK, token_values_BXHK, self.token_scale_H.abs()).flatten(-2),
            ],
            dim=-1,
        )
        return self.gate(state_BSD, self.update(heads)), keys_BSHK, values_BSHK


class RecurrentLayer(nn.Module):
    """A layer with a recurrent cell: tokens read the state, the state reads tokens."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.tokens = TransformerLayer(config, reads_state=True)
        self.cell = RecurrentCell(config)
        self.initial_state_SD = nn.Parameter(torch.zeros(config.num_states, config.dim))

    def forward(self, x_BLD: Tensor, carry: LayerCarry, starts_BC: Tensor) -> tuple[Tensor, LayerCarry]:
        """The layer's output for a segment, and its carry for the next one."""
        views = self.tokens.view(x_BLD)
        keys_BCXHK = pair_blocks(views.keys_BLHK, carry.keys_BWHK, starts_BC)
        values_BCXHK = pair_blocks(views.values_BLHK, carry.values_BWHK, starts_BC)
        assert carry.state_BSD is not None
        state_BSD, state_keys, state_values = self.recur(carry.state_BSD, keys_BCXHK, values_BCXHK, starts_BC)
        out_BLD = self.tokens.finish(
            x_BLD,
            self.tokens.attend(views, carry, starts_BC),
            self.tokens.attend_state(views, state_keys, state_values),
        )
        return out_BLD, self.tokens.carry_on(views, state_BSD)

    def recur(
        self, state_BSD: Tensor, keys_BCXHK: Tensor, values_BCXHK: Tensor, starts_BC: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Phase one. Returns the last state and the keys_BCSHK and values_BCSHK that each block's tokens read."""
        initial_SD = self.initial_state_SD.to(state_BSD.dtype)
        state_keys, state_values = [], []
        for block in range(starts_BC.shape[1]):
            # `where`, even if nothing starts here: ZeRO pairs gradients by the parameters that took part.
            state_BSD = torch.where(starts_BC[:, block, None, None], initial_SD, state_BSD)
            state_BSD, keys_BSHK, values_BSHK = self.cell(state_BSD, keys_BCXHK[:, block], values_BCXHK[:, block])
            state_keys.append(keys_BSHK)
            state_values.append(values_BSHK)
        return state_BSD, torch.stack(state_keys, dim=1), torch.stack(state_values, dim=1)
