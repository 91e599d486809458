"""The one table of tensor parallelism: which dimension of which tensor is cut, into which slices, and back again.

It cuts the parameters of the plain model, their moments, and the cache of a carry; whatever it does not name is held
whole by every rank: norms, gate biases, state ids, initial states, and the state itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor

from brt_dist.model.config import ModelConfig


@dataclass(frozen=True)
class Cut:
    """A tensor is cut along `dim`. Several `parts` lie one behind the other there, and each is cut by itself.

    Rank r of t holds slice r of each part: a fused projection gives it its heads of the queries, of the keys and of the
    values; the output matrix of two attentions its heads of the one and of the other.
    """

    dim: int
    parts: int = 1


def cuts(config: ModelConfig) -> dict[str, Cut]:
    """By pattern of the name; the first that fits counts. In comments what a rank then holds."""
    recurrent_output = Cut(1, parts=2)
    return {
        "embedding.weight": Cut(0),  # entries of the vocabulary
        "head.weight": Cut(0),
        "layers.*.cell.projection.weight": Cut(0, parts=4),  # heads: self queries, token queries, keys, values
        **{f"layers.{index}.tokens.projection.weight": Cut(0, parts=4) for index in config.recurrent_layers},
        **{f"layers.{index}.tokens.attention_output.weight": recurrent_output for index in config.recurrent_layers},
        "layers.*.projection.weight": Cut(0, parts=4 if config.feedback else 3),  # heads: queries, keys, values
        "layers.*.attention_output.weight": Cut(1, parts=2 if config.feedback else 1),  # heads: tokens, states
        "layers.*.mlp.input.weight": Cut(0),  # channels of the MLP
        "layers.*.mlp.output.weight": Cut(1),
        "layers.*.update.mlp_input.weight": Cut(0),
        "layers.*.update.mlp_gate.*.weight": Cut(1),
        # A gate's matrices read heads (skip, dual) or channels of the MLP (single); the LSTM's three lie row under row.
        "layers.*.update.gate.*.weight": Cut(1) if config.cell == "single" else Cut(1, parts=2),
        "layers.*scale_H": Cut(0),
        "layers.*.bias.table": Cut(0),
        "layers.*.keys": Cut(2),  # of a carry
        "layers.*.values": Cut(2),
    }


def cut_of(name: str, table: Mapping[str, Cut]) -> Cut | None:
    """How the tensor `name` is cut; None: every rank holds all of it. Moments go like their parameter."""
    plain = name.partition("/")[0]
    return next((cut for pattern, cut in table.items() if fnmatch(plain, pattern)), None)


def share(whole: Tensor, cut: Cut | None, rank: int, ranks: int) -> Tensor:
    """What `rank` of `ranks` holds of a tensor; a copy where it is cut."""
    if cut is None or ranks == 1:
        return whole
    return torch.cat([part.chunk(ranks, cut.dim)[rank] for part in whole.chunk(cut.parts, cut.dim)], cut.dim)


def merge(shares: Sequence[Tensor], cut: Cut | None) -> Tensor:
    """The tensor of which each rank, in order, holds one of `shares`."""
    if cut is None or len(shares) == 1:
        return shares[0]
    parts = zip(*(held.chunk(cut.parts, cut.dim) for held in shares), strict=True)
    return torch.cat([slice_ for part in parts for slice_ in part], cut.dim)


def share_shape(whole: torch.Size, cut: Cut | None, ranks: int) -> torch.Size:
    """The shape of a share."""
    if cut is None:
        return whole
    return torch.Size(size // ranks if dim == cut.dim else size for dim, size in enumerate(whole))
