"""How many floating-point operations a token costs."""

from __future__ import annotations

from brt_dist.model.config import ModelConfig


def forward_flops_per_token(config: ModelConfig) -> float:
    """Of one forward pass; a multiplication and an addition count as two. Training costs three times as much.

    Counted are matrix products and the attention that a token really sees: W tokens and S states, and for each of the
    S states of a block, S states and 2W tokens.
    """
    return sum(layer_flops(config, index) for index in range(config.num_layers)) + head_flops(config)


def layer_flops(config: ModelConfig, index: int) -> float:
    """Of one layer in a forward pass, per token; a recurrent one costs about twice an ordinary one."""
    inner = config.num_heads * config.head_dim
    recurs = index in config.recurrent_layers
    flops: float = 2 * (3 * config.dim * inner + inner * config.dim + 2 * config.dim * config.mlp_dim)
    flops += 4 * config.window * inner
    if recurs or config.feedback:
        flops += 2 * 2 * config.dim * inner + 4 * config.num_states * inner
    if recurs:
        flops += _flops_per_state(config) * config.num_states / config.window
    return flops


def head_flops(config: ModelConfig) -> float:
    """Of the head in a forward pass, per token."""
    return 2 * config.dim * config.vocab_size


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
