"""Recomputation: activations that the backward pass computes again instead of keeping them.

What is computed again are functions of their arguments: a layer takes its carry as a value and returns the next one, so
the second time gives the same carry once more and advances nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


@dataclass(frozen=True)
class Recompute:
    """What one layer computes again.

    how           "selective": the attentions and the MLP of its tokens, whose activations are the largest; "full": all
                  of it, from what went in
    weights_come  weights are only there while their module runs (ZeRO-3), so that what is computed again must go back
                  by a graph of its own. Such a graph begins at the arguments that are tensors; whatever else is
                  handed in must be constant.
    """

    how: Literal["none", "selective", "full"] = "none"
    weights_come: bool = False

    def layer(self, function: Callable[..., T], *arguments: object) -> T:
        """function(*arguments), which is a whole layer; its carry is constant where weights come and go."""
        return _computed(function, arguments, again=self.how == "full", own_graph=self.weights_come)

    def mlp(self, function: Callable[..., T], *arguments: object) -> T:
        """function(*arguments), which is an MLP of tokens."""
        return _computed(function, arguments, again=self.how == "selective", own_graph=self.weights_come)

    def attention(self, function: Callable[..., T], *arguments: object) -> T:
        """function(*arguments), which is an attention: its few weights, scales and biases by head, never go."""
        return _computed(function, arguments, again=self.how == "selective", own_graph=False)


def set_recompute(layers: Mapping[int, nn.Module], how: Recompute, chosen: Collection[int] | None = None) -> None:
    """Tell the layers, by number, what they compute again; only those that are `chosen`, by default all."""
    for index, layer in layers.items():
        for module in layer.modules():
            if isinstance(getattr(module, "recompute", None), Recompute):
                module.recompute = how if chosen is None or index in chosen else Recompute()  # type: ignore[assignment]


def _computed(function: Callable[..., T], arguments: tuple[object, ...], again: bool, own_graph: bool) -> T:
    if not again or not torch.is_grad_enabled():
        return function(*arguments)
    result: T = checkpoint(function, *arguments, use_reentrant=own_graph)
    return result
