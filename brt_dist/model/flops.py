"""How many floating-point operations a token costs."""

from __future__ import annotations

from brt_dist.model.config import ModelConfig


def forward_flops_per_token(config: ModelConfig) -> float:
    """Of one forward pass; a multiplication and an addition count as two. Training costs three times as much.

    Counted are matrix products and the attention that a token really sees: W tokens and S states, and for each of the
    S states of a block, S states and 2W tokens.
    """
    inner = config.num_heads * config.head_dim
    ordinary = 2 * (3 * config.dim * inner + inner * config.dim + 2 * config.dim * config.mlp_dim)
    ordinary += 4 * config.window * inner
    reading = 2 * 2 * config.dim * inner + 4 * config.num_states * inner
    readers = config.num_layers if config.feedback else len(config.recurrent_layers)
    states_per_token = config.num_states / config.window
    recurrent = _flops_per_state(config) * states_per_token
    head = 2 * config.dim * config.vocab_size
    return config.num_layers * ordinary + readers * reading + len(config.recurrent_layers) * recurrent + head


def _flops_per_state(config: ModelConfig) -> float:
    """To advance one state vector by a block."""
    inner = config.num_heads * config.head_dim
    attention = 2 * 4 * config.dim * inner + 4 * (config.num_states + 2 * config.window) * inner
    # A fixed gate's inputs go through its candidate's matrix alone, an LSTM gate's through those of two gates as well.
    matrices = 1 if config.gate == "fixed" else 3
    gate, mlp_gate = 2 * matrices * 2 * inner * config.dim, 2 * matrices * config.mlp_dim * config.dim
    return (
        attention
        + {
            "skip": gate,
            "dual": gate + 2 * config.dim * config.mlp_dim + mlp_gate,
            "single": 2 * 2 * inner * config.mlp_dim + mlp_gate,
        }[config.cell]
    )
