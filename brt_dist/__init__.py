"""Distributed pretraining of Block-Recurrent Transformers on long documents.

`from brt_dist import BlockRecurrentTransformer, ModelConfig` is the whole Python door; everything else is reached
through its own module. Both names load on first use, so that `brt --help` does not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from brt_dist.model.config import ModelConfig
    from brt_dist.model.transformer import BlockRecurrentTransformer

__all__ = ["BlockRecurrentTransformer", "ModelConfig", "__version__"]

# The only place of the version: setup.py reads this line.
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """The two public classes, imported when first asked for (PEP 562)."""
    if name == "ModelConfig":
        from brt_dist.model.config import ModelConfig

        return ModelConfig
    if name == "BlockRecurrentTransformer":
        from brt_dist.model.transformer import BlockRecurrentTransformer

        return BlockRecurrentTransformer
    raise AttributeError(f"module 'brt_dist' has no attribute {name!r}")
