"""Compressed memories (Rae et al. 2019, Compressive Transformer), in the form that `port.py` offers. Ours alone.

A block that has left the attention window is squeezed, by a learned convolution over time, into W / F vectors: keys and
values, per layer and head. Tokens attend to the last M of them with a softmax of their own, by the queries of their
self-attention, unrotated: compressed memories have no positions. The heads go through an output matrix of their own and
are added where those of the self-attention are, which equals one matrix for all heads side by side.

Tokens of block c see blocks c - 1 and c through the window, and compressed the blocks up to c - 2. Compression goes
with blocks, not with calls: however a document is cut into segments, each token sees the same. And the second block of
a segment reads what the segment has compressed itself, so that the convolution learns from the next-token loss although
memories are constants between segments; no auxiliary loss is needed.

A memory that does not exist yet is a key and a value of zeros, and gets no weight. The convolution has no bias, so
zeros stay zeros through it: a fresh cache compresses to memories that do not exist.

Dimension key
  B  lanes    L  tokens in a segment    C  blocks in a segment    W  tokens in a block = window    D  model width
  H  heads    K  head width    F  tokens that one compressed memory stands for    J  inputs of a convolution = F * K
  M  compressed memories that a lane keeps, and a block sees = W    T  M kept ones and L / F new ones, oldest first
  N  M + W / F: the kept ones, and those made of the carried cache
  G  C + 1: what each block sees, and then what the next segment's first block will see
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from brt_dist.model.carry import LayerCarry
from brt_dist.model.config import ModelConfig
from brt_dist.model.recompute import Recompute
from brt_dist.model.recurrent_layer import RecurrentLayer
from brt_dist.model.transformer_layer import Pieces, TokenViews, TransformerLayer, unit


@dataclass(frozen=True, kw_only=True)
class RememberingCarry(LayerCarry):
    """Carry of a layer with compressed memories: keys and values of the last M, oldest first; zeros: not there yet."""

    compressed_keys_BMHK: Tensor
    compressed_values_BMHK: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> RememberingCarry:
        """The carry with `change` applied to each of its tensors."""
        plain = super().map(change)
        return self.behind(plain, change(self.compressed_keys_BMHK), change(self.compressed_values_BMHK))

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return super().tensors() | {
            "compressed_keys": self.compressed_keys_BMHK,
            "compressed_values": self.compressed_values_BMHK,
        }

    @classmethod
    def behind(cls, plain: LayerCarry, keys_BMHK: Tensor, values_BMHK: Tensor) -> RememberingCarry:
        """The carry `plain` with compressed memories of what lies behind its window."""
        return cls(
            plain.keys_BWHK,
            plain.values_BWHK,
            plain.state_BSD,
            compressed_keys_BMHK=keys_BMHK,
            compressed_values_BMHK=values_BMHK,
        )


class Compression(nn.Module):
    """A convolution over time whose kernel and stride are F tokens; one for each head, without bias.

    It starts as the mean of its F tokens, so that what comes out lies where the queries already look.
    """

    def __init__(self, num_heads: int, head_dim: int, factor: int):
        super().__init__()
        self.factor = factor
        mean_KJ = torch.eye(head_dim).repeat(1, factor) / factor
        self.weight_HKJ = nn.Parameter(mean_KJ.repeat(num_heads, 1, 1))

    def forward(self, vectors_BLHK: Tensor) -> Tensor:
        """[B, L / F, H, K]"""
        groups = vectors_BLHK.unflatten(1, (-1, self.factor)).transpose(2, 3).flatten(-2)
        return torch.einsum("bnhj,hkj->bnhk", groups, self.weight_HKJ)


class CompressedMemory(nn.Module):
    """The compressed memories of one layer: written, kept and read."""

    def __init__(self, config: ModelConfig, factor: int):
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.window, self.size = config.window, config.window
        self.block_size = config.window // factor
        self.compress_keys = Compression(config.num_heads, config.head_dim, factor)
        self.compress_values = Compression(config.num_heads, config.head_dim, factor)
        self.scale_H = nn.Parameter(torch.ones(config.num_heads))
        self.output = nn.Linear(inner, config.dim, bias=False)
        nn.init.normal_(self.output.weight, std=inner**-0.5)

    def forward(self, views: TokenViews, carry: RememberingCarry, starts_BC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is added to the tokens, x_BLD, and the keys_BMHK and values_BMHK to keep."""
        leaving_keys_BLHK = torch.cat([carry.keys_BWHK, views.keys_BLHK[:, : -self.window]], dim=1)
        leaving_values_BLHK = torch.cat([carry.values_BWHK, views.values_BLHK[:, : -self.window]], dim=1)
        keys_BTHK = torch.cat([carry.compressed_keys_BMHK, unit(self.compress_keys(leaving_keys_BLHK))], dim=1)
        values_BTHK = torch.cat([carry.compressed_values_BMHK, self.compress_values(leaving_values_BLHK)], dim=1)
        visible_BGM = self.visible(keys_BTHK, starts_BC)
        keys_BGMHK = self.spread(keys_BTHK, visible_BGM)
        values_BGMHK = self.spread(values_BTHK, visible_BGM)
        heads_BLHK = attend_where(
            views.queries_BLHK, keys_BGMHK[:, :-1], values_BGMHK[:, :-1], visible_BGM[:, :-1], self.scale_H.abs()
        )
        return self.output(heads_BLHK.flatten(-2)), keys_BGMHK[:, -1], values_BGMHK[:, -1]

    def visible(self, keys_BTHK: Tensor, starts_BC: Tensor) -> Tensor:
        """visible_BGM: which memories exist and are of the reader's own document."""
        document_BC = starts_BC.to(torch.int64).cumsum(dim=1)
        # Kept memories and the carried cache are of the document that the last segment ended with: 0.
        carried_BN = document_BC.new_zeros(len(document_BC), self.size + self.block_size)
        written_BT = torch.cat([carried_BN, document_BC[:, :-1].repeat_interleave(self.block_size, dim=1)], dim=1)
        reader_BG = torch.cat([document_BC, document_BC[:, -1:]], dim=1)
        exists_BT = (keys_BTHK != 0).flatten(-2).any(dim=-1)
        written_BGM, exists_BGM = (each.unfold(1, self.size, self.block_size) for each in (written_BT, exists_BT))
        return exists_BGM & (written_BGM == reader_BG[..., None])

    def spread(self, vectors_BTHK: Tensor, visible_BGM: Tensor) -> Tensor:
        """vectors_BGMHK: the M memories in front of each reader, zeros where it must not see."""
        vectors_BGMHK = vectors_BTHK.unfold(1, self.size, self.block_size).movedim(-1, 2)
        return vectors_BGMHK.masked_fill(~visible_BGM[..., None, None], 0)


