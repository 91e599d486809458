"""One body for the tests of every attention rung, on whatever device: values and all gradients against the twin.

Dimension key
  B  lanes    L  tokens    C  blocks    W  window    H  heads    K  head width    X  keys of a piece = 2W    T  rows
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from brt_dist.model.window_attention import pair_blocks, window_attention

LANES, BLOCKS, HEADS = 2, 4, 2

# Largest error relative to the largest entry. The gradients of scale and bias are sums of many terms that nearly
# cancel, so that the rounding of the terms shows more.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (2e-5, 2e-4),
    torch.float16: (4e-3, 2e-2),
    torch.bfloat16: (2e-2, 8e-2),
}


@dataclass(frozen=True)
class AttentionCase:
    """Sizes of an attention over two lanes of four blocks, with a start in front of each lane's other half."""

    window: int
    head_dim: int
    with_bias: bool
    dtype: torch.dtype

    def leaves(self, device: str | torch.device) -> dict[str, Tensor]:
        """Inputs that want gradients: queries and keys of unit length, as in the model."""
        generator = torch.Generator().manual_seed(self.window + self.head_dim)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        tokens = (LANES, BLOCKS * self.window, HEADS, self.head_dim)
        cache = (LANES, self.window, HEADS, self.head_dim)
        drawn = {
            "queries": draw(*tokens),
            "keys": draw(*tokens),
            "values": draw(*tokens),
            "cached_keys": draw(*cache),
            "cached_values": draw(*cache),
            "scale": 2 + draw(HEADS).abs(),
        }
        for name in ("queries", "keys", "cached_keys"):
            drawn[name] = drawn[name] / drawn[name].norm(dim=-1, keepdim=True)
        if self.with_bias:
            drawn["bias"] = draw(HEADS, self.window) / 2
        return {name: value.to(self.dtype).to(device).requires_grad_() for name, value in drawn.items()}

    def starts(self, device: str | torch.device) -> Tensor:
        """Lane 0 starts inside the segment, lane 1 at its beginning and inside."""
        starts_BC = torch.zeros(LANES, BLOCKS, dtype=torch.bool, device=device)
        starts_BC[0, 2] = starts_BC[1, 0] = starts_BC[1, 3] = True
        return starts_BC


def attend(rung: str, leaves: dict[str, Tensor], starts_BC: Tensor) -> Tensor:
    """out_BLHK by a rung."""
    return window_attention(
        leaves["queries"],
        pair_blocks(leaves["keys"], leaves["cached_keys"], starts_BC),
        pair_blocks(leaves["values"], leaves["cached_values"], starts_BC),
        leaves["scale"],
        leaves.get("bias"),
        rung,
    )


def attend_naively(leaves: dict[str, Tensor], starts_BC: Tensor) -> Tensor:
    """out_BLHK by one softmax over all cached and current tokens, N x (W + N) scores, from the definition alone.

    A document's start does not hide what lies before it: it turns it into zeros, which take softmax mass.
    """
    keys = torch.cat([leaves["cached_keys"], leaves["keys"]], dim=1)
    values = torch.cat([leaves["cached_values"], leaves["values"]], dim=1)
    length, window = leaves["queries"].shape[1], leaves["cached_keys"].shape[1]
    query_L1 = torch.arange(length)[:, None]
    key_M = torch.arange(-window, length)
    distance_LM = query_L1 - key_M
    first_of_block_L1 = query_L1 // window * window
    erased_BLM = starts_BC[:, query_L1[:, 0] // window, None] & (key_M < first_of_block_L1)
    scores = torch.einsum("blhk,bmhk->bhlm", leaves["queries"], keys)
    scores = scores.masked_fill(erased_BLM[:, None], 0.0)
    if "bias" in leaves:
        scores = scores + leaves["bias"][:, (distance_LM - 1).clamp(0, window - 1)]
    scores = scores * leaves["scale"][:, None, None]
    hidden_LM = (distance_LM < 1) | (distance_LM > window)
    weights = scores.masked_fill(hidden_LM, -torch.inf).softmax(-1).masked_fill(erased_BLM[:, None], 0.0)
    return torch.einsum("bhlm,bmhk->blhk", weights, values)


def gradients(out: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a fixed random combination of the outputs, by name."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = torch.autograd.grad(out, list(leaves.values()), weights.to(out.dtype).to(out.device))
    return dict(zip(leaves, found, strict=True))


def assert_rung_is_the_twin(rung: str, case: AttentionCase, device: str = "cpu", backward: bool = True) -> None:
    """The rung's output and gradients are those of the twin in float64 on the same (rounded) inputs."""
    leaves = case.leaves(device)
    exact = {name: value.detach().cpu().double().requires_grad_() for name, value in leaves.items()}
    expected = attend("explicit", exact, case.starts("cpu"))
    tight, loose = TOLERANCES[case.dtype]
    if backward:
        out = attend(rung, leaves, case.starts(device))
        expected_gradients = gradients(expected, exact)
        for name, gradient in gradients(out, leaves).items():
            assert gradient.dtype == leaves[name].dtype
            limit = loose if name in ("scale", "bias") else tight
            assert_near(gradient, expected_gradients[name], limit, f"gradient of {name}")
    else:
        with torch.no_grad():
            out = attend(rung, leaves, case.starts(device))
    assert out.dtype == case.dtype
    assert_near(out, expected, tight, "output")


def assert_near(ours: Tensor, expected: Tensor, limit: float, what: str) -> None:
    """No entry is further off than `limit` times the largest expected entry; NaN is."""
    assert ours.shape == expected.shape
    difference = (ours.detach().cpu().double() - expected.detach().cpu().double()).abs().max().item()
    largest = expected.detach().abs().max().item()
    assert difference <= limit * largest, f"{what}: {difference:.2e} off, largest {largest:.2e}"


def emulate_varlen(
    queries_THK: Tensor,
    keys_THK: Tensor,
    values_THK: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    longest_query: int,
    longest_keys: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    **unused: Any,
) -> Tensor:
    """FlashAttention over sequences of unequal length, densely: windows are aligned to the last query and the last key.

    Query i of Q sees the keys j of M with i + M - Q - left <= j <= i + M - Q + right; -1 is no limit.
    """
    left, right = window_size
    scale = queries_THK.shape[-1] ** -0.5 if scale is None else scale
    outs = []
    for piece in range(len(query_ends) - 1):
        queries = queries_THK[int(query_ends[piece]) : int(query_ends[piece + 1])]
        keys = keys_THK[int(key_ends[piece]) : int(key_ends[piece + 1])]
        values = values_THK[int(key_ends[piece]) : int(key_ends[piece + 1])]
        assert len(queries) <= longest_query
        assert len(keys) <= longest_keys
        offset_QM = torch.arange(len(keys)) - torch.arange(len(queries))[:, None] - (len(keys) - len(queries))
        seen_QM = torch.ones_like(offset_QM, dtype=torch.bool)
        if left >= 0:
            seen_QM &= offset_QM >= -left
        if right >= 0:
            seen_QM &= offset_QM <= right
        scores = torch.einsum("qhk,mhk->hqm", queries, keys).to(torch.promote_types(keys.dtype, torch.float32)) * scale
        weights = scores.masked_fill(~seen_QM, -torch.inf).softmax(-1).to(values.dtype)
        outs.append(torch.einsum("hqm,mhk->qhk", weights, values))
    return torch.cat(outs)
