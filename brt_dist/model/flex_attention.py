"""Compiled FlexAttention: the rung of `window_attention` for CUDA with a T5 bias, and for float32 there.

Dimension key
  E  pieces    W  window    X  keys of a piece = 2W    H  heads    K  head width
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

_LEAST_CAPABILITY = (7, 5)  # of the GPUs that Triton compiles for
_SMALLEST_HEAD = 16  # of Triton's matrix product


def attend_with_flex(
    queries_EWHK: Tensor, keys_EXHK: Tensor, values_EXHK: Tensor, scale_H: Tensor, bias_HW: Tensor | None
) -> Tensor:
    """out_EWHK; gradients reach the bias too. CUDA only: on CPU FlexAttention has no backward pass."""
    window = queries_EWHK.shape[1]
    score_mod = None
    if bias_HW is not None:
        # float32 at least, as the scores it is added to: rounding a bias of 10 to bfloat16 moves a weight by 3 %.
        wide = torch.promote_types(queries_EWHK.dtype, torch.float32)
        table_HW = (bias_HW.to(wide) * scale_H.to(wide)[:, None]).contiguous()

        def score_mod(score: Tensor, piece: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            # Clamped because masked pairs are looked up as well.
            return score + table_HW[head, (window + query - key - 1).clamp(0, window - 1)]

    out_EHWK = _compiled_flex()(
        (queries_EWHK * scale_H.to(queries_EWHK.dtype)[:, None]).transpose(1, 2),
        keys_EXHK.transpose(1, 2),
        values_EXHK.transpose(1, 2),
        score_mod=score_mod,
        block_mask=_window_mask(window, queries_EWHK.device),
        scale=1.0,
    )
    return out_EHWK.transpose(1, 2)


@functools.cache
def flex_is_usable(device: torch.device, head_dim: int) -> bool:
    """Whether FlexAttention can be compiled for this CUDA device and head: Triton is installed and knows the GPU."""
    return (
        importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
        and head_dim >= _SMALLEST_HEAD
    )


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@functools.lru_cache(maxsize=8)
def _window_mask(window: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(piece: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= query) & (key < query + window)

    # The mask is kept: made first in an evaluation, it must not be a tensor that training cannot save for backward.
    with torch.inference_mode(False):
        return create_block_mask(sees, None, None, window, 2 * window, device=str(device))
