"""Adafactor as the paper trained with it (Shazeer & Stern, 2018, with momentum).

Dimension key
  R  rows of a matrix    C  columns
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# A matrix is factored if neither of its sides is shorter.
SHORTEST_FACTORED_SIDE = 128
# Added to squared gradients, so that a tensor that never had one is divided by something.
EPSILON = 1e-30
# A tensor moves as if its entries had this size where they are smaller, so that it can leave zero.
SMALLEST_SCALE = 1e-3


class Adafactor(torch.optim.Optimizer):
    """Steps of size lr x RMS(tensor), in the direction of gradients over the root of their mean squares.

    With t the number of the step, beta = 1 - t^-decay and means that run over the whole tensor:

        squares  = beta squares + (1 - beta) (gradient^2 + 1e-30)
        update   = gradient / sqrt(squares)
        update   = update / max(1, RMS(update) / clip) * lr * max(RMS(tensor), 1e-3)
        momentum = momentum_rate momentum + (1 - momentum_rate) update         (no bias correction)
        tensor   = tensor - momentum

    Of matrices with both sides at least 128 long, `squares` are kept as the means of their rows and of their columns,
    and are rows x columns / mean(rows). Every tensor given must be whole and a matrix of its own: q, k and v side by
    side in one tensor are another matrix, with other means. No weight decay. With `momentum` 0 no momentum is kept.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        decay: float = 0.8,
        clip: float = 1.0,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay, "clip": clip})
        for group in self.param_groups:
            for tensor in group["params"]:
                self.state[tensor] = _fresh_state(tensor, group["momentum"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step over all tensors that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    _step(tensor, tensor.grad, self.state[tensor], group)
        return loss


def _fresh_state(tensor: Tensor, momentum: float) -> dict[str, Tensor]:
    """Zeros in float32 at least; `step` counts on the CPU."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    shapes = {"squares": tensor.shape}
    if tensor.ndim == 2 and min(tensor.shape) >= SHORTEST_FACTORED_SIDE:
        shapes = {"rows": tensor.shape[:1], "columns": tensor.shape[1:]}
    if momentum:
        shapes["momentum"] = tensor.shape
    zeros = {name: torch.zeros(shape, dtype=dtype, device=tensor.device) for name, shape in shapes.items()}
    return {"step": torch.tensor(0.0), **zeros}


def _step(tensor: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    state["step"] += 1
    beta = 1 - float(state["step"]) ** -group["decay"]
    gradient = gradient.to(torch.promote_types(tensor.dtype, torch.float32))
    squares = gradient.square().add_(EPSILON)
    if "squares" in state:
        update = gradient * _average(state["squares"], squares, beta).rsqrt()
    else:
        rows_R = _average(state["rows"], squares.mean(dim=1), beta)
        columns_C = _average(state["columns"], squares.mean(dim=0), beta)
        # Two factors: the product of both means would leave float32 where gradients are tiny.
        update = gradient * (rows_R / rows_R.mean()).rsqrt()[:, None] * columns_C.rsqrt()
    update /= (_rms(update) / group["clip"]).clamp(min=1)
    update *= group["lr"] * _rms(tensor).clamp(min=SMALLEST_SCALE)
    if "momentum" in state:
        update = _average(state["momentum"], update, group["momentum"])
    tensor.sub_(update)


def _average(mean: Tensor, value: Tensor, keep: float) -> Tensor:
    """`mean`, moved towards `value`."""
    return mean.mul_(keep).add_(value, alpha=1 - keep)


def _rms(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).square().mean().sqrt()
