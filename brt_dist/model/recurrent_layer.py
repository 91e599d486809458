"""The block-recurrent layer (paper, section 3), in two phases.

Phase one is sequential, block by block, and holds only what must be: the state reads itself and the tokens' keys and
values and is updated through gates. Phase two runs over the whole segment at once: the tokens attend to each other and
to the states of all blocks. This equals the block-by-block computation, because the state update never reads the
layer's token output, and tokens read the state as it was before their own block updated it.

Dimension key
  B  lanes    L  tokens in a segment    C  blocks in a segment    X  token keys that a block sees = 2W
  S  state vectors    D  model width    H  heads    K  head width
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from brt_dist.model.carry import LayerCarry
from brt_dist.model.config import ModelConfig
from brt_dist.model.recompute import Recompute
from brt_dist.model.stacked_linear import StackedLinear
from brt_dist.model.state_update import StateNorm, make_update
from brt_dist.model.transformer_layer import Pieces, TransformerLayer, unit
from brt_dist.model.window_attention import attend_all


@dataclass(frozen=True)
class StateViews:
    """What a state asks of itself and of the tokens, and what it offers to both."""

    self_queries_BSHK: Tensor
    token_queries_BSHK: Tensor
    keys_BSHK: Tensor
    values_BSHK: Tensor


class RecurrentCell(nn.Module):
    """The horizontal direction: advances the state by one block."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.norm = StateNorm(config.dim)
        # Without the ids all state vectors would be treated alike and could collapse into one.
        self.ids_SD = nn.Parameter(torch.zeros(config.num_states, config.dim))
        self.projection = StackedLinear(config.dim, config.num_heads * config.head_dim, parts=4)
        self.scale_H = nn.Parameter(torch.ones(config.num_heads))
        self.token_scale_H = nn.Parameter(torch.ones(config.num_heads))
        self.update = make_update(config)

    def view(self, state_BSD: Tensor) -> StateViews:
        """Queries, keys and values of a state; queries and keys have unit length."""
        parts = self.projection(self.norm(state_BSD) + self.ids_SD)
        self_queries, token_queries, keys, values = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        return StateViews(unit(self_queries), unit(token_queries), unit(keys), values)

    def forward(
        self, state_BSD: Tensor, views: StateViews, token_keys_BXHK: Tensor, token_values_BXHK: Tensor
    ) -> Tensor:
        """The state behind a block; views: of the state in front of it.

        The state sees all 2W tokens of this block and the previous one, without mask, order or bias (reference).
        """
        own_BSHK = attend_all(views.self_queries_BSHK, views.keys_BSHK, views.values_BSHK, self.scale_H.abs())
        tokens_BSHK = attend_all(views.token_queries_BSHK, token_keys_BXHK, token_values_BXHK, self.token_scale_H.abs())
        return self.update(state_BSD, torch.cat([own_BSHK.flatten(-2), tokens_BSHK.flatten(-2)], dim=-1))


class RecurrentLayer(nn.Module):
    """A layer with a recurrent cell: tokens read the state, the state reads tokens."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.recompute = Recompute()
        self.tokens = TransformerLayer(config, reads_state=True)
        self.cell = RecurrentCell(config)
        self.initial_state_SD = nn.Parameter(torch.zeros(config.num_states, config.dim))

    def forward(self, x_BLD: Tensor, carry: LayerCarry, starts_BC: Tensor) -> tuple[Tensor, LayerCarry]:
        """The layer's output for a segment, and its carry for the next one."""
        views = self.tokens.view(x_BLD)
        pieces = Pieces.of(views, carry, starts_BC)
        state_BSD, state_keys, state_values = self.recur(carry.states(), pieces, starts_BC)
        out_BLD = self.tokens.finish(
            x_BLD,
            self.tokens.attend(views, carry, starts_BC, pieces),
            self.tokens.attend_state(views, state_keys, state_values),
        )
        return out_BLD, self.tokens.carry_on(views, state_BSD)

    def recur(self, state_BSD: Tensor, pieces: Pieces, starts_BC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Phase one. Returns the last state and the keys_BCSHK and values_BCSHK that each block's tokens read."""
        state_keys, state_values = [], []
        for block in range(starts_BC.shape[1]):
            state_BSD = self.open(state_BSD, starts_BC[:, block])
            views = self.cell.view(state_BSD)
            state_BSD = self.cell(state_BSD, views, pieces.keys_BCXHK[:, block], pieces.values_BCXHK[:, block])
            state_keys.append(views.keys_BSHK)
            state_values.append(views.values_BSHK)
        return state_BSD, torch.stack(state_keys, dim=1), torch.stack(state_values, dim=1)

    def open(self, state_BSD: Tensor, starts_B: Tensor) -> Tensor:
        """The state in front of a block: the carried one, or the learned initial one where a document starts."""
        # `where`, even if nothing starts here: ZeRO pairs gradients by the parameters that took part.
        return torch.where(starts_B[:, None, None], self.initial_state_SD.to(state_BSD.dtype), state_BSD)

    def forget(self, carry: LayerCarry) -> LayerCarry:
        """The carry with the state of the start of a document; the cache stays."""
        state_BSD = carry.states()
        return replace(carry, state_BSD=self.initial_state_SD.to(state_BSD.dtype).expand_as(state_BSD))
