"""Our model with the constructor and the call of a widely used PyTorch port, for code written against that.

Dimension key
  B  lanes    L  tokens of a call    C  blocks of a call    W  tokens in a block (block_width)    V  vocabulary
  S  state vectors    D  model width    H  heads    K  head width    M  compressed memories of a lane (W or none)
  R  M + W: memories of a lane, the compressed ones first, oldest first
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brt_dist.model.carry import Carry, LayerCarry
from brt_dist.model.compressed_memory import RememberingCarry, RememberingLayer
from brt_dist.model.config import ModelConfig
from brt_dist.model.loss import IGNORED
from brt_dist.model.recurrent_layer import RecurrentLayer
from brt_dist.model.transformer import BlockRecurrentTransformer
from brt_dist.model.transformer_layer import TransformerLayer

MLP_FACTOR = 4


class PortBlockRecurrentTransformer(nn.Module):
    """A Block-Recurrent Transformer called like the PyPI package block-recurrent-transformer-pytorch 0.4.4.

        model = PortBlockRecurrentTransformer(num_tokens=20000, dim=512, depth=6, recurrent_layers=(4,))
        out, mems, states = model(seq)
        out, mems, states = model(seq, xl_memories=mems, states=states)

    Arguments, defaults and calls are the port's; the model is ours (`BlockRecurrentTransformer`, in `self.model`: fixed
    gate, skip cell, rotary positions), so weights of the port do not fit.

    num_tokens             vocabulary
    dim, depth             width and number of layers; the MLP has 4 * dim channels
    dim_head, heads        width and number of attention heads
    max_seq_len            most tokens of one call; a multiple of block_width, and with recurrent layers two blocks at
                           least, because what writes the state gets no gradient from a call of one block
    block_width            tokens of a block; a token attends to exactly this many earlier ones
    num_state_vectors      of each recurrent layer; block_width by default
    recurrent_layers       their numbers, counted from 1; the middle one, depth // 2, by default; () for none
    use_compressed_mem     whether tokens also attend to compressed memories of what has left the window: block_width of
                           them, made by a learned convolution (`compressed_memory.py`; ours, not the port's)
    compressed_mem_factor  how many tokens one compressed memory stands for; must divide block_width
    use_flash_attn         accepted, and without effect: the fastest attention kernel that this device, dtype and head
                           size allow is chosen in any case (FlashAttention on CUDA in bfloat16 or float16), and all
                           kernels compute the same

    Not here: the port's other arguments (`all_layers_qk_rmsnorm`, `ff_mult`, `read_recurrent_layers`, `ignore_index`),
    its `generate` and its `RecurrentTrainerWrapper`.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        dim_head: int = 64,
        heads: int = 8,
        max_seq_len: int = 1024,
        block_width: int = 512,
        num_state_vectors: int | None = None,
        recurrent_layers: Sequence[int] | None = None,
        use_compressed_mem: bool = False,
        compressed_mem_factor: int = 4,
        use_flash_attn: bool = False,
    ):
        super().__init__()
        if num_state_vectors is None:
            num_state_vectors = block_width
        if recurrent_layers is None:
            recurrent_layers = (max(depth // 2, 1),)
        _check_sizes(
            num_tokens=num_tokens,
            dim=dim,
            depth=depth,
            dim_head=dim_head,
            heads=heads,
            max_seq_len=max_seq_len,
            block_width=block_width,
            num_state_vectors=num_state_vectors,
            compressed_mem_factor=compressed_mem_factor,
        )
        if dim_head % 2:
            raise ValueError(f"dim_head is {dim_head}; rotary positions need an even number")
        if use_compressed_mem and block_width % compressed_mem_factor:
            raise ValueError(f"compressed_mem_factor {compressed_mem_factor} does not divide block_width {block_width}")
        if max_seq_len % block_width:
            raise ValueError(f"max_seq_len {max_seq_len} is not a multiple of block_width {block_width}")
        _check_recurrence(recurrent_layers, depth, max_seq_len, block_width)
        self.max_seq_len, self.block_width = max_seq_len, block_width
        self.recurrent_layers = tuple(recurrent_layers)
        self.compressed_memories = block_width if use_compressed_mem else 0
        config = ModelConfig(
            vocab_size=num_tokens,
            dim=dim,
            num_layers=depth,
            num_heads=heads,
            head_dim=dim_head,
            mlp_dim=MLP_FACTOR * dim,
            window=block_width,
            num_states=num_state_vectors,
            recurrent_layers=tuple(layer - 1 for layer in self.recurrent_layers),
            # FlashAttention takes no position bias.
            position="rotary",
        )
        self.model = BlockRecurrentTransformer(config)
        if use_compressed_mem:
            self.model.layers = nn.ModuleList(
                RememberingLayer(cast(TransformerLayer | RecurrentLayer, layer), config, compressed_mem_factor)
                for layer in self.model.layers
            )

    def forward(
        self,
        x: Tensor,
        return_loss: bool = False,
        xl_memories: Sequence[Tensor] | None = None,
        states: Sequence[Tensor] | None = None,
        return_memories_and_states: bool | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """logits_BLV, or with `return_loss` the mean loss in nats; then memories and states for the next call.

        x                           tokens_BL, whole blocks, max_seq_len at most. With `return_loss` every token but
                                    the first is predicted from those before it; then x may have one token more,
                                    which is a target alone and the first token of the next call
        xl_memories, states         what an earlier call returned for the same lanes; None or empty: begin afresh.
                                    Memories are one tensor per layer, [2, B, R, H, K]: keys, then values. States are
                                    one tensor per recurrent layer, [B, S, D], float32 at least. They are constants,
                                    and all that is remembered: lanes may be picked, reordered, moved and saved
        return_memories_and_states  False: None in their place, and x need not be whole blocks. (The port returns None
                                    for every call shorter than max_seq_len; that would lose them unnoticed.)
        starts                      bool, [B, C]; not in the port. True where a document begins in front of block c:
                                    the lane forgets memories and state

        ValueError, of one line, where something doesn't fit.
        """
        if x.dim() != 2:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected lanes x tokens")
        lanes, length = x.shape
        read = length - 1 if return_loss and (length - 1) % self.block_width == 0 else length
        returning = return_memories_and_states is not False
        self._check_length(length, read, returning)
        padding = -read % self.block_width
        tokens_BL = F.pad(x[:, :read], (0, padding))
        carry = self._carry(xl_memories, states, lanes)
        if return_loss:
            targets_BL = F.pad(x[:, 1:], (0, read + padding - (length - 1)), value=IGNORED)
            nats, _, carry = self.model.loss(tokens_BL, targets_BL, carry, starts)
            out = nats / (lanes * (length - 1))
        else:
            logits_BLV, carry = self.model(tokens_BL, carry, starts)
            out = logits_BLV[:, :read]
        if not returning:
            return out, None, None
        return out, tuple(map(_memories, carry.layers)), tuple(_states(carry))

    def _check_length(self, length: int, read: int, returning: bool) -> None:
        if read < 1:
            raise ValueError(f"x has {length} tokens a lane; there is nothing to compute")
        if read > self.max_seq_len:
            raise ValueError(f"x has {length} tokens a lane; max_seq_len is {self.max_seq_len}")
        if returning and read % self.block_width:
            raise ValueError(
                f"x has {length} tokens a lane, but memories and states take whole blocks of {self.block_width}; "
                "with return_memories_and_states=False any length goes"
            )

    def _carry(self, memories: Sequence[Tensor] | None, states: Sequence[Tensor] | None, lanes: int) -> Carry | None:
        """The carry that memories and states stand for; None where all lanes begin afresh."""
        if not _given(memories) and not _given(states):
            return None
        config = self.model.config
        device, dtype = self.model.embedding.weight.device, self.model.cache_dtype()
        wide = torch.promote_types(dtype, torch.float32)
        if _given(memories):
            length = self.compressed_memories + config.window
            memory_shape = (2, lanes, length, config.num_heads, config.head_dim)
            _check_tensors("xl_memories", memories, config.num_layers, memory_shape, dtype, device)
            layers = [self._layer_carry(*memory) for memory in memories]
        else:
            layers = list(Carry.fresh(config, lanes, device, dtype).layers)
        if _given(states):
            state_shape = (lanes, config.num_states, config.dim)
            _check_tensors("states", states, len(config.recurrent_layers), state_shape, wide, device)
        else:
            states = [initial_SD.to(wide).expand(lanes, -1, -1) for initial_SD in self._initial_states()]
        for index, state_BSD in zip(sorted(config.recurrent_layers), states, strict=True):
            layers[index] = replace(layers[index], state_BSD=state_BSD)
        return Carry(tuple(layers))

    def _layer_carry(self, keys_BRHK: Tensor, values_BRHK: Tensor) -> LayerCarry:
        count = self.compressed_memories
        plain = LayerCarry(keys_BRHK[:, count:], values_BRHK[:, count:])
        return RememberingCarry.behind(plain, keys_BRHK[:, :count], values_BRHK[:, :count]) if count else plain

    def _initial_states(self) -> list[Tensor]:
        return [layer.initial_state_SD for layer in self.model.modules() if isinstance(layer, RecurrentLayer)]


def _given(tensors: Sequence[Tensor] | None) -> TypeGuard[Sequence[Tensor]]:
    """Whether there is anything: the port begins with empty lists."""
    return tensors is not None and len(tensors) > 0


def _memories(layer: LayerCarry) -> Tensor:
    keys, values = [layer.keys_BWHK], [layer.values_BWHK]
    if isinstance(layer, RememberingCarry):
        keys.insert(0, layer.compressed_keys_BMHK)
        values.insert(0, layer.compressed_values_BMHK)
    return torch.stack([torch.cat(keys, dim=1), torch.cat(values, dim=1)])


def _states(carry: Carry) -> list[Tensor]:
    return [layer.state_BSD for layer in carry.layers if layer.state_BSD is not None]


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")


def _check_recurrence(recurrent_layers: Sequence[int], depth: int, max_seq_len: int, block_width: int) -> None:
    if not isinstance(recurrent_layers, Sequence):
        raise ValueError(f"recurrent_layers is {recurrent_layers!r}; it must be a tuple of layer numbers")
    for layer in recurrent_layers:
        if not 1 <= layer <= depth:
            raise ValueError(f"recurrent_layers holds {layer}; layers are counted from 1 to depth, {depth}")
    if len(set(recurrent_layers)) < len(recurrent_layers):
        raise ValueError(f"recurrent_layers {tuple(recurrent_layers)} names a layer twice")
    if recurrent_layers and max_seq_len < 2 * block_width:
        raise ValueError(
            f"max_seq_len {max_seq_len} is less than two blocks of block_width {block_width}: "
            "what writes the states would get no gradient"
        )


def _check_tensors(
    name: str, tensors: Sequence[Tensor], count: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if len(tensors) != count:
        raise ValueError(f"{name} are {len(tensors)} tensors; this model has {count}")
    for index, tensor in enumerate(tensors):
        if tensor.shape != shape:
            raise ValueError(f"{name}[{index}] has shape {tuple(tensor.shape)}; expected {shape} for these tokens")
        if tensor.dtype != dtype:
            raise ValueError(f"{name}[{index}] has dtype {tensor.dtype}; expected {dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}[{index}] is on {tensor.device}, the model on {device}")
