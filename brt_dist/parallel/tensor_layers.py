"""The layers that tensor ranks share, made of megatron-core's: same calls and names as the plain ones.

Between them tokens stand whole on every rank or, with sequence parallelism, are shared too: each rank then holds its
share l = L / ranks of a segment, which is gathered where columns begin and scattered where rows end. States are never
shared by tokens.

Dimension key
  B  lanes    L  tokens in a segment    l  this rank's share of them    D  model width    S  state vectors
  V  vocabulary    v  this rank's share of it    T  tokens, flattened    R  rows of one chunk
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    all_gather_last_dim_from_tensor_parallel_region,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from torch import Tensor, nn

from brt_dist.model.head import Head
from brt_dist.model.loss import CHUNK, IGNORED, scaled
from brt_dist.model.stacked_linear import StackedLinear
from brt_dist.model.transformer_layer import EPSILON
from brt_dist.parallel.tensor_parallel import Cut


@dataclass(frozen=True)
class Sharing:
    """Who shares a layer, and whether its tokens are shared too.

    ranks, group   the tensor ranks
    sequence       the layer's inputs and outputs hold this rank's share of the tokens
    """

    ranks: int
    group: Any
    sequence: bool

    def megatron(self) -> ModelParallelConfig:
        """In megatron-core's words. Weights get their values elsewhere, by name."""
        return ModelParallelConfig(
            tensor_model_parallel_size=self.ranks,
            sequence_parallel=self.sequence,
            use_cpu_initialization=True,
            perform_initialization=False,
        )


def prepare_megatron() -> None:
    """What megatron-core needs beside groups: its buffer for gathered activations, and on CPU a current device."""
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]


def _no_values(_: Tensor) -> None:
    """Weights get theirs elsewhere."""


class ColumnShare(ColumnParallelLinear):
    """This rank's rows of a matrix: all inputs, its share of the outputs. `parts` of them come as a tuple."""

    def __init__(self, inputs: int, outputs: int, sharing: Sharing, parts: int | None = None, reduce: bool = True):
        super().__init__(
            inputs,
            outputs,
            config=sharing.megatron(),
            init_method=_no_values,
            bias=False,
            tp_group=sharing.group,
            disable_grad_reduce=not reduce,
        )
        self.parts = parts

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        """[B, L, outputs / ranks], of tokens [B, l, D] or [B, L, D]; or a tuple of its parts."""
        out = by_tokens(super().forward, x) if self.sequence_parallel else super().forward(x)[0]
        return out if self.parts is None else out.chunk(self.parts, dim=-1)


class GatheredColumnShare(ColumnShare):
    """A `ColumnShare` behind a `cat` of heads, of each half of which every rank holds its share.

    Gathering what is read, two model widths, costs less than adding up the outputs of rows, an MLP's width.
    """

    def __init__(self, inputs: int, outputs: int, sharing: Sharing):
        # The gathering itself reduces the gradient in the backward pass.
        super().__init__(inputs, outputs, sharing, reduce=False)
        self.ranks = sharing.ranks

    def forward(self, read_BSr: Tensor) -> Tensor:  # type: ignore[override]
        gathered = all_gather_last_dim_from_tensor_parallel_region(read_BSr, group=self.tp_group)
        halves = gathered.unflatten(-1, (self.ranks, 2, -1)).transpose(-3, -2)
        out: Tensor = super().forward(halves.flatten(-3))
        return out


class RowShare(RowParallelLinear):
    """This rank's columns of a matrix: its share of the inputs; the outputs are added up. `parts` come as a tuple."""

    def __init__(self, inputs: int, outputs: int, sharing: Sharing, parts: int | None = None):
        super().__init__(
            inputs,
            outputs,
            config=sharing.megatron(),
            init_method=_no_values,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=sharing.group,
        )
        self.parts = parts

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        """[B, l, outputs] or [B, L, outputs], of [B, L, inputs / ranks]; or a tuple of its parts."""
        out = by_tokens(super().forward, x) if self.sequence_parallel else super().forward(x)[0]
        return out if self.parts is None else out.chunk(self.parts, dim=-1)


