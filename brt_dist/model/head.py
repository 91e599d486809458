"""The classifier over the vocabulary: logits and losses of hidden vectors.

Dimension key
  B  lanes    L  tokens in a segment    D  model width    V  vocabulary
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brt_dist.model.config import ModelConfig
from brt_dist.model.loss import linear_cross_entropy


class Head(nn.Module):
    """One row of width D for each entry of the vocabulary: the embedding's (paper), or a matrix of its own."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.divisor = config.logit_divisor
        own_VD = None if config.tie_embeddings else nn.Parameter(torch.zeros(config.vocab_size, config.dim))
        self.register_parameter("weight", own_VD)

    def rows(self, embedding: nn.Module | None) -> Tensor:
        """rows_VD, for the two functions below. embedding: the model's; needed where the rows are its."""
        holder = embedding if self.weight is None else self
        assert holder is not None
        return cast(Tensor, holder.weight)

    def logits(self, hidden_BLD: Tensor, rows_VD: Tensor) -> Tensor:
        """logits_BLV."""
        return F.linear(hidden_BLD, rows_VD) / self.divisor

    def loss(self, hidden_BLD: Tensor, rows_VD: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the losses in nats, and nats_BL of each token as constants; 0 where the target is -100."""
        nats, nats_T = linear_cross_entropy(
            hidden_BLD.flatten(0, 1), rows_VD, targets_BL.flatten().long(), self.divisor
        )
        return nats, nats_T.view_as(targets_BL)
