"""Models as shapes alone: construction on the meta device, held to take no memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from brt_dist.model.config import ModelConfig
from brt_dist.model.transformer import BlockRecurrentTransformer


class NoMemory(TorchDispatchMode):
    """Fails at the first tensor of more than one entry that is not on the meta device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            assert not isinstance(leaf, Tensor) or leaf.is_meta or leaf.numel() <= 1
        return result


def parameter_sizes(config: ModelConfig) -> dict[str, int]:
    """The number of entries of every parameter of a model, by name."""
    with NoMemory(), torch.device("meta"):
        model = BlockRecurrentTransformer(config)
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


@cache
def count_parameters(config: ModelConfig) -> int:
    """The parameters of a model without its embedding, as the paper counts them."""
    return sum(size for name, size in parameter_sizes(config).items() if name != "embedding.weight")
