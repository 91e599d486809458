"""The model: embedding, layers, and a head tied to the embedding. It knows no ranks, and its carry is a value.

Dimension key
  B  lanes    L  tokens in a segment    C  blocks in a segment    D  model width    V  vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from brt_dist.model.carry import Carry
from brt_dist.model.config import ModelConfig
from brt_dist.model.feedback import run_with_feedback
from brt_dist.model.head import Head
from brt_dist.model.initialization import initialize
from brt_dist.model.inputs import check_carry, check_starts, check_targets, check_tokens
from brt_dist.model.recurrent_layer import RecurrentLayer
from brt_dist.model.transformer_layer import EPSILON, SharedDropout, TransformerLayer


class BlockRecurrentTransformer(nn.Module):
    """A decoder whose recurrent layers carry a state from block to block, segment to segment, step to step.

        logits, carry = model(tokens, carry=None, starts=None)

    logits   [B, L, V]
    tokens   [B, L], int64; L is a multiple of the window
    carry    what the previous call returned, detached; None: every lane starts at block 0
    starts   [B, C], bool; True where a document begins in front of block c: the lane forgets state and cache

    Its weights are float32 whatever the configuration's dtype, which is what training computes in.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        # Drawn before anything else is, so that it does not depend on how many values torch's modules draw themselves.
        seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(make_layer(config, index) for index in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.dim, eps=EPSILON)
        self.dropout = SharedDropout(config.dropout)
        self.head = Head(config)
        # Of the cache: all of them, or the share of a model that was cut by heads.
        self.cached_heads = config.num_heads
        initialize(self, seed)

    def forward(self, tokens: Tensor, carry: Carry | None = None, starts: Tensor | None = None) -> tuple[Tensor, Carry]:
        """logits_BLV in the dtype of the weights, and the detached carry for the next segment.

        ValueError, of one line, where inputs don't fit the model or each other.
        """
        hidden_BLD, carry = self.hidden(tokens, carry, starts)
        return self.head.logits(hidden_BLD, self.head.rows(self.embedding)), carry

    def loss(
        self, tokens: Tensor, targets: Tensor, carry: Carry | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Carry]:
        """Sum of the predicted tokens' losses in nats, nats_BL of each as constants, and the carry.

        targets: [B, L], int64, -100 where nothing is predicted. The full logits never exist (see `loss.py`).
        """
        check_targets(targets, tokens, self.config.vocab_size)
        hidden_BLD, carry = self.hidden(tokens, carry, starts)
        nats, nats_BL = self.head.loss(hidden_BLD, self.head.rows(self.embedding), targets)
        return nats, nats_BL, carry

    @torch.no_grad()
    def token_losses(
        self, tokens: Tensor, targets: Tensor, carry: Carry | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, Carry]:
        """nats_BL of each token, float32, 0 where nothing is predicted, without gradients; and the carry."""
        _, nats_BL, carry = self.loss(tokens, targets, carry, starts)
        return nats_BL, carry

    def forget_state(self, carry: Carry) -> Carry:
        """`carry` with every state as at the start of a document; the caches stay."""
        layers = zip(self.layers, carry.layers, strict=True)
        return Carry(tuple(cast(Any, layer).forget(layer_carry) for layer, layer_carry in layers)).detach()

    def hidden(self, tokens_BL: Tensor, carry: Carry | None, starts_BC: Tensor | None) -> tuple[Tensor, Carry]:
        """hidden_BLD behind the last norm, and the detached carry. ValueError, of one line, where inputs don't fit."""
        device, dtype = self.embedding.weight.device, self.cache_dtype()
        check_tokens(tokens_BL, self.config.vocab_size, device)
        lanes, length = tokens_BL.shape
        if length == 0 or length % self.config.window:
            raise ValueError(
                f"a segment of {length} tokens is not a positive multiple of the window, {self.config.window}"
            )
        blocks = length // self.config.window
        if starts_BC is None:
            starts_BC = torch.zeros(lanes, blocks, dtype=torch.bool, device=device)
        check_starts(starts_BC, lanes, blocks, device)
        if carry is None:
            carry = Carry.fresh(self.config, lanes, device, dtype, heads=self.cached_heads)
            starts_BC = starts_BC.clone()
            starts_BC[:, 0] = True
        check_carry(carry, self.config, lanes, device, dtype, self.cached_heads)
        run = run_with_feedback if self.config.feedback else run_layers
        x_BLD, carry = run(list(self.layers), self.embedding(tokens_BL), carry, starts_BC)
        return self.dropout(self.final_norm(x_BLD)), carry.detach()

    def cache_dtype(self) -> torch.dtype:
        """Of keys and values: that of the weights, but for torch's autocast, which computes float32 ones in its own."""
        weight = self.embedding.weight
        kind = weight.device.type
        if weight.dtype == torch.float32 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return weight.dtype


def make_layer(config: ModelConfig, index: int) -> RecurrentLayer | TransformerLayer:
    """The layer with that number, counted from 0."""
    if index in config.recurrent_layers:
        return RecurrentLayer(config)
    return TransformerLayer(config, reads_state=config.feedback)


def run_layers(layers: Sequence[nn.Module], x_BLD: Tensor, carry: Carry, starts_BC: Tensor) -> tuple[Tensor, Carry]:
    """One layer after the other, each over the whole segment: its output, and the carry, not detached."""
    carries = []
    for layer, layer_carry in zip(layers, carry.layers, strict=True):
        x_BLD, layer_carry = cast(Any, layer).recompute.layer(layer, x_BLD, layer_carry, starts_BC)
        carries.append(layer_carry)
    return x_BLD, Carry(tuple(carries))
