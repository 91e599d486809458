"""How token self-attention knows distances: T5's relative bias, or rotary angles.

Dimension key
  B  lanes    L  tokens    W  window    H  heads    K  head width
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

BUCKETS = 32
MAX_DISTANCE = 128


def bucket_distances(distances: Tensor) -> Tensor:
    """T5's bucket of each distance >= 0: exact below 16, then logarithmic up to 128, the last one beyond.

    Raffel et al. 2020, causal form, 32 buckets.
    """
    exact = BUCKETS // 2
    # float32 and the epsilon are part of the definition: they decide on which side of a border a distance falls.
    ratio = distances.to(torch.float32) / exact + torch.finfo(torch.float32).eps
    steps = torch.log(ratio) / math.log(MAX_DISTANCE / exact) * (BUCKETS - exact)
    logarithmic = (exact + steps.to(torch.int64)).clamp(max=BUCKETS - 1)
    return torch.where(distances < exact, distances, logarithmic)


class RelativeBias(nn.Module):
    """T5 relative position bias: one learned number per head and bucket."""

    def __init__(self, num_heads: int, window: int):
        super().__init__()
        self.window = window
        self.table = nn.Parameter(torch.zeros(num_heads, BUCKETS))

    def forward(self) -> Tensor:
        """bias_HW; column w is the bias at distance w + 1."""
        distances_W = torch.arange(1, self.window + 1, device=self.table.device)
        return self.table[:, bucket_distances(distances_W)]


def rotate(vectors_BLHK: Tensor, first: int) -> Tensor:
    """Rotary positions (Su et al. 2021) for tokens `first`, `first` + 1, ... of a segment; may be negative.

    Channel k turns together with channel k + K/2 by position / 10000^(2k/K). Angles are float32 at least.
    """
    length, half = vectors_BLHK.shape[1], vectors_BLHK.shape[-1] // 2
    device = vectors_BLHK.device
    dtype = torch.promote_types(vectors_BLHK.dtype, torch.float32)
    rates_k = 10000.0 ** (-torch.arange(half, device=device, dtype=dtype) / half)
    angles_Lk = torch.arange(first, first + length, device=device, dtype=dtype)[:, None] * rates_k
    cos_L1k, sin_L1k = angles_Lk.cos()[:, None], angles_Lk.sin()[:, None]
    left, right = vectors_BLHK.to(dtype).chunk(2, dim=-1)
    turned = torch.cat([left * cos_L1k - right * sin_L1k, right * cos_L1k + left * sin_L1k], dim=-1)
    return turned.to(vectors_BLHK.dtype)
