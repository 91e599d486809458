"""What a lane remembers from one segment to the next, as a value.

Dimension key
  B  lanes    W  tokens in a block (= window)    H  heads    K  head width    S  state vectors    D  model width
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brt_dist.model.config import ModelConfig


@dataclass(frozen=True)
class LayerCarry:
    """Carry of one layer: keys and values of the last W tokens, unrotated; the state where the layer recurs."""

    keys_BWHK: Tensor
    values_BWHK: Tensor
    state_BSD: Tensor | None = None

    def states(self) -> Tensor:
        """state_BSD of a layer that recurs."""
        assert self.state_BSD is not None
        return self.state_BSD

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name: `keys`, `values`, and `state` where the layer recurs."""
        named = {"keys": self.keys_BWHK, "values": self.values_BWHK}
        return named if self.state_BSD is None else named | {"state": self.state_BSD}

    def map(self, change: Callable[[Tensor], Tensor]) -> LayerCarry:
        """The carry with `change` applied to each of its tensors."""
        state_BSD = None if self.state_BSD is None else change(self.state_BSD)
        return LayerCarry(change(self.keys_BWHK), change(self.values_BWHK), state_BSD)


@dataclass(frozen=True)
class Carry:
    """All that goes from one segment of a group of lanes to the next, layer by layer. The first dimension is lanes."""

    layers: tuple[LayerCarry, ...]

    def map(self, change: Callable[[Tensor], Tensor]) -> Carry:
        """The carry with `change` applied to each of its tensors."""
        return Carry(tuple(layer.map(change) for layer in self.layers))

    def detach(self) -> Carry:
        """The same values as constants: gradients end at a segment's end.

        Copies, because a state that was forgotten is a view of the learned initial one, which training changes, and a
        compressed memory a view of a whole segment's.
        """
        return self.map(lambda tensor: tensor.detach().clone())

    def tensors(self, first: int = 0) -> dict[str, Tensor]:
        """Its tensors by name, `layers.3.keys`, `layers.3.values` and `layers.3.state`.

        first: the number of its first layer, where it is the carry of a part of the model.
        """
        return {
            f"layers.{index}.{name}": tensor
            for index, layer in enumerate(self.layers, first)
            for name, tensor in layer.tensors().items()
        }

    @classmethod
    def from_tensors(cls, named: Mapping[str, Tensor], first: int = 0) -> Carry:
        """The inverse of `tensors`, of a plain model; KeyError where keys or values are missing, or for other names."""
        indices = {int(name.split(".")[1]) for name in named}
        if others := {name.split(".")[2] for name in named} - {"keys", "values", "state"}:
            raise KeyError(f"a carry of a plain model has no {', '.join(sorted(others))}")
        return cls(
            tuple(
                LayerCarry(named[f"layers.{i}.keys"], named[f"layers.{i}.values"], named.get(f"layers.{i}.state"))
                for i in range(first, max(indices, default=first - 1) + 1)
            )
        )

    @classmethod
    def fresh(
        cls,
        config: ModelConfig,
        lanes: int,
        device: torch.device,
        dtype: torch.dtype,
        layers: Sequence[int] | None = None,
        heads: int | None = None,
    ) -> Carry:
        """Zeros for `lanes` lanes. The learned initial state takes their place where a start is set.

        The state is float32 whatever the dtype: a gate near 1 would lose small updates in bfloat16.
        layers: the numbers of those whose carry it is, all by default. heads: how many of each, all by default.
        """
        heads = config.num_heads if heads is None else heads
        cache_BWHK = torch.zeros(lanes, config.window, heads, config.head_dim, device=device, dtype=dtype)
        state_dtype = torch.promote_types(dtype, torch.float32)
        state_BSD = torch.zeros(lanes, config.num_states, config.dim, device=device, dtype=state_dtype)
        return cls(
            tuple(
                LayerCarry(cache_BWHK, cache_BWHK, state_BSD if index in config.recurrent_layers else None)
                for index in (range(config.num_layers) if layers is None else layers)
            )
        )
