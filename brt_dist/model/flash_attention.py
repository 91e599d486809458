"""FlashAttention with a window, inside torch: the rung of `window_attention` for CUDA without a bias.

Every piece is one sequence of W queries and 2W - 1 keys. FlashAttention's windows end at the query itself and are
aligned to the last key; with the piece's last key dropped, the window (W - 1, 0) is exactly the W tokens before it.

Dimension key
  E  pieces    W  window    X  keys of a piece = 2W    H  heads    K  head width    T  rows of all pieces
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

_LEAST_CAPABILITY = (8, 0)  # Ampere
_LARGEST_HEAD = 256


def attend_with_flash(
    queries_EWHK: Tensor, keys_EXHK: Tensor, values_EXHK: Tensor, scale_H: Tensor, bias_HW: Tensor | None
) -> Tensor:
    """out_EWHK for bfloat16 or float16 pieces on CUDA; ValueError with a bias, which FlashAttention doesn't take."""
    if bias_HW is not None:
        raise ValueError("FlashAttention takes no position bias")
    pieces, window = queries_EWHK.shape[:2]
    keys = 2 * window - 1
    device = queries_EWHK.device
    query_ends = torch.arange(pieces + 1, device=device, dtype=torch.int32) * window
    key_ends = torch.arange(pieces + 1, device=device, dtype=torch.int32) * keys
    attend = _varlen_with_window if _varlen_offers_window() else _FlashOps.apply
    out_THK = attend(
        (queries_EWHK * scale_H.to(queries_EWHK.dtype)[:, None]).flatten(0, 1),
        keys_EXHK[:, :-1].flatten(0, 1),
        values_EXHK[:, :-1].flatten(0, 1),
        query_ends,
        key_ends,
        window,
        keys,
    )
    return out_THK.unflatten(0, (pieces, window))


def flash_is_usable(device: torch.device, head_dim: int) -> bool:
    """Whether this torch has a FlashAttention that takes a window, by either name, for this CUDA device and head."""
    return (
        (_varlen_offers_window() or _ops_offer_window())
        and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
        and head_dim % 8 == 0
        and head_dim <= _LARGEST_HEAD
    )


@functools.cache
def _varlen_offers_window() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "window_size" in inspect.signature(varlen_attn).parameters


@functools.cache
def _ops_offer_window() -> bool:
    forward = getattr(torch.ops.aten, "_flash_attention_forward", None)
    return forward is not None and "window_size_left" in {a.name for a in forward.default._schema.arguments}


def _varlen_with_window(
    queries_THK: Tensor,
    keys_THK: Tensor,
    values_THK: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    window: int,
    keys: int,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out_THK = varlen_attn(
        queries_THK, keys_THK, values_THK, query_ends, key_ends, window, keys, scale=1.0, window_size=(window - 1, 0)
    )
    assert isinstance(out_THK, Tensor)
    return out_THK


class _FlashOps(torch.autograd.Function):
    """The same through the operators beneath, for a torch whose `varlen_attn` has no window yet."""

    @staticmethod
    def forward(
        ctx: Any,
        queries_THK: Tensor,
        keys_THK: Tensor,
        values_THK: Tensor,
        query_ends: Tensor,
        key_ends: Tensor,
        window: int,
        keys: int,
    ) -> Tensor:
        out_THK, logsumexp, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(
            queries_THK,
            keys_THK,
            values_THK,
            query_ends,
            key_ends,
            window,
            keys,
            0.0,
            False,
            False,
            scale=1.0,
            window_size_left=window - 1,
            window_size_right=0,
        )
        ctx.save_for_backward(
            queries_THK, keys_THK, values_THK, query_ends, key_ends, out_THK, logsumexp, rng_state, unused
        )
        ctx.sizes = window, keys
        return out_THK

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, query_ends, key_ends, out, logsumexp, rng_state, unused = ctx.saved_tensors
        window, key_count = ctx.sizes
        d_queries, d_keys, d_values = torch.ops.aten._flash_attention_backward(
            gradients[0].contiguous(),
            queries,
            keys,
            values,
            out,
            logsumexp,
            query_ends,
            key_ends,
            window,
            key_count,
            0.0,
            False,
            rng_state,
            unused,
            scale=1.0,
            window_size_left=window - 1,
            window_size_right=0,
        )
        return d_queries, d_keys, d_values, None, None, None, None