class RememberingLayer(nn.Module):
    """A layer of the plain model, whose tokens read compressed memories beside what they read already.

    The state doesn't read them; it is a memory of its own.
    """

    def __init__(self, layer: TransformerLayer | RecurrentLayer, config: ModelConfig, factor: int):
        super().__init__()
        self.recompute = Recompute()
        self.layer = layer
        self.memory = CompressedMemory(config, factor)

    def forward(self, x_BLD: Tensor, carry: LayerCarry, starts_BC: Tensor) -> tuple[Tensor, LayerCarry]:
        """The layer's output for a segment, and its carry for the next one; a plain carry has no memories yet."""
        if not isinstance(carry, RememberingCarry):
            none_BMHK = torch.zeros_like(carry.keys_BWHK)  # M = W
            carry = RememberingCarry.behind(carry, none_BMHK, none_BMHK)
        tokens = self.layer.tokens if isinstance(self.layer, RecurrentLayer) else self.layer
        views = tokens.view(x_BLD)
        if isinstance(self.layer, RecurrentLayer):
            pieces = Pieces.of(views, carry, starts_BC)
            state_BSD, state_keys, state_values = self.layer.recur(carry.states(), pieces, starts_BC)
            heads = [
                tokens.attend(views, carry, starts_BC, pieces),
                tokens.attend_state(views, state_keys, state_values),
            ]
        else:
            state_BSD, heads = None, [tokens.attend(views, carry, starts_BC)]
        remembered_BLD, memory_keys_BMHK, memory_values_BMHK = self.memory(views, carry, starts_BC)
        out_BLD = tokens.finish(x_BLD + remembered_BLD, *heads)
        plain = tokens.carry_on(views, state_BSD)
        return out_BLD, RememberingCarry.behind(plain, memory_keys_BMHK, memory_values_BMHK)

    def forget(self, carry: LayerCarry) -> LayerCarry:
        """The carry with the state of the start of a document; cache and compressed memories stay."""
        return self.layer.forget(carry)


def attend_where(
    queries_BLHK: Tensor, keys_BCMHK: Tensor, values_BCMHK: Tensor, visible_BCM: Tensor, scale_H: Tensor
) -> Tensor:
    """Attention of each block's tokens to those of its memories that are visible. out_BLHK; zero where none is.

    values_BCMHK: zeros where not visible.
    """
    # A softmax over nothing is NaN in some kernels. Over all the zeros instead it is a mean of zeros in every one.
    mask_BCM = visible_BCM | ~visible_BCM.any(dim=-1, keepdim=True)
    queries_BLHK = queries_BLHK * scale_H.to(queries_BLHK.dtype)[:, None]
    blocks = keys_BCMHK.shape[1]
    # cuDNN's kernel gives NaN gradients with some masks (torch 2.11 on H100), so it is not among the backends.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        out = F.scaled_dot_product_attention(
            queries_BLHK.unflatten(1, (blocks, -1)).flatten(0, 1).transpose(1, 2),
            keys_BCMHK.flatten(0, 1).transpose(1, 2),
            values_BCMHK.flatten(0, 1).transpose(1, 2),
            attn_mask=mask_BCM.flatten(0, 1)[:, None, None],
            scale=1.0,
        )
    return out.transpose(1, 2).reshape(queries_BLHK.shape)
