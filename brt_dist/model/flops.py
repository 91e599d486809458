"""How many floating-point operations a token costs."""

from __future__ import annotations

from brt_dist.model.config import ModelConfig


def forward_flops_per_token(config: ModelConfig, segment: int) -> float:
    """Of one forward pass; a multiplication and an addition count as two. Training costs three times as much.

    Counted are matrix products and the attention that a token really sees: W tokens and S states, and for each of the
    S states of a block, S states and 2W tokens.
    """
    inner = config.num_heads * config.head_dim
    ordinary = 2 * (3 * config.dim * inner + inner * config.dim + 2 * config.dim * config.mlp_dim)
    ordinary += 4 * config.window * inner
    token_side = 2 * 2 * config.dim * inner + 4 * config.num_states * inner
    per_state = 2 * (4 * config.dim * inner + 2 * inner * config.dim)
    per_state += 4 * (config.num_states + min(2 * config.window, config.window + segment)) * inner
    recurrent = token_side + per_state * config.num_states / config.window
    head = 2 * config.dim * config.vocab_size
    return config.num_layers * ordinary + len(config.recurrent_layers) * recurrent + head
