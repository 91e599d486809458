"""Initial values of all parameters, from one table (paper, appendix; reference)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Normal:
    """A normal distribution; std None: sqrt(variance / inputs). Truncated at two standard deviations of the normal
    that, cut off there, has the standard deviation wanted."""

    mean: float = 0.0
    std: float | None = None
    variance: float = 1.0
    truncated: bool = False


MATRIX = Normal()
GATE_MATRIX = Normal(variance=0.1, truncated=True)

# By name, the first pattern that fits. Several distributions: one for each matrix of a stack.
DISTRIBUTIONS: dict[str, tuple[Normal, ...]] = {
    "embedding.weight": (Normal(0.0, 1.0),),
    "head.weight": (Normal(0.0, 1.0),),
    "*norm.weight": (Normal(1.0, 0.0),),
    "*scale_H": (Normal(1.0, 0.0),),
    "*.bias.table": (Normal(0.0, 0.0),),
    "*.ids_SD": (Normal(0.0, 1.0),),
    "*.initial_state_SD": (Normal(0.0, 0.1),),
    # Not zero in the paper, so that Adafactor, which scales steps by a parameter's size, can move it.
    "*gate.*bias_D": (Normal(0.0, 0.1),),
    "*gate.candidate_and_gates.weight": (MATRIX, GATE_MATRIX, GATE_MATRIX),
    "*.weight": (MATRIX,),
}
# Standard deviation of a standard normal that is cut off at -2 and 2.
TRUNCATED_STD = 0.8796256610342398


def initialize(model: nn.Module, seed: int) -> None:
    """Draw every parameter from a generator of its own, seeded by `seed` and the parameter's name.

    A parameter's first value thus does not depend on which other parameters this process holds, nor on the device.
    Parameters on the meta device are left alone. KeyError names a parameter that the table doesn't know.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            with torch.no_grad():
                parameter.copy_(initial_value(name, parameter.shape, seed))


def initial_value(name: str, shape: torch.Size, seed: int) -> Tensor:
    """What the parameter `name`, whole, begins with: float32, on the CPU. KeyError where the table doesn't know it."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    found = next((values for pattern, values in DISTRIBUTIONS.items() if fnmatch(name, pattern)), None)
    if found is None:
        raise KeyError(f"no initial value is known for parameter {name}")
    values = torch.empty(shape, dtype=torch.float32, device="cpu")
    for part, normal in zip(values.chunk(len(found)), found, strict=True):
        _fill(part, normal, generator)
    return values


def _fill(values: Tensor, normal: Normal, generator: torch.Generator) -> None:
    std = (normal.variance / values.shape[-1]) ** 0.5 if normal.std is None else normal.std
    if normal.truncated:
        std /= TRUNCATED_STD
        nn.init.trunc_normal_(values, normal.mean, std, normal.mean - 2 * std, normal.mean + 2 * std, generator)
    else:
        values.normal_(normal.mean, std, generator=generator)
