"""The optimizer at ZeRO-0: every rank steps whole tensors, each matrix by itself.

The model stacks some matrices in one parameter (`StackedLinear`), for the sake of one product. Adafactor and Muon
look at whole matrices, so a step over the stack would be another one. Here they get a tensor for each matrix, which
shares the parameter's memory, and know nothing of stacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from brt_dist.model.stacked_linear import parts_by_name
from brt_dist.parallel.process_groups import Axis, Processes
from brt_dist.train.config import OptimizerConfig
from brt_dist.train.loss_scale import LossScale
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

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        clip_norm: float,
        processes: Processes | None = None,
        loss_scale: LossScale | None = None,
    ):
        """clip_norm 0: no clipping. processes: needed where tensor ranks share the parameters.

        loss_scale: what gradients were computed of is so many times the loss; steps that are not finite are skipped.
        """
        self.clip_norm, self.grad_norm, self._tensor = clip_norm, 0.0, Axis() if processes is None else processes.tensor
        self._loss_scale, self.skipped = loss_scale, False
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
        self._unscale()
        norm = self._total_norm()
        self.grad_norm = float(norm)
        if self._loss_scale is not None:
            self.skipped = not math.isfinite(self.grad_norm)
            self._loss_scale.update(self.skipped)
            if self.skipped:
                return
        if self.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(list(self._parameters.values()), self.clip_norm, norm)
        for part in self._parts.values():
            part.share()
        for optimizer in self._optimizers:
            optimizer.step()
        # A view, which would keep the gradient's memory through the next forward pass, when DeepSpeed has let it go.
        for part in self._parts.values():
            part.tensor.grad = None

    @property
    def loss_scale(self) -> float:
        """What the next loss is multiplied with; 1 in other precisions than float16."""
        return 1.0 if self._loss_scale is None else self._loss_scale.scale

    def progress(self) -> dict[str, float]:
        """Small numbers that a checkpoint keeps."""
        if self._loss_scale is None:
            return {}
        return {"loss_scale": self._loss_scale.scale, "good_steps": self._loss_scale.good_steps}

    def _unscale(self) -> None:
        if self._loss_scale is not None:
            for parameter in self._parameters.values():
                if parameter.grad is not None:
                    parameter.grad.div_(self._loss_scale.scale)

    def _total_norm(self) -> Tensor:
        """Of the gradients of all tensor ranks; those of parameters that every one of them holds count once."""
        counted = [
            p.grad
            for p in self._parameters.values()
            if p.grad is not None and (self._tensor.position == 0 or getattr(p, "tensor_model_parallel", False))
        ]
        # One process's norm is torch's, bit for bit.
        if self._tensor.group is None:
            return torch.nn.utils.get_total_norm(counted)
        square = torch.nn.utils.get_total_norm(counted).square()
        dist.all_reduce(square, group=self._tensor.group)
        return square.sqrt()

    def value(self, name: str) -> Tensor:
        """One parameter in float32."""
        return self._parameters[name].detach()

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by name, one after the other."""
        yield from self._parameters.items()

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """What is remembered, as `<tensor>/<moment>`; a stacked matrix is `<parameter>[<index>]`."""
        yield from self._moments().items()

    def moment_shapes(self) -> dict[str, torch.Size]:
        """The shape of every tensor that `moments` gives."""
        return {name: tensor.shape for name, tensor in self._moments().items()}

    def restore(self, value: Callable[[str], Tensor], steps: int, progress: Mapping[str, float]) -> None:
        """Take up the parameters and moments that `value` gives by name, after `steps` steps."""
        if self._loss_scale is not None and progress:
            self._loss_scale.scale, self._loss_scale.good_steps = progress["loss_scale"], int(progress["good_steps"])
        with torch.no_grad():
            for name, tensor in {**self._parameters, **self._moments()}.items():
                tensor.copy_(value(name))
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
