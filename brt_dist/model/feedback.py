"""Block feedback (paper, section 3.4): every other layer reads the recurrent layer's state, too.

The state is one that a higher layer wrote a block earlier, so the whole stack must run block by block, and the two
phases of `recurrent_layer.py` have no place here. A block is a segment of its own, its carry not detached: gradients
cross all blocks.

Dimension key
  B  lanes    L  tokens in a segment    C  blocks in a segment    W  tokens in a block    S  state vectors
  D  model width    H  heads    K  head width
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from brt_dist.model.carry import Carry
from brt_dist.model.recurrent_layer import RecurrentLayer
from brt_dist.model.transformer_layer import Pieces, TransformerLayer


def run_with_feedback(
    layers: Sequence[nn.Module], x_BLD: Tensor, carry: Carry, starts_BC: Tensor
) -> tuple[Tensor, Carry]:
    """The whole stack over a segment: its output, and the carry, not detached.

    At least one layer recurs. Where several do, each reads its own state and the other layers the last one's.
    """
    window = x_BLD.shape[1] // starts_BC.shape[1]
    together = cast(TransformerLayer | RecurrentLayer, layers[0]).recompute
    outputs = []
    for block, x_BWD in enumerate(x_BLD.split(window, dim=1)):
        # Layers that read each other's state can only be computed again together.
        x_BWD, carry = together.layer(_run_block, layers, x_BWD, carry, starts_BC[:, block])
        outputs.append(x_BWD)
    return torch.cat(outputs, dim=1), carry


def _run_block(layers: Sequence[nn.Module], x_BWD: Tensor, carry: Carry, starts_B: Tensor) -> tuple[Tensor, Carry]:
    recurrent = {index: layer for index, layer in enumerate(layers) if isinstance(layer, RecurrentLayer)}
    states = {index: layer.open(carry.layers[index].states(), starts_B) for index, layer in recurrent.items()}
    views = {index: layer.cell.view(states[index]) for index, layer in recurrent.items()}
    fed_back = views[max(views)]
    carries = []
    for index, (layer, layer_carry) in enumerate(zip(layers, carry.layers, strict=True)):
        tokens = layer.tokens if isinstance(layer, RecurrentLayer) else layer
        assert isinstance(tokens, TransformerLayer)
        token_views = tokens.view(x_BWD)
        read = views.get(index, fed_back)
        state_BSD, pieces = None, None
        if isinstance(layer, RecurrentLayer):
            pieces = Pieces.of(token_views, layer_carry, starts_B[:, None])
            state_BSD = layer.cell(states[index], read, pieces.keys_BCXHK[:, 0], pieces.values_BCXHK[:, 0])
        heads = tokens.attend(token_views, layer_carry, starts_B[:, None], pieces)
        state_heads = tokens.attend_state(token_views, read.keys_BSHK[:, None], read.values_BSHK[:, None])
        x_BWD = tokens.finish(x_BWD, heads, state_heads)
        carries.append(tokens.carry_on(token_views, state_BSD))
    return x_BWD, Carry(tuple(carries))
