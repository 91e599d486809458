"""Cross-entropy of a linear classifier without its logits in memory.

Dimension key
  T  tokens (any leading dimensions, flattened)    D  model width    V  vocabulary    R  rows of one chunk
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
CHUNK = 1024


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, divisor: float, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits = hidden @ weight.T / divisor, in chunks of `chunk` tokens.

    targets_T: int64, -100 where nothing is predicted. Returns the sum in nats, a float32 scalar through which gradients
    flow, and nats_T, the float32 losses of the single tokens (0 where nothing is predicted) as constants.
    No more than chunk x V logits exist at a time; the gradients are computed beside the loss, so backward is free.
    """
    if not torch.is_grad_enabled():
        # An autograd function is asked for gradients by its inputs alone; an evaluation must not pay for them.
        hidden_TD, weight_VD = hidden_TD.detach(), weight_VD.detach()
    return _LinearCrossEntropy.apply(hidden_TD, weight_VD, targets_T, divisor, chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, divisor: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        with_gradients = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        nats_T = torch.empty(targets_T.shape, dtype=wide, device=hidden_TD.device)
        d_hidden_TD = torch.empty_like(hidden_TD) if with_gradients else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if with_gradients else None
        for first in range(0, len(targets_T), chunk):
            rows = slice(first, first + chunk)
            d_hidden_RD = None if d_hidden_TD is None else d_hidden_TD[rows]
            nats_T[rows] = _nats_of_chunk(
                hidden_TD[rows], weight_VD, targets_T[rows], divisor, d_hidden_RD, d_weight_VD
            )
        if d_weight_VD is not None:
            ctx.save_for_backward(d_hidden_TD, d_weight_VD.to(weight_VD.dtype))
        ctx.mark_non_differentiable(nats_T)
        return nats_T.sum(), nats_T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden_TD, d_weight_VD = ctx.saved_tensors
        return (
            scaled(d_hidden_TD, gradients[0]),
            scaled(d_weight_VD, gradients[0]),
            None,
            None,
            None,
        )


def _nats_of_chunk(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    divisor: float,
    d_hidden_RD: Tensor | None,
    d_weight_VD: Tensor | None,
) -> Tensor:
    """nats_R. The chunk's gradients are written to `d_hidden_RD` and added to `d_weight_VD`, unless these are None.

    A function, because the logits of a chunk must be gone before those of the next one are computed.
    """
    wide = torch.promote_types(hidden_RD.dtype, torch.float32)
    logits_RV = (hidden_RD @ weight_VD.T).to(wide) / divisor
    nats_R = F.cross_entropy(logits_RV, targets_R, ignore_index=IGNORED, reduction="none")
    if d_hidden_RD is None or d_weight_VD is None:
        return nats_R
    predicted_R = targets_R != IGNORED
    d_logits_RV = logits_RV.softmax(dim=-1)
    del logits_RV
    d_logits_RV[torch.arange(len(targets_R), device=targets_R.device), targets_R.clamp(min=0)] -= 1
    d_logits_RV *= predicted_R[:, None]
    d_logits_RV /= divisor
    d_logits_RV = d_logits_RV.to(hidden_RD.dtype)
    d_hidden_RD.copy_(d_logits_RV @ weight_VD)
    d_weight_VD += d_logits_RV.T @ hidden_RD
    return nats_R


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Their product in the gradient's dtype; the factor itself is not rounded to it, or all gradients would be off."""
    return (gradient * factor.expand(gradient.shape)).to(gradient.dtype)
