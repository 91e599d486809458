"""Consecutive layers of a model: what one process of a pipeline holds, or all of them where there is no pipeline.

Dimension key
  B  lanes    L  tokens in a segment    C  blocks in a segment    D  model width
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from brt_dist.model.carry import Carry
from brt_dist.model.config import ModelConfig
from brt_dist.model.feedback import run_with_feedback
from brt_dist.model.head import Head
from brt_dist.model.recurrent_layer import RecurrentLayer
from brt_dist.model.transformer import make_layer, run_layers
from brt_dist.model.transformer_layer import EPSILON, MASKS_PER_LAYER, SharedDropout, TransformerLayer


class Stage(nn.Module):
    """The layers `numbers` of a model, with the embedding in front of the first and the head behind the last.

    Its parameters have the names that they have in the whole model. With a head tied to the embedding the first and
    the last stage both hold it.

    seed   of this step's masks of dropout, which are the same on every stage as in the whole model
    """

    def __init__(self, config: ModelConfig, numbers: range):
        super().__init__()
        self.config, self.numbers = config, numbers
        self.is_first, self.is_last = numbers.start == 0, numbers.stop == config.num_layers
        has_embedding = self.is_first or (self.is_last and config.tie_embeddings)
        self.embedding = nn.Embedding(config.vocab_size, config.dim) if has_embedding else None
        self.layers = nn.ModuleDict({str(number): make_layer(config, number) for number in numbers})
        if self.is_last:
            self.final_norm = nn.RMSNorm(config.dim, eps=EPSILON)
            self.dropout = SharedDropout(config.dropout)
            self.head = Head(config)
        # Of the cache: all of them, or the share of a model that was cut by heads.
        self.cached_heads = config.num_heads
        self.seed = 0

    def forward(
        self, inputs: Tensor, carry: Carry, starts_BC: Tensor, targets_BL: Tensor | None = None
    ) -> tuple[Any, Carry]:
        """What the next stage reads, or with `targets_BL` on the last stage the sum of nats and nats_BL; and the carry.

        inputs: tokens_BL on the first stage, the previous stage's x_BLD on others. The carry is not detached.
        """
        self._draw_masks_of_earlier_layers()
        x_BLD = self.embedding(inputs) if self.embedding is not None and self.is_first else inputs
        run = run_with_feedback if self.config.feedback else run_layers
        x_BLD, carry = run(list(self.layers.values()), x_BLD, carry, starts_BC)
        if self.is_last and targets_BL is not None:
            return self.loss(x_BLD, targets_BL), carry
        return x_BLD, carry

    def loss(self, x_BLD: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the predicted tokens' losses in nats, and nats_BL of each as constants. Only on the last stage."""
        hidden_BLD = self.dropout(self.final_norm(x_BLD))
        return self.head.loss(hidden_BLD, self.head.rows(self.embedding), targets_BL)

    def fresh_carry(self, lanes: int, device: torch.device, dtype: torch.dtype) -> Carry:
        """The carry of these layers in front of the first document."""
        return Carry.fresh(self.config, lanes, device, dtype, self.numbers, self.cached_heads)

    def layers_by_number(self) -> dict[int, TransformerLayer | RecurrentLayer]:
        """The layers by their numbers in the whole model."""
        return {int(number): cast(Any, layer) for number, layer in self.layers.items()}

    def _draw_masks_of_earlier_layers(self) -> None:
        if self.training and self.config.dropout > 0:
            torch.manual_seed(self.seed)
            device = next(self.parameters()).device
            for _ in range(MASKS_PER_LAYER * self.numbers.start):
                torch.rand(self.config.dim, device=device)
