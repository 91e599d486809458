"""Initial values of all parameters, from one table (paper, appendix; reference)."""

from __future__ import annotations

import hashlib
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

# Mean and standard deviation by name, the first pattern that fits; None: 1 / sqrt(inputs).
DISTRIBUTIONS: dict[str, tuple[float, float | None]] = {
    "embedding.weight": (0.0, 1.0),
    "*norm.weight": (1.0, 0.0),
    "*scale_H": (1.0, 0.0),
    "*.bias.table": (0.0, 0.0),
    "*.ids_SD": (0.0, 1.0),
    "*.initial_state_SD": (0.0, 0.1),
    # Not zero in the paper, so that Adafactor, which scales steps by a parameter's size, can move it.
    "*.gate.bias_D": (0.0, 0.1),
    "*.weight": (0.0, None),
}


def initialize(model: nn.Module, seed: int) -> None:
    """Draw every parameter from a generator of its own, seeded by `seed` and the parameter's name.

    A parameter's first value thus does not depend on which other parameters this process holds, nor on the device.
    Parameters on the meta device are left alone. KeyError names a parameter that the table doesn't know.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            with torch.no_grad():
                parameter.copy_(_draw(name, parameter, generator))


def _draw(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    mean, std = next((values for pattern, values in DISTRIBUTIONS.items() if fnmatch(name, pattern)), (None, None))
    if mean is None:
        raise KeyError(f"no initial value is known for parameter {name}")
    values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    return values.normal_(mean, values.shape[-1] ** -0.5 if std is None else std, generator=generator)
