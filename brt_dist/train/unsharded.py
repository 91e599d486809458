"""The optimizer at ZeRO-0: every rank steps whole tensors, each matrix by itself.

The model stacks some matrices in one parameter (`StackedLinear`), for the sake of one product. Adafactor and Muon
look at whole matrices, so a step over the stack would be another one. Here they get a tensor for each matrix, which
shares the parameter's memory, and know nothing of stacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from brt_dist.model.stacked_linear import parts_by_name
from brt_dist.train.config import OptimizerConfig
from brt_dist.train.optimizer import build_optimizers, make_state


@dataclass(frozen=True)
class Part:
    """One matrix of a stacked parameter; `tensor` has the memory of those rows."""

    parameter: nn.Parameter
    rows: slice
    tensor: Tensor

    def share(self) -> None:
        """Take the memory of the parameter, which may have moved since, and of its gradient."""
        self.tensor.data = self.parameter.data[self.rows]
        self.tensor.grad = None if self.parameter.grad is None else self.parameter.grad[self.rows]


class UnshardedOptimizer(torch.optim.Optimizer):
    """What DeepSpeed's sharding optimizers are at ZeRO-1 and 2: clips by the global norm, steps, and gives its state.

    The parameters must be float32 and their gradients summed over all ranks when `step` is called.
    param_groups   of all optimizers that share the work
    grad_norm      of all gradients in the last step, before clipping
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, clip_norm: float):
        """clip_norm 0: no clipping."""
        self.clip_norm, self.grad_norm = clip_norm, 0.0
        self._parameters = dict(model.named_parameters())
        stacks = parts_by_name(model) if config.whole_matrices else {}
        self._parts = {
            f"{name}[{index}]": part
            for name, count in stacks.items()
            for index, part in enumerate(_cut(self._parameters[name], count))
        }
        whole = {name: parameter for name, parameter in self._parameters.items() if name not in stacks}
        named = {**whole, **{name: part.tensor for name, part in self._parts.items()}}
        self._optimizers = build_optimizers(named, config)
        super().__init__([group for optimizer in self._optimizers for group in optimizer.param_groups], {})
        for optimizer in self._optimizers:
            make_state(optimizer)
        state_of = {tensor: state for optimizer in self._optimizers for tensor, state in optimizer.state.items()}
        self._state = {name: state_of[tensor] for name, tensor in named.items()}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step over all parameters; `closure` is not called."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(list(self._parameters.values()), self.clip_norm, norm)
        self.grad_norm = float(norm)
        for part in self._parts.values():
            part.share()
        for optimizer in self._optimizers:
            optimizer.step()
        # A view, which would keep the gradient's memory through the next forward pass, when DeepSpeed has let it go.
        for part in self._parts.values():
            part.tensor.grad = None

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter by name, on the CPU."""
        return {name: parameter.detach().cpu() for name, parameter in self._parameters.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """What is remembered, by `<tensor>/<moment>`, on the CPU; a stacked matrix is `<parameter>[<index>]`."""
        return {name: tensor.cpu() for name, tensor in self._moments().items()}

    def state_shapes(self) -> dict[str, torch.Size]:
        """The shape of every tensor that `optimizer_state` gives."""
        return {name: tensor.shape for name, tensor in self._moments().items()}

    def restore(self, parameters: dict[str, Tensor], optimizer_state: dict[str, Tensor], steps: int) -> None:
        """Take up what `parameters` and `optimizer_state` gave after `steps` steps."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(parameters[name])
            for name, moment in self._moments().items():
                moment.copy_(optimizer_state[name])
        for state in self._state.values():
            state["step"].fill_(steps)

    def _moments(self) -> dict[str, Tensor]:
        return {
            f"{name}/{moment}": tensor
            for name, state in self._state.items()
            for moment, tensor in state.items()
            if moment != "step"
        }


def _cut(parameter: nn.Parameter, count: int) -> list[Part]:
    """The matrices stacked in a parameter, each with the same number of rows."""
    size = parameter.shape[0] // count
    rows = [slice(first, first + size) for first in range(0, parameter.shape[0], size)]
    return [Part(parameter, each, parameter.detach()[each]) for each in rows]
