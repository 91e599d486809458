"""Comparison with the reference implementation through its recorded vectors.

A vectors file holds three consecutive segments of two lanes: tokens, logits, losses, states, caches, and the gradients
of the first two. Our model gets the file's parameters and must reproduce all of it.

Dimension key
  B  lanes    L  tokens in a segment    C  blocks in a segment    W  window    S  states    D  width    H, K  heads
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brt_dist.data.errors import BadInput
from brt_dist.model.carry import Carry
from brt_dist.model.config import ModelConfig
from brt_dist.model.transformer import BlockRecurrentTransformer

TOLERANCE = 1e-4
SEGMENTS = (1, 2, 3)
SEGMENTS_WITH_GRADIENTS = (1, 2)

Vectors = Mapping[str, np.ndarray]


def verify(path: Path) -> dict[str, Any]:
    """Run our model on a vectors file; the largest error of each quantity, and whether all are within 1e-4.

    Gradients are compared relative to each tensor's largest entry, or absolutely where that is zero.
    BadInput where the file is no vectors file.
    """
    vectors = read_vectors(path)
    try:
        model = load_model(vectors)
        errors = compare(model, vectors)
    except KeyError as missing:
        raise BadInput(f"{path} is not a complete vectors file: it lacks {missing.args[0]}") from missing
    passed = all(error <= TOLERANCE for error in errors.values())
    return {"file": str(path), **errors, "passed": passed}


def read_vectors(path: Path) -> Vectors:
    """The arrays of a vectors file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            vectors = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise BadInput(f"there is no file {path}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise BadInput(f"{path} is not a vectors file: {_first_line(error)}") from error
    if "config_json" not in vectors:
        raise BadInput(f"{path} is not a vectors file of a model: it has no config_json")
    return vectors


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
