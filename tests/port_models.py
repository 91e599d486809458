"""Small models with the port's constructor: float64, every parameter off its trivial value."""

from __future__ import annotations

from typing import Any

import torch
from small_models import VOCAB, WINDOW

from brt_dist import PortBlockRecurrentTransformer


def port_model(seed: int = 0, **changes: Any) -> PortBlockRecurrentTransformer:
    """With compressed memories, of two tokens each, unless `changes` say otherwise."""
    arguments: dict[str, Any] = {
        "num_tokens": VOCAB,
        "dim": 6,
        "depth": 3,
        "dim_head": 4,
        "heads": 2,
        "max_seq_len": 12 * WINDOW,
        "block_width": WINDOW,
        "num_state_vectors": 3,
        "recurrent_layers": (2,),
        "use_compressed_mem": True,
        "compressed_mem_factor": 2,
    }
    torch.manual_seed(seed)
    model = PortBlockRecurrentTransformer(**(arguments | changes)).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith(("norm.weight", "scale_H")):
                parameter.mul_(1 + noise)
            if name.endswith("weight_HKJ"):
                parameter.add_(noise - 0.5)
    return model
