"""One ordinary layer: sliding-window attention and an MLP; also the token side of a recurrent layer.

Dimension key
  B  lanes    L  tokens in a segment    C  blocks in a segment    W  tokens in a block    X  keys of a piece = 2W
  S  state vectors    D  model width    H  heads    K  head width    M  width of the MLP
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brt_dist.model.carry import LayerCarry
from brt_dist.model.config import ModelConfig
from brt_dist.model.positions import RelativeBias, rotate
from brt_dist.model.recompute import Recompute
from brt_dist.model.stacked_linear import StackedLinear
from brt_dist.model.window_attention import attend_all, pair_blocks, rung_here, window_attention

EPSILON = 1e-6
# How many masks of dropout a layer draws in a forward pass.
MASKS_PER_LAYER = 2


def unit(vectors: Tensor) -> Tensor:
    """Vectors of length 1 along the last dimension (QK normalisation, reference: epsilon inside the root)."""
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + EPSILON)).to(vectors.dtype)


class SharedDropout(nn.Module):
    """Dropout of whole channels: one mask for all lanes and positions that it is called with (reference).

    That is a forward pass, or one of its blocks where the stack runs block by block (feedback).
    """

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, x_BLD: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x_BLD
        keep_D = torch.rand(x_BLD.shape[-1], device=x_BLD.device) >= self.probability
        return x_BLD * (keep_D / (1 - self.probability)).to(x_BLD.dtype)


class MLP(nn.Module):
    """Two matrices with a ReLU between them, no biases."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.input = nn.Linear(dim, hidden, bias=False)
        self.output = nn.Linear(hidden, dim, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.output(F.relu(self.input(x_BLD)))


@dataclass(frozen=True)
class TokenViews:
    """What a layer's tokens ask and offer. Keys are unrotated; `state_queries` only where the layer reads a state."""

    queries_BLHK: Tensor
    keys_BLHK: Tensor
    values_BLHK: Tensor
    state_queries_BLHK: Tensor | None


@dataclass(frozen=True)
class Pieces:
    """What the tokens of each block offer together with those of the block before it; keys are unrotated."""

    keys_BCXHK: Tensor
    values_BCXHK: Tensor

    @classmethod
    def of(cls, views: TokenViews, carry: LayerCarry, starts_BC: Tensor) -> Pieces:
        """The pieces of a segment."""
        return cls(
            pair_blocks(views.keys_BLHK, carry.keys_BWHK, starts_BC),
            pair_blocks(views.values_BLHK, carry.values_BWHK, starts_BC),
        )


class TransformerLayer(nn.Module):
    """Pre-norm layer whose tokens attend to the W tokens before them and, if `reads_state`, to a state as well.

    The two attentions have softmaxes of their own; their heads go side by side through one output matrix, those of
    the self-attention first (paper, section 3.1).
    """

    def __init__(self, config: ModelConfig, reads_state: bool = False):
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.head_dim, self.window, self.position = config.head_dim, config.window, config.position
        self.reads_state = reads_state
        self.recompute = Recompute()
        self.attention_norm = nn.RMSNorm(config.dim, eps=EPSILON)
        self.projection = StackedLinear(config.dim, inner, parts=4 if reads_state else 3)
        self.scale_H = nn.Parameter(torch.ones(config.num_heads))
        if reads_state:
            self.state_scale_H = nn.Parameter(torch.ones(config.num_heads))
        self.bias = RelativeBias(config.num_heads, config.window) if config.position == "t5" else None
        self.attention_output = nn.Linear((2 if reads_state else 1) * inner, config.dim, bias=False)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=EPSILON)
        self.mlp = MLP(config.dim, config.mlp_dim)
        self.dropout = SharedDropout(config.dropout)

    def forward(self, x_BLD: Tensor, carry: LayerCarry, starts_BC: Tensor) -> tuple[Tensor, LayerCarry]:
        """The layer's output for a segment, and its carry for the next one."""
        views = self.view(x_BLD)
        out_BLD = self.finish(x_BLD, self.attend(views, carry, starts_BC))
        return out_BLD, self.carry_on(views)

    def view(self, x_BLD: Tensor) -> TokenViews:
        """Queries, keys and values of the tokens; queries and keys have unit length."""
        h_BLD = self.dropout(self.attention_norm(x_BLD))
        parts = (part.unflatten(-1, (-1, self.head_dim)) for part in self.projection(h_BLD))
        queries, keys, values, *state_queries = parts
        # Of a length autograd keeps float32 copies.
        unit_queries, unit_keys, *unit_state_queries = (
            self.recompute.attention(unit, each) for each in (queries, keys, *state_queries)
        )
        return TokenViews(unit_queries, unit_keys, values, unit_state_queries[0] if self.reads_state else None)

    def attend(self, views: TokenViews, carry: LayerCarry, starts_BC: Tensor, pieces: Pieces | None = None) -> Tensor:
        """heads_BLHK of the self-attention. pieces: where a state has them already, so that they are held once."""
        return self.recompute.attention(self._attend, views, carry, starts_BC, pieces)

    def _attend(self, views: TokenViews, carry: LayerCarry, starts_BC: Tensor, pieces: Pieces | None) -> Tensor:
        queries_BLHK = views.queries_BLHK
        if self.position == "rotary":
            queries_BLHK = rotate(queries_BLHK, 0)
            keys_BCXHK = pair_blocks(rotate(views.keys_BLHK, 0), rotate(carry.keys_BWHK, -self.window), starts_BC)
        else:
            keys_BCXHK = pieces.keys_BCXHK if pieces else pair_blocks(views.keys_BLHK, carry.keys_BWHK, starts_BC)
        values_BCXHK = pieces.values_BCXHK if pieces else pair_blocks(views.values_BLHK, carry.values_BWHK, starts_BC)
        bias_HW = None if self.bias is None else self.bias()
        return window_attention(
            queries_BLHK,
            keys_BCXHK,
            values_BCXHK,
            self.scale_H.abs(),
            bias_HW,
            rung_here(queries_BLHK.device, queries_BLHK.dtype, self.head_dim, bias_HW is not None),
        )

    def attend_state(self, views: TokenViews, state_keys_BCSHK: Tensor, state_values_BCSHK: Tensor) -> Tensor:
        """heads_BLHK of the attention to the state, which each block reads as it stood in front of that block."""
        return self.recompute.attention(self._attend_state, views, state_keys_BCSHK, state_values_BCSHK)

    def _attend_state(self, views: TokenViews, state_keys_BCSHK: Tensor, state_values_BCSHK: Tensor) -> Tensor:
        assert views.state_queries_BLHK is not None
        queries = views.state_queries_BLHK.unflatten(1, (-1, self.window)).flatten(0, 1)
        heads = attend_all(
            queries, state_keys_BCSHK.flatten(0, 1), state_values_BCSHK.flatten(0, 1), self.state_scale_H.abs()
        )
        return heads.reshape(views.state_queries_BLHK.shape)

    def finish(self, x_BLD: Tensor, *heads_BLHK: Tensor) -> Tensor:
        """Output projection, residual and MLP."""
        x_BLD = x_BLD + self.attention_output(torch.cat([heads.flatten(-2) for heads in heads_BLHK], dim=-1))
        update_BLD = self.recompute.mlp(self.mlp, self.mlp_norm(x_BLD))
        return x_BLD + self.dropout(update_BLD)

    def carry_on(self, views: TokenViews, state_BSD: Tensor | None = None) -> LayerCarry:
        """What the next segment needs of this one."""
        # Copies: views would keep the whole segment's keys, and the projection that values are views of, in memory.
        keys_BWHK, values_BWHK = (each[:, -self.window :].clone() for each in (views.keys_BLHK, views.values_BLHK))
        return LayerCarry(keys_BWHK, values_BWHK, state_BSD)

    def forget(self, carry: LayerCarry) -> LayerCarry:
        """The carry as it is: there is no state in it."""
        return carry