def shared_linear(
    plain: nn.Linear | StackedLinear, cut: Cut, sharing: Sharing, reads_cut_heads: bool
) -> ColumnShare | RowShare:
    """What takes the place of a plain product; reads_cut_heads: its input comes cut, but its columns are all there."""
    outputs, inputs = plain.weight.shape
    parts = plain.parts if isinstance(plain, StackedLinear) else None
    if reads_cut_heads:
        return GatheredColumnShare(inputs, outputs, sharing)
    return (ColumnShare if cut.dim == 0 else RowShare)(inputs, outputs, sharing, parts)


def by_tokens(forward: Any, x_BLD: Tensor) -> Tensor:
    """Megatron-core gathers and scatters the first dimension: tokens before lanes."""
    out_LBD: Tensor = forward(x_BLD.transpose(0, 1))[0]
    return out_LBD.transpose(0, 1)


class TokenShareNorm(nn.RMSNorm):
    """A norm over this rank's share of the tokens; its gain's gradient is the sum over all tokens."""

    def __init__(self, dim: int, sharing: Sharing):
        super().__init__(dim, eps=EPSILON)
        self.group = sharing.group

    def forward(self, x_BlD: Tensor) -> Tensor:
        gain_D = copy_to_tensor_model_parallel_region(self.weight, group=self.group)
        return nn.functional.rms_norm(x_BlD, gain_D.shape, gain_D, EPSILON)


class VocabularyShare(VocabParallelEmbedding):
    """This rank's rows of the embedding."""

    def __init__(self, entries: int, dim: int, sharing: Sharing):
        super().__init__(
            entries,
            dim,
            init_method=_no_values,
            reduce_scatter_embeddings=sharing.sequence,
            config=sharing.megatron(),
            tp_group=sharing.group,
        )

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """x_BLD, or this rank's tokens x_BlD."""
        x: Tensor = super().forward(tokens_BL)
        return x.transpose(0, 1) if self.reduce_scatter_embeddings else x


