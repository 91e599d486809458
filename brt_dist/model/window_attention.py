"""Sliding-window attention of tokens to tokens: the one seam behind which kernels are chosen.

A query sees exactly the W tokens before it, never itself. A segment is cut into blocks of W: block c needs the keys of
blocks c - 1 and c alone, which `pair_blocks` lays side by side as one *piece* of 2W keys. All rungs work on pieces, so
that document starts are treated once, in front of them, and are the same for all.

Dimension key
  B  lanes    L  tokens in a segment    C  blocks in a segment    W  tokens in a block = window    H  heads
  K  head width    E  pieces = B * C    X  keys of a piece = 2W
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from brt_dist.model.flash_attention import attend_with_flash, flash_is_usable
from brt_dist.model.flex_attention import attend_with_flex, flex_is_usable


def window_attention(
    queries_BLHK: Tensor, keys_BCXHK: Tensor, values_BCXHK: Tensor, scale_H: Tensor, bias_HW: Tensor | None, rung: str
) -> Tensor:
    """Attention of every token to the W tokens before it.

    keys_BCXHK, values_BCXHK: from `pair_blocks`. scale_H multiplies the scores, bias included: (q.k + bias) * scale
    (reference; there is no 1/sqrt(K)). bias_HW: column w is added at distance w + 1. rung: from `choose_rung`.
    Returns out_BLHK in the dtype of the queries.
    """
    batch, length = queries_BLHK.shape[:2]
    window = keys_BCXHK.shape[2] // 2
    queries_EWHK = queries_BLHK.reshape(batch * length // window, window, *queries_BLHK.shape[2:])
    out_EWHK = RUNGS[rung](queries_EWHK, keys_BCXHK.flatten(0, 1), values_BCXHK.flatten(0, 1), scale_H, bias_HW)
    return out_EWHK.reshape(queries_BLHK.shape)


def pair_blocks(current_BLHK: Tensor, cache_BWHK: Tensor, starts_BC: Tensor) -> Tensor:
    """Keys (or values) of each block behind those of the block before it: pieces_BCXHK.

    Where a document starts, the previous block is zeros, which are attended, not masked: they take softmax mass
    (reference, document starts).
    """
    blocks_BCWHK = current_BLHK.unflatten(1, (-1, cache_BWHK.shape[1]))
    previous_BCWHK = torch.cat([cache_BWHK[:, None], blocks_BCWHK[:, :-1]], dim=1)
    previous_BCWHK = previous_BCWHK.masked_fill(starts_BC[:, :, None, None, None], 0)
    return torch.cat([previous_BCWHK, blocks_BCWHK], dim=2)


def choose_rung(device_type: str, dtype: torch.dtype, with_bias: bool, flash: bool, flex: bool) -> str:
    """Which kernel computes `window_attention`.

    flash: FlashAttention with a window runs here. flex: FlexAttention can be compiled here. On CPU a bias needs
    its gradient, which SDPA gives only on its slow path: the explicit softmax serves there.
    """
    if device_type != "cuda":
        return "explicit" if with_bias else "sdpa"
    if not with_bias and flash and dtype in (torch.bfloat16, torch.float16):
        return "flash"
    return "flex" if flex else "sdpa"


def rung_here(device: torch.device, dtype: torch.dtype, head_dim: int, with_bias: bool) -> str:
    """`choose_rung` for this machine, this torch and heads of this width."""
    flash = device.type == "cuda" and flash_is_usable(device, head_dim)
    flex = device.type == "cuda" and flex_is_usable(device, head_dim)
    return choose_rung(device.type, dtype, with_bias, flash, flex)


def attend_explicitly(
    queries_EWHK: Tensor, keys_EXHK: Tensor, values_EXHK: Tensor, scale_H: Tensor, bias_HW: Tensor | None
) -> Tensor:
    """The plain twin that defines the result, with the softmax in float32 at least."""
    dtype = torch.promote_types(queries_EWHK.dtype, torch.float32)
    queries_EHWK = queries_EWHK.transpose(1, 2).to(dtype)
    keys_EHKX = keys_EXHK.permute(0, 2, 3, 1).to(dtype)
    scores_EHWX = queries_EHWK @ keys_EHKX
    distance_WX = distances(queries_EWHK.shape[1], queries_EWHK.device)
    if bias_HW is not None:
        scores_EHWX = scores_EHWX + spread_bias(bias_HW, distance_WX).to(dtype)
    scores_EHWX = scores_EHWX * scale_H.to(dtype)[:, None, None]
    weights_EHWX = scores_EHWX.masked_fill(~visible(distance_WX), -torch.inf).softmax(dim=-1)
    out_EHWK = weights_EHWX @ values_EXHK.transpose(1, 2).to(dtype)
    return out_EHWK.transpose(1, 2).to(queries_EWHK.dtype)


def attend_with_sdpa(
    queries_EWHK: Tensor, keys_EXHK: Tensor, values_EXHK: Tensor, scale_H: Tensor, bias_HW: Tensor | None
) -> Tensor:
    """torch's scaled_dot_product_attention with a W x 2W mask: fast on CPU without a bias, last resort on CUDA."""
    scale_H = scale_H.to(queries_EWHK.dtype)
    distance_WX = distances(queries_EWHK.shape[1], queries_EWHK.device)
    mask = visible(distance_WX)
    if bias_HW is not None:
        bias_HWX = spread_bias(bias_HW, distance_WX).to(scale_H.dtype) * scale_H[:, None, None]
        mask = bias_HWX.masked_fill(~mask, -torch.inf)[None].expand(queries_EWHK.shape[0], -1, -1, -1)
    queries_EHWK = (queries_EWHK * scale_H[:, None]).transpose(1, 2)
    # cuDNN's kernel gives NaN gradients with some masks (torch 2.11 on H100), so it is not among the backends.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        out_EHWK = F.scaled_dot_product_attention(
            queries_EHWK, keys_EXHK.transpose(1, 2), values_EXHK.transpose(1, 2), attn_mask=mask, scale=1.0
        )
    return out_EHWK.transpose(1, 2)


def distances(window: int, device: torch.device) -> Tensor:
    """distance_WX: how many tokens key x of a piece lies before query w; negative behind it."""
    queries_W1 = torch.arange(window, 2 * window, device=device)[:, None]
    return queries_W1 - torch.arange(2 * window, device=device)


def visible(distance_WX: Tensor) -> Tensor:
    """The strict causal window: the W tokens before the query, without the query itself."""
    return (distance_WX >= 1) & (distance_WX <= distance_WX.shape[0])


def spread_bias(bias_HW: Tensor, distance_WX: Tensor) -> Tensor:
    """bias_HWX of every pair of query and key; what it holds outside the window is masked later."""
    return bias_HW[:, (distance_WX - 1).clamp(0, bias_HW.shape[1] - 1)]


def attend_all(queries_BQHK: Tensor, keys_BMHK: Tensor, values_BMHK: Tensor, scale_H: Tensor) -> Tensor:
    """Dense attention without mask or bias: tokens to states, states to states, states to tokens. out_BQHK."""
    queries_BHQK = (queries_BQHK * scale_H.to(queries_BQHK.dtype)[:, None]).transpose(1, 2)
    out_BHQK = F.scaled_dot_product_attention(
        queries_BHQK, keys_BMHK.transpose(1, 2), values_BMHK.transpose(1, 2), scale=1.0
    )
    return out_BHQK.transpose(1, 2)


Rung = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
RUNGS: dict[str, Rung] = {
    "explicit": attend_explicitly,
    "sdpa": attend_with_sdpa,
    "flash": attend_with_flash,
    "flex": attend_with_flex,
}
