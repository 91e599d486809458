"""What one forward pass of a data rank works on, on its device.

Dimension key
  B  lanes    L  tokens in a segment    C  blocks in a segment
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brt_dist.data.loader import Batch


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Tokens, targets and starts of some lanes, and where their carry is.

    slot    int64, [1]
    scale   what the sum of nats is multiplied with to give the loss; float32, a scalar
    """

    tokens_BL: Tensor
    targets_BL: Tensor
    starts_BC: Tensor
    slot: Tensor
    scale: Tensor


def predicted_tokens(batches: Sequence[Batch]) -> int:
    """Tokens that a step with these micro-batches predicts, over all lanes; each batch knows those of its position."""
    return sum({batch.position: batch.predicted for batch in batches}.values())


def micro_batch(batch: Batch, slot: int, scale: float, device: torch.device) -> MicroBatch:
    """The batch on `device`. At the beginning of a run every lane starts, as without a carry."""
    starts_BC = batch.starts_BC
    if batch.position == 0:
        starts_BC = starts_BC.clone()
        starts_BC[:, 0] = True
    tokens_BL, targets_BL, starts_BC = (
        tensor.to(device, non_blocking=True) for tensor in (batch.tokens_BL, batch.targets_BL, starts_BC)
    )
    return MicroBatch(
        tokens_BL, targets_BL, starts_BC, torch.tensor([slot], device=device), torch.tensor(scale, device=device)
    )