class VocabularyShareHead(Head):
    """This rank's rows of the head: each computes its share of the logits, and all together the losses."""

    def __init__(self, plain: Head, sharing: Sharing):
        nn.Module.__init__(self)
        self.divisor, self.sharing = plain.divisor, sharing
        whole_VD = plain._parameters["weight"]
        own_vD = None if whole_VD is None else nn.Parameter(whole_VD.detach().chunk(sharing.ranks)[0].clone())
        self.register_parameter("weight", own_vD)

    def logits(self, hidden_BLD: Tensor, rows_vD: Tensor) -> Tensor:
        """logits_BLV, the same on every rank."""
        logits_BLv = super().logits(self._whole(hidden_BLD), rows_vD)
        whole: Tensor = gather_from_tensor_model_parallel_region(logits_BLv, group=self.sharing.group)
        return whole

    def loss(self, hidden_BLD: Tensor, rows_vD: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
        """As the plain head's, the same on every rank."""
        hidden_TD, targets_T = self._whole(hidden_BLD).flatten(0, 1), targets_BL.flatten().long()
        if not torch.is_grad_enabled():
            hidden_TD, rows_vD = hidden_TD.detach(), rows_vD.detach()
        nats, nats_T = _VocabularyShareLoss.apply(hidden_TD, rows_vD, targets_T, self.divisor, self.sharing.group)
        return nats, nats_T.view_as(targets_BL)

    def _whole(self, hidden: Tensor) -> Tensor:
        """All tokens; in the backward pass the ranks' gradients of them are added up."""
        if not self.sharing.sequence:
            whole: Tensor = copy_to_tensor_model_parallel_region(hidden, group=self.sharing.group)
            return whole
        hidden_LBD: Tensor = gather_from_sequence_parallel_region(
            hidden.transpose(0, 1), tensor_parallel_output_grad=True, group=self.sharing.group
        )
        return hidden_LBD.transpose(0, 1)


class _VocabularyShareLoss(torch.autograd.Function):
    """`linear_cross_entropy` where each rank holds some rows: two reductions a chunk, of three numbers a token."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, rows_vD: Tensor, targets_T: Tensor, divisor: float, group: Any
    ) -> tuple[Tensor, Tensor]:
        with_gradients = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        nats_T = torch.empty(targets_T.shape, dtype=torch.float32, device=hidden_TD.device)
        d_hidden_TD = torch.empty_like(hidden_TD) if with_gradients else None
        d_rows_vD = torch.zeros_like(rows_vD, dtype=torch.float32) if with_gradients else None
        for first in range(0, len(targets_T), CHUNK):
            chunk = slice(first, first + CHUNK)
            d_hidden_RD = None if d_hidden_TD is None else d_hidden_TD[chunk]
            nats_T[chunk] = _nats_of_chunk(
                hidden_TD[chunk], rows_vD, targets_T[chunk], divisor, group, d_hidden_RD, d_rows_vD
            )
        if d_rows_vD is not None:
            ctx.save_for_backward(d_hidden_TD, d_rows_vD.to(rows_vD.dtype))
        ctx.mark_non_differentiable(nats_T)
        return nats_T.sum(), nats_T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden_TD, d_rows_vD = ctx.saved_tensors
        return scaled(d_hidden_TD, gradients[0]), scaled(d_rows_vD, gradients[0]), None, None, None


def _nats_of_chunk(
    hidden_RD: Tensor,
    rows_vD: Tensor,
    targets_R: Tensor,
    divisor: float,
    group: Any,
    d_hidden_RD: Tensor | None,
    d_rows_vD: Tensor | None,
) -> Tensor:
    """As the plain one in `loss.py`, of this rank's rows."""
    predicted_R = (targets_R != IGNORED).float()
    logits_Rv = (hidden_RD @ rows_vD.T).float() / divisor
    first_entry = dist.get_rank(group) * len(rows_vD)
    nats_R, operands = _shared_cross_entropy(logits_Rv, targets_R.clamp(min=0), first_entry, group)
    nats_R = nats_R * predicted_R
    if d_hidden_RD is None or d_rows_vD is None:
        return nats_R
    d_logits_Rv = VocabParallelCrossEntropy.calculate_gradients(*operands, predicted_R / divisor)
    d_logits_Rv = d_logits_Rv.to(hidden_RD.dtype)
    d_hidden_RD.copy_(d_logits_Rv @ rows_vD)
    d_rows_vD += d_logits_Rv.T @ hidden_RD
    return nats_R


def _shared_cross_entropy(
    logits_Rv: Tensor, targets_R: Tensor, first_entry: int, group: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """nats_R, and what megatron-core computes the gradient of the logits from, but for that of the loss."""
    logits_Rv, largest_R = VocabParallelCrossEntropy.calculate_logits_max(logits_Rv)
    dist.all_reduce(largest_R, dist.ReduceOp.MAX, group)
    elsewhere_R, own_R, target_logit_R, sum_R, exp_Rv = VocabParallelCrossEntropy.calculate_predicted_logits(
        logits_Rv, targets_R, largest_R, first_entry, first_entry + logits_Rv.shape[-1]
    )
    sums_2R = torch.stack([target_logit_R, sum_R])
    dist.all_reduce(sums_2R, group=group)
    softmax_Rv, nats_R = VocabParallelCrossEntropy.calculate_cross_entropy_loss(exp_Rv, sums_2R[0], sums_2R[1])
    rows, indices, update, gradient = VocabParallelCrossEntropy.prepare_gradient_calculation_operands(
        softmax_Rv, elsewhere_R
    )
    return nats_R, (rows, indices, own_R, update, gradient)
