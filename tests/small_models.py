"""Models small enough for exact statements: float64, every parameter off its trivial value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from brt_dist.model.carry import Carry
from brt_dist.model.config import ModelConfig
from brt_dist.model.transformer import BlockRecurrentTransformer

VOCAB, WINDOW = 11, 4


def small_config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "dim": 6,
        "num_layers": 3,
        "num_heads": 2,
        "head_dim": 4,
        "mlp_dim": 10,
        "window": WINDOW,
        "num_states": 3,
        "recurrent_layers": (1,),
    }
    return ModelConfig(**(sizes | changes))


def small_model(seed: int = 0, **changes: Any) -> BlockRecurrentTransformer:
    """In evaluation mode; gains, scales, position biases and gates are moved so that each of them matters."""
    torch.manual_seed(seed)
    model = BlockRecurrentTransformer(small_config(**changes)).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "scale_H")):
                parameter.mul_(1 + torch.rand(parameter.shape, generator=generator, dtype=torch.float64))
            if name.endswith("bias.table"):
                parameter.normal_(generator=generator)
    return model


def some_tokens(lanes: int, length: int, seed: int = 1, vocabulary: int = VOCAB) -> Tensor:
    return torch.randint(vocabulary, (lanes, length), generator=torch.Generator().manual_seed(seed))


def some_carry(config: ModelConfig, lanes: int, seed: int = 2) -> Carry:
    """A carry that no document left behind, so that its influence shows; float64."""
    generator = torch.Generator().manual_seed(seed)
    empty = Carry.fresh(config, lanes, torch.device("cpu"), torch.float64)
    return empty.map(lambda tensor: torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))


def starts_at(lanes: int, blocks: int, *places: tuple[int, int]) -> Tensor:
    """starts_BC, True at each (lane, block) of `places`."""
    starts_BC = torch.zeros(lanes, blocks, dtype=torch.bool)
    for lane, block in places:
        starts_BC[lane, block] = True
    return starts_BC
