"""Distributed pretraining of Block-Recurrent Transformers on long documents.

`from brt_dist import BlockRecurrentTransformer, ModelConfig` is the whole Python door, with a third name beside them
for code that comes from the PyTorch port; everything else is reached through its own module. The names load on first
use, so that `brt --help` does not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from brt_dist.model.config import ModelConfig
    from brt_dist.model.port import PortBlockRecurrentTransformer
    from brt_dist.model.transformer import BlockRecurrentTransformer

__all__ = ["BlockRecurrentTransformer", "ModelConfig", "PortBlockRecurrentTransformer", "__version__"]

# The only place of the version: setup.py reads this line.
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """The public classes, imported when first asked for (PEP 562)."""
    if name == "ModelConfig":
        from brt_dist.model.config import ModelConfig

        return ModelConfig
    if name == "BlockRecurrentTransformer":
        from brt_dist.model.transformer import BlockRecurrentTransformer

        return BlockRecurrentTransformer
    if name == "PortBlockRecurrentTransformer":
        from brt_dist.model.port import PortBlockRecurrentTransformer

        return PortBlockRecurrentTransformer
    raise AttributeError(f"module 'brt_dist' has no attribute {name!r}")
